"""NVML in plain numbers: what telemetry asks about GPUs, and nothing else. The one module that reads pynvml.

Nothing here initialises CUDA. Whatever a GPU or driver does not tell is None.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from llmprobe.compute.hardware import nominal_bandwidth

#: Reasons for which NVML says that clocks are held down, by their bit (``nvmlClocksEventReason*``). Left out:
#: 0x1, an idle GPU, and 0x100, a display's setting.
THROTTLE_REASONS: dict[str, int] = {
    "application_clocks": 0x2,
    "software_power_cap": 0x4,
    "hardware_slowdown": 0x8,
    "sync_boost": 0x10,
    "software_thermal": 0x20,
    "hardware_thermal": 0x40,
    "power_brake": 0x80,
}
IDLE_REASON = 0x1

#: Counters that are asked for, by their GPM metric (``NVML_GPM_METRIC_*``; percentages of the time).
GPM_METRICS: dict[str, int] = {
    "graphics_active": 1,
    "sm_active": 2,
    "sm_occupancy": 3,
    "tensor_active": 5,
    "dram_active": 10,
}

_MOST_FAILURES = 3

_T = TypeVar("_T")


class NvmlError(Exception):
    """NVML, or one GPU, cannot be asked. The message is one line."""


@dataclass(frozen=True)
class Hardware:
    """What does not change while a GPU is in use."""

    uuid: str
    name: str
    driver_version: str
    mig: bool  # what is used is a MIG slice of it
    bus_width_bits: int | None
    memory_clock_max_hertz: float | None
    sm_clock_max_hertz: float | None
    power_limit_default_watts: float | None

    @property
    def bandwidth_bytes_per_second(self) -> float | None:
        """Nominal bandwidth; None where NVML does not tell, and for a slice of a GPU."""
        if self.mig or not self.bus_width_bits or not self.memory_clock_max_hertz:
            return None
        return nominal_bandwidth(self.bus_width_bits, self.memory_clock_max_hertz / 1e6)


@dataclass(frozen=True)
class Readings:
    """What changes from second to second. ``clocks_event_reasons`` is NVML's bit mask."""

    power_watts: float | None
    sm_clock_hertz: float | None
    memory_clock_hertz: float | None
    clocks_event_reasons: int | None


@dataclass(frozen=True)
class SlowReadings:
    """What changes slowly, or costs more to ask."""

    temperature_celsius: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_limit_watts: float | None


@dataclass(frozen=True)
class GpuProcess:
    """A process with a compute context, by the pid that NVML gives, which may be another namespace's."""

    pid: int
    memory_bytes: int | None


class Gpu(Protocol):
    """One GPU. Every method raises `NvmlError` once it is gone."""

    @property
    def hardware(self) -> Hardware:
        """As of when it was opened."""

    @property
    def no_counters(self) -> str:
        """Why it has no hardware counters; empty if it has them."""

    def readings(self) -> Readings:
        """Power and clocks now."""

    def slow_readings(self) -> SlowReadings:
        """Temperature, memory and limits now."""

    def processes(self) -> list[GpuProcess] | None:
        """Who uses it for compute; None if NVML does not say."""

    def ratios(self) -> Mapping[str, float] | None:
        """Counters (`GPM_METRICS`) as means since the last call, 0 to 1; None at the first."""

    def close(self) -> None:
        """Free what counting took."""


class Nvml(Protocol):
    """The library, initialised."""

    def uuids(self) -> list[str]:
        """Every GPU that is visible here, in NVML's order. Raises `NvmlError`."""

    def gpu(self, uuid: str) -> Gpu:
        """The GPU that CUDA calls ``uuid`` (``GPU-…``). Raises `NvmlError`."""

    def close(self) -> None:
        """Shut the library down."""


def open_nvml() -> Nvml:
    """Load and initialise the driver's library. Raises `NvmlError`."""
    try:
        import pynvml
    except ImportError:
        raise NvmlError("nvidia-ml-py is not installed") from None
    return PyNvml(pynvml)


