"""What nvidia-ml-py answers becomes plain numbers; its structures and constants are the real ones."""

from __future__ import annotations

import ctypes
from typing import Any

import pynvml
import pytest

from llmprobe.collect.nvml import (
    GPM_METRICS,
    IDLE_REASON,
    THROTTLE_REASONS,
    Gpu,
    GpuProcess,
    NvmlError,
    PyNvml,
)


class Process:
    def __init__(self, pid: int, memory: int | None) -> None:
        self.pid, self.usedGpuMemory = pid, memory


class Memory:
    total, used = 80 << 30, 60 << 30


class Support:
    isSupportedDevice = 1


class Library:
    """pynvml, but that functions are the test's, or fail with the NVML error code that stands for them."""

    def __init__(self, **answers: Any) -> None:
        self.absent: set[str] = set()
        self.freed: list[Any] = []
        self.answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: "handle",
            "nvmlDeviceGetName": lambda handle: b"NVIDIA H100 80GB HBM3",
            "nvmlSystemGetDriverVersion": lambda: "580.159",
            "nvmlDeviceGetMemoryBusWidth": lambda handle: 5120,
            "nvmlDeviceGetMaxClockInfo": lambda handle, clock: {1: 1980, 2: 2619}[clock],
            "nvmlDeviceGetClockInfo": lambda handle, clock: {1: 1755, 2: 2619}[clock],
            "nvmlDeviceGetPowerUsage": lambda handle: 412_500,
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": lambda handle: 700_000,
            "nvmlDeviceGetTemperature": lambda handle, sensor: 45,
            "nvmlDeviceGetMemoryInfo": lambda handle, version=None: Memory(),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x4,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [Process(1, 5), Process(2, None)],
            "nvmlGpmQueryDeviceSupport": lambda handle: Support(),
            "nvmlGpmSampleAlloc": pynvml.c_nvmlGpmSample_t,
            "nvmlGpmSampleGet": lambda handle, sample: sample,
            "nvmlGpmSampleFree": self.freed.append,
            "nvmlGpmMetricsGet": counting(dram=66.6, tensor=1.8, sm=72.6),
            **answers,
        }

    def __getattr__(self, name: str) -> Any:
        if name in self.absent:
            raise AttributeError(name)
        if not name.startswith("nvml") or name == "nvmlMemory_v2":
            return getattr(pynvml, name)
        answer = self.answers.get(name, pynvml.NVML_ERROR_NOT_SUPPORTED)
        if not isinstance(answer, int):
            return answer

        def refuse(*arguments: Any, **named: Any) -> Any:
            raise pynvml.NVMLError(answer)

        return refuse


def counting(**percent: float) -> Any:
    """A ``nvmlGpmMetricsGet`` that fills in these percentages; a counter without one fails."""
    values = {pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: percent.get("dram")}
    values[pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL] = percent.get("tensor")
    values[pynvml.NVML_GPM_METRIC_SM_UTIL] = percent.get("sm")

    def get(asked: Any) -> Any:
        assert asked.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        for metric in asked.metrics[: asked.numMetrics]:
            value = values.get(metric.metricId)
            metric.nvmlReturn = pynvml.NVML_SUCCESS if value is not None else pynvml.NVML_ERROR_NO_DATA
            metric.value = value or 0.0
        return asked

    return get


def gpu(**answers: Any) -> Gpu:
    return PyNvml(Library(**answers)).gpu("GPU-1")


