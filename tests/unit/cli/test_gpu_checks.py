"""The doctor on GPUs, as a scripted NVML shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from collect.scripted_nvml import GIB, H100, ScriptedGpu, ScriptedNvml

from llmprobe.cli.checks import gpus, machine
from llmprobe.collect.nvml import GpuProcess
from llmprobe.collect.peaks import Calibration, save_peaks


def seen(*scripted: ScriptedGpu) -> gpus.Gpus:
    return gpus.look(ScriptedNvml(*scripted))


def two() -> tuple[ScriptedGpu, ScriptedGpu]:
    return ScriptedGpu(), ScriptedGpu(replace(H100, uuid="GPU-2"))


def test_all_is_well_with_two_gpus() -> None:
    found = seen(*two())
    assert gpus.present(found).found == "2 x NVIDIA H100 80GB HBM3, driver 580.159"
    for check in (gpus.present, gpus.counters, gpus.slices, gpus.clocks):
        assert check(found).state == "ok", check(found)


def test_library_and_gpus_are_let_go() -> None:
    gpu = ScriptedGpu()
    nvml = ScriptedNvml(gpu)
    gpus.look(nvml)
    assert nvml.closed == 1
    assert gpu.closed


def test_no_library_is_no_gpu_unless_there_is_a_device(tmp_path: Path) -> None:
    nvml = ScriptedNvml()
    nvml.problem = "NVML: NVML Shared Library Not Found"
    found = gpus.look(nvml)
    assert gpus.present(found, tmp_path / "nvidiactl").state == "absent"
    (tmp_path / "nvidiactl").touch()
    check = gpus.present(found, tmp_path / "nvidiactl")
    assert check.state == "not ok"
    assert "Shared Library Not Found" in check.found
    assert gpus.counters(found).state == "absent"


def test_a_lost_gpu_is_told_and_the_other_shown() -> None:
    lost, well = two()
    nvml = ScriptedNvml(lost, well)
    lost.lost = True
    check = gpus.present(gpus.look(nvml))
    assert check.state == "not ok"
    assert "1 x NVIDIA H100" in check.found
    assert "GPU-1: GPU is lost" in check.found


def test_counters_that_some_lack_are_told_with_the_reason() -> None:
    old, new = two()
    old.no_counters = "needs Hopper"
    check = gpus.counters(seen(old, new))
    assert (check.state, check.found) == ("absent", "1 of 2 GPUs have them: needs Hopper")


def test_a_split_gpu_needs_measured_peaks(tmp_path: Path) -> None:
    whole, split = two()
    split.hardware = replace(split.hardware, mig=True)
    found = seen(whole, split)
    assert gpus.slices(found).found == "on for GPU 1"
    path = tmp_path / "peaks.json"
    assert machine.peaks(found, path).state == "not ok"
    save_peaks([Calibration("GPU-2", "slice", 1e12, {"bfloat16": 1e14}, 0.0)], path)
    assert machine.peaks(found, path).state == "ok"


def test_peaks_of_a_known_gpu_need_no_measurement(tmp_path: Path) -> None:
    assert machine.peaks(seen(ScriptedGpu()), tmp_path / "none").state == "ok"
    unknown = ScriptedGpu(replace(H100, name="NVIDIA X1"))
    check = machine.peaks(seen(unknown), tmp_path / "none")
    assert (check.state, check.found) == ("not ok", "none for NVIDIA X1")


def test_clocks_that_are_held_down_are_told() -> None:
    hot, limited = two()
    hot.change(sm_clock_hertz=900e6, clocks_event_reasons=0x60)
    limited.change(power_limit_watts=350.0)
    check = gpus.clocks(seen(hot, limited))
    assert check.state == "not ok"
    assert "GPU 0: clocks are held down now (software_thermal, hardware_thermal): SM 900 MHz" in check.found
    assert "GPU 1: its power limit is 350 W" in check.found


def test_an_idle_gpu_may_clock_low() -> None:
    idle = ScriptedGpu()
    idle.change(sm_clock_hertz=345e6, clocks_event_reasons=0x1)
    assert gpus.clocks(seen(idle)).state == "ok"


@pytest.mark.parametrize(
    ("listed", "state"),
    [
        (None, "absent"),
        ([], "ok"),
        ([GpuProcess(1, GIB)], "ok"),
        ([GpuProcess(1, GIB), GpuProcess(77, GIB)], "not ok"),
    ],
)
def test_several_processes_on_one_gpu_are_named(
    tmp_path: Path, listed: list[GpuProcess] | None, state: str
) -> None:
    (tmp_path / "proc/77").mkdir(parents=True)
    (tmp_path / "proc/77/comm").write_text("python3\n")
    gpu = ScriptedGpu(listed=listed)
    check = gpus.users(seen(gpu), tmp_path)
    assert check.state == state
    if state == "not ok":
        assert check.found == "GPU 0: 1, 77 (python3)"