class PyNvml:
    """`Nvml` by nvidia-ml-py.

    Args:
        library: the module ``pynvml``.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            hint = ""
            if error.value == library.NVML_ERROR_LIBRARY_NOT_FOUND:
                hint = " (libnvidia-ml.so.1; in a container, pass the GPU with its utility capability)"
            raise NvmlError(f"NVML: {error}{hint}") from None

    def uuids(self) -> list[str]:
        """See `Nvml.uuids`."""
        library = self._library
        with _raising(library, "NVML"):
            handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
            return [_text(library.nvmlDeviceGetUUID(handle)) for handle in handles]

    def gpu(self, uuid: str) -> Gpu:
        """See `Nvml.gpu`."""
        library = self._library
        try:
            return _PyGpu(library, library.nvmlDeviceGetHandleByUUID(_bytes(uuid)), uuid, False)
        except library.NVMLError as error:
            if error.value not in (library.NVML_ERROR_NOT_FOUND, library.NVML_ERROR_INVALID_ARGUMENT):
                raise NvmlError(f"{uuid}: {error}") from None
        # CUDA gives a MIG slice's own id without saying that it is one.
        with _raising(library, f"{uuid} is no GPU that NVML shows here"):
            slice_ = library.nvmlDeviceGetHandleByUUID(_bytes("MIG-" + uuid.partition("-")[2]))
            return _PyGpu(library, library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_), uuid, True)

    def close(self) -> None:
        """See `Nvml.close`."""
        with contextlib.suppress(self._library.NVMLError):
            self._library.nvmlShutdown()


class _PyGpu:
    def __init__(self, library: Any, handle: Any, uuid: str, slice_: bool) -> None:
        self._library, self._handle, self._uuid = library, handle, uuid
        self._asked: Any = None
        self._samples: list[Any] = []
        self._counted = False
        self._failures = 0  # of counting, one after the other
        mode = self._maybe(lambda: library.nvmlDeviceGetMigMode(handle)[0])
        self.hardware = Hardware(
            uuid=uuid,
            name=_text(self._maybe(lambda: library.nvmlDeviceGetName(handle)) or ""),
            driver_version=_text(self._maybe(library.nvmlSystemGetDriverVersion) or ""),
            mig=slice_ or mode == library.NVML_DEVICE_MIG_ENABLE,
            bus_width_bits=self._maybe(lambda: library.nvmlDeviceGetMemoryBusWidth(handle)) or None,
            memory_clock_max_hertz=self._hertz(library.nvmlDeviceGetMaxClockInfo, library.NVML_CLOCK_MEM),
            sm_clock_max_hertz=self._hertz(library.nvmlDeviceGetMaxClockInfo, library.NVML_CLOCK_SM),
            power_limit_default_watts=_thousandth(
                self._maybe(lambda: library.nvmlDeviceGetPowerManagementDefaultLimit(handle))
            ),
        )
        self.no_counters = self._prepare_counters()

    def readings(self) -> Readings:
        library, handle = self._library, self._handle
        reasons = self._maybe(lambda: library.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if reasons is None:  # its name in drivers and in nvidia-ml-py before 535
            reasons = self._maybe(lambda: library.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        return Readings(
            power_watts=_thousandth(self._maybe(lambda: library.nvmlDeviceGetPowerUsage(handle))),
            sm_clock_hertz=self._hertz(library.nvmlDeviceGetClockInfo, library.NVML_CLOCK_SM),
            memory_clock_hertz=self._hertz(library.nvmlDeviceGetClockInfo, library.NVML_CLOCK_MEM),
            clocks_event_reasons=reasons,
        )

    def slow_readings(self) -> SlowReadings:
        library, handle = self._library, self._handle
        memory = self._maybe(lambda: library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2))
        if memory is None:  # drivers before 510; what they call used holds what is reserved too
            memory = self._maybe(lambda: library.nvmlDeviceGetMemoryInfo(handle))
        sensor = library.NVML_TEMPERATURE_GPU
        return SlowReadings(
            temperature_celsius=self._maybe(lambda: library.nvmlDeviceGetTemperature(handle, sensor)),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_limit_watts=_thousandth(
                self._maybe(lambda: library.nvmlDeviceGetEnforcedPowerLimit(handle))
            ),
        )

    def processes(self) -> list[GpuProcess] | None:
        found = self._maybe(lambda: self._library.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if found is None:
            return None
        return [GpuProcess(int(entry.pid), entry.usedGpuMemory) for entry in found]

    def ratios(self) -> Mapping[str, float] | None:
        if self.no_counters:
            return None
        library = self._library
        before, now = self._samples
        asked = self._asked
        try:
            library.nvmlGpmSampleGet(self._handle, now)
            self._samples = [now, before]
            if not self._counted:
                self._counted = True
                return None
            asked.version, asked.numMetrics = library.NVML_GPM_METRICS_GET_VERSION, len(GPM_METRICS)
            asked.sample1, asked.sample2 = before, now
            for index, metric in enumerate(GPM_METRICS.values()):
                asked.metrics[index].metricId = metric
            library.nvmlGpmMetricsGet(asked)
        except library.NVMLError as error:
            self._counters_failed(error)
            return None
        self._failures = 0
        answers = zip(GPM_METRICS, asked.metrics[: len(GPM_METRICS)], strict=True)
        return {
            name: min(max(answer.value / 100, 0.0), 1.0)
            for name, answer in answers
            if answer.nvmlReturn == library.NVML_SUCCESS and math.isfinite(answer.value)
        }

    def close(self) -> None:
        samples, self._samples = self._samples, []
        for sample in samples:
            with contextlib.suppress(self._library.NVMLError):
                self._library.nvmlGpmSampleFree(sample)

    def _counters_failed(self, error: Any) -> None:
        """Virtual GPUs claim to count and then fail; the rest of what NVML tells does not depend on it."""
        self._raise_if_gone(error)
        self._counted = False
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            self.no_counters = f"NVML refuses counters: {error}"
            self.close()

    def _prepare_counters(self) -> str:
        library = self._library
        if self.hardware.mig:
            return "this GPU is split into MIG slices, and counters are those of a whole GPU"
        support = self._maybe(lambda: library.nvmlGpmQueryDeviceSupport(self._handle))
        if support is None or not support.isSupportedDevice:
            return "this GPU has no counters that NVML reads (GPM needs Hopper or newer)"
        try:
            self._asked = library.c_nvmlGpmMetricsGet_t()
            for _ in range(2):
                self._samples.append(library.nvmlGpmSampleAlloc())
        except library.NVMLError as error:
            self.close()
            return f"NVML refuses counters: {error}"
        return ""

    def _hertz(self, ask: Callable[[Any, int], int], clock: int) -> float | None:
        megahertz = self._maybe(lambda: ask(self._handle, clock))
        return None if megahertz is None else megahertz * 1e6

    def _maybe(self, ask: Callable[[], _T]) -> _T | None:
        """What ``ask`` says; None where this GPU, driver or nvidia-ml-py has no answer."""
        library = self._library
        try:
            return ask()
        except AttributeError:
            return None
        except library.NVMLError as error:
            self._raise_if_gone(error)
            return None

    def _raise_if_gone(self, error: Any) -> None:
        library = self._library
        if error.value in (
            library.NVML_ERROR_GPU_IS_LOST,
            library.NVML_ERROR_RESET_REQUIRED,
            library.NVML_ERROR_UNINITIALIZED,
            library.NVML_ERROR_DRIVER_NOT_LOADED,
        ):
            raise NvmlError(f"{self._uuid}: {error}") from None


@contextlib.contextmanager
def _raising(library: Any, what: str) -> Any:
    """NVML's errors as `NvmlError`."""
    try:
        yield
    except library.NVMLError as error:
        raise NvmlError(f"{what}: {error}") from None


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3


def _bytes(text: str) -> bytes:
    return text.encode()


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