def test_metrics_and_reasons_are_nvml_s() -> None:
    assert GPM_METRICS == {
        "graphics_active": pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
        "sm_active": pynvml.NVML_GPM_METRIC_SM_UTIL,
        "sm_occupancy": pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
        "tensor_active": pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
        "dram_active": pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
    }
    reasons = {
        "application_clocks": pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting,
        "software_power_cap": pynvml.nvmlClocksThrottleReasonSwPowerCap,
        "hardware_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
        "sync_boost": pynvml.nvmlClocksThrottleReasonSyncBoost,
        "software_thermal": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
        "hardware_thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    assert reasons == THROTTLE_REASONS
    assert pynvml.nvmlClocksThrottleReasonGpuIdle == IDLE_REASON


def test_units_are_base_units() -> None:
    found = gpu()
    assert found.hardware.name == "NVIDIA H100 80GB HBM3"
    assert found.hardware.sm_clock_max_hertz == 1980e6
    assert found.hardware.bandwidth_bytes_per_second == pytest.approx(3352e9, rel=1e-3)
    now, slow = found.readings(), found.slow_readings()
    assert (now.power_watts, now.sm_clock_hertz, now.clocks_event_reasons) == (412.5, 1755e6, 0x4)
    assert (slow.temperature_celsius, slow.power_limit_watts) == (45, 700.0)
    assert (slow.memory_used_bytes, slow.memory_total_bytes) == (60 << 30, 80 << 30)
    assert found.processes() == [GpuProcess(1, 5), GpuProcess(2, None)]


def test_what_a_gpu_does_not_tell_is_none() -> None:
    answers = dict.fromkeys(
        [
            *("nvmlDeviceGetPowerUsage", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetMemoryBusWidth"),
            *("nvmlDeviceGetTemperature", "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMemoryInfo"),
        ],
        pynvml.NVML_ERROR_NOT_SUPPORTED,
    )
    found = gpu(**answers, nvmlDeviceGetCurrentClocksEventReasons=pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert found.hardware.bandwidth_bytes_per_second is None
    assert found.readings().power_watts is None
    assert found.readings().clocks_event_reasons is None
    assert found.slow_readings().memory_total_bytes is None
    assert found.slow_readings().power_limit_watts == 700.0
    assert found.processes() is None


def test_older_drivers_and_libraries_are_asked_by_the_older_names() -> None:
    def memory(handle: Any, version: Any = None) -> Memory:
        if version is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return Memory()

    library = Library(
        nvmlDeviceGetMemoryInfo=memory, nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x8
    )
    library.absent.add("nvmlDeviceGetCurrentClocksEventReasons")
    found = PyNvml(library).gpu("GPU-1")
    assert found.readings().clocks_event_reasons == 0x8
    assert found.slow_readings().memory_used_bytes == 60 << 30


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED])
def test_a_gpu_that_is_gone_is_an_error(code: int) -> None:
    library = Library()
    found = PyNvml(library).gpu("GPU-1")
    library.answers |= {"nvmlDeviceGetPowerUsage": code, "nvmlGpmSampleGet": code}
    with pytest.raises(NvmlError, match="GPU-1"):
        found.readings()
    with pytest.raises(NvmlError, match="GPU-1"):
        found.ratios()


def test_without_a_library_the_error_says_so() -> None:
    with pytest.raises(NvmlError, match="NVML Shared Library Not Found"):
        PyNvml(Library(nvmlInit=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))


def test_counters_are_means_since_the_last_call() -> None:
    found = gpu()
    assert found.no_counters == ""
    assert found.ratios() is None
    ratios = found.ratios()
    assert ratios == pytest.approx({"dram_active": 0.666, "tensor_active": 0.018, "sm_active": 0.726})


def test_each_count_is_between_the_two_newest_samples() -> None:
    taken: list[int | None] = []
    between: list[list[int | None]] = []
    fill = counting(dram=50.0)
    memory = [ctypes.create_string_buffer(8) for _ in range(2)]
    rooms = iter(memory)

    def address(sample: Any) -> int | None:
        return ctypes.cast(sample, ctypes.c_void_p).value

    def get(asked: Any) -> Any:
        between.append([address(asked.sample1), address(asked.sample2)])
        return fill(asked)

    found = gpu(
        nvmlGpmSampleAlloc=lambda: ctypes.cast(next(rooms), pynvml.c_nvmlGpmSample_t),
        nvmlGpmSampleGet=lambda handle, sample: taken.append(address(sample)),
        nvmlGpmMetricsGet=get,
    )
    for _ in range(4):
        found.ratios()
    assert between == [taken[0:2], taken[1:3], taken[2:4]]
    assert len(set(taken)) == 2


@pytest.mark.parametrize(("percent", "ratio"), [(100.4, 1.0), (-0.1, 0.0)])
def test_ratios_stay_between_0_and_1(percent: float, ratio: float) -> None:
    found = gpu(nvmlGpmMetricsGet=counting(dram=percent))
    found.ratios()
    assert found.ratios() == {"dram_active": ratio}


def test_a_counter_that_is_no_number_is_absent() -> None:
    found = gpu(nvmlGpmMetricsGet=counting(dram=float("nan"), sm=50.0))
    found.ratios()
    assert found.ratios() == {"sm_active": 0.5}


def test_counting_that_keeps_failing_is_given_up_and_the_rest_goes_on() -> None:
    library = Library(nvmlGpmSampleGet=pynvml.NVML_ERROR_UNKNOWN)
    found = PyNvml(library).gpu("GPU-1")
    for _ in range(2):
        assert found.ratios() is None
        assert found.no_counters == ""
    assert found.ratios() is None
    assert found.no_counters == "NVML refuses counters: Unknown Error"
    assert len(library.freed) == 2
    assert found.readings().power_watts == 412.5


def test_counting_that_failed_once_starts_anew() -> None:
    library = Library()
    found = PyNvml(library).gpu("GPU-1")
    found.ratios()
    good, library.answers["nvmlGpmMetricsGet"] = (
        library.answers["nvmlGpmMetricsGet"],
        pynvml.NVML_ERROR_NO_DATA,
    )
    assert found.ratios() is None
    library.answers["nvmlGpmMetricsGet"] = good
    assert found.ratios() is None, "since when is not known"
    assert found.ratios() is not None


def test_samples_are_freed() -> None:
    library = Library()
    found = PyNvml(library).gpu("GPU-1")
    found.close()
    found.close()
    assert len(library.freed) == 2


def test_a_gpu_before_hopper_has_no_counters() -> None:
    class Unsupported:
        isSupportedDevice = 0

    for answer in (lambda handle: Unsupported(), pynvml.NVML_ERROR_FUNCTION_NOT_FOUND):
        found = gpu(nvmlGpmQueryDeviceSupport=answer)
        assert "Hopper" in found.no_counters
        assert found.ratios() is None


def test_a_gpu_in_mig_mode_has_neither_counters_nor_a_bandwidth() -> None:
    found = gpu(nvmlDeviceGetMigMode=lambda handle: [1, 1])
    assert found.hardware.mig
    assert found.hardware.bandwidth_bytes_per_second is None
    assert "MIG" in found.no_counters


def test_a_slice_is_found_by_its_own_id() -> None:
    def handle(uuid: bytes) -> str:
        if uuid != b"MIG-1":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "slice"

    found = gpu(
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda slice_: f"whole of {slice_}",
        nvmlDeviceGetName=lambda handle: handle,
    )
    assert found.hardware.mig
    assert found.hardware.name == "whole of slice"


def test_a_uuid_that_nobody_has_is_named() -> None:
    with pytest.raises(NvmlError, match="GPU-1 is no GPU that NVML shows here"):
        gpu(nvmlDeviceGetHandleByUUID=pynvml.NVML_ERROR_NOT_FOUND)
