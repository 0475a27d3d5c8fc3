"""GPUs as a scripted NVML tells them: found, averaged, lost, found again, and shown in views."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmprobe.collect.nvml import GpuProcess, Readings
from llmprobe.collect.peaks import peaks_for
from llmprobe.collect.process import Process
from llmprobe.collect.telemetry import Telemetry, gpu_of
from llmprobe.record.journal_reader import JournalReader

from .pretended import SECOND, Clock, Server, busy_second, collector, only, program
from .scripted_nvml import H100, ScriptedGpu, ScriptedNvml

DEVICE = {"type": "cuda", "name": H100.name, "index": 0, "uuid": "GPU-1"}
FACTS: dict[str, Any] = {"device": DEVICE, "model": {"compute_dtype": "bfloat16"}}


@pytest.fixture
def gpu() -> ScriptedGpu:
    return ScriptedGpu()


@pytest.fixture
def nvml(gpu: ScriptedGpu) -> ScriptedNvml:
    return ScriptedNvml(gpu)


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Process]:
    recorder = program(tmp_path, device=DEVICE, pid=os.getpid())
    yield Process(
        recorder.writer.path,
        JournalReader(recorder.writer.path, recorder.writer),
    )
    recorder.close()


@pytest.fixture
def telemetry(nvml: ScriptedNvml, clock: Clock, tmp_path: Path) -> Telemetry:
    return Telemetry(nvml, clock=clock, root=tmp_path / "root", thread=False)


def look(telemetry: Telemetry, clock: Clock, seconds: int = 1) -> None:
    for _ in range(seconds):
        clock.now += SECOND
        telemetry.sample()


def test_nothing_is_loaded_while_no_rank_uses_a_gpu(
    telemetry: Telemetry, nvml: ScriptedNvml, clock: Clock
) -> None:
    look(telemetry, clock, 3)
    assert nvml.opened == 0
    assert telemetry.gpu({"device": {"type": "cpu", "name": "x"}}) is None
    assert telemetry.missing({"device": {"type": "cpu"}}) == {}


@pytest.mark.parametrize("device", [None, 3, {}, {"type": "cuda"}, {"type": "cpu", "uuid": "GPU-1"}])
def test_facts_without_a_gpu_have_none(device: Any) -> None:
    assert gpu_of({"device": device}) == ""


def test_a_gpu_is_told_once_it_was_looked_at(telemetry: Telemetry, clock: Clock, rank: Process) -> None:
    telemetry.watch([rank])
    assert telemetry.gpu(FACTS) is None
    assert telemetry.missing(FACTS) == {}, "not looked at yet is no problem"
    look(telemetry, clock)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert (view.name, view.power_watts, view.temperature_celsius) == (H100.name, 400.0, 45.0)
    assert view.bandwidth_bytes_per_second == pytest.approx(3352e9, rel=1e-3)
    assert view.throttle_reasons is not None
    assert not any(view.throttle_reasons.values())
    assert view.dram_active_ratio is None, "a counter needs two looks"
    assert telemetry.counters(FACTS) is None
    look(telemetry, clock)
    counters = telemetry.counters(FACTS)
    assert counters is not None
    assert (counters.dram_active_ratio, counters.tensor_active_ratio) == (0.6, 0.1)
    assert counters.graphics_active_ratio == 0.9


def test_counters_are_means_over_the_last_ten_seconds(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    telemetry.watch([rank])
    look(telemetry, clock, 11)
    gpu.active = {"dram_active": 0.2, "tensor_active": 0.5, "sm_active": 0.8}
    look(telemetry, clock, 5)
    counters = telemetry.counters(FACTS)
    assert counters is not None
    assert counters.dram_active_ratio == pytest.approx(0.4)
    assert counters.tensor_active_ratio == pytest.approx(0.3)
    lately = telemetry.counters_lately(FACTS)
    assert lately is not None
    assert lately.dram_active_ratio == pytest.approx(0.2)
    look(telemetry, clock, 5)
    counters = telemetry.counters(FACTS)
    assert counters is not None
    assert counters.dram_active_ratio == pytest.approx(0.2)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.counted_seconds == pytest.approx(20)
    assert view.active_seconds["dram_active"] == pytest.approx(10 * 0.6 + 10 * 0.2)


def test_a_long_gap_between_looks_is_not_counted(telemetry: Telemetry, clock: Clock, rank: Process) -> None:
    telemetry.watch([rank])
    look(telemetry, clock, 3)
    clock.now += 60 * SECOND
    telemetry.sample()
    assert telemetry.counters(FACTS) is None
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.counted_seconds == pytest.approx(2)


def test_what_was_seen_long_ago_is_not_told(telemetry: Telemetry, clock: Clock, rank: Process) -> None:
    telemetry.watch([rank])
    look(telemetry, clock, 3)
    clock.now += 2 * SECOND
    view, counters = telemetry.gpu(FACTS), telemetry.counters(FACTS)
    assert view is not None
    assert counters is not None
    assert view.age_seconds == counters.age_seconds == pytest.approx(2)
    clock.now += 10 * SECOND
    assert telemetry.gpu(FACTS) is None
    assert telemetry.counters(FACTS) is None
    assert telemetry.missing(FACTS)["gpu_power_watts"] == "NVML has not answered for 12 s"
    assert telemetry.hardware(FACTS) == H100, "what does not change stays known"


def test_without_nvml_the_reason_is_told_and_it_is_tried_again_rarely(
    telemetry: Telemetry, nvml: ScriptedNvml, clock: Clock, rank: Process
) -> None:
    nvml.problem = "NVML: NVML Shared Library Not Found"
    telemetry.watch([rank])
    look(telemetry, clock, 59)
    assert nvml.opened == 1
    missing = telemetry.missing(FACTS)
    assert missing["gpu_dram_active_ratio"] == missing["gpu_power_watts"] == nvml.problem
    nvml.problem = ""
    look(telemetry, clock, 3)
    assert nvml.opened == 2
    assert telemetry.gpu(FACTS) is not None
    assert telemetry.missing(FACTS) == {}


def test_a_gpu_that_vanishes_is_told_and_found_again(
    telemetry: Telemetry, nvml: ScriptedNvml, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    telemetry.watch([rank])
    look(telemetry, clock, 3)
    gpu.lost = True
    look(telemetry, clock, 3)
    assert telemetry.gpu(FACTS) is None
    assert telemetry.missing(FACTS)["gpu_power_watts"] == "GPU-1: GPU is lost"
    assert gpu.closed
    assert nvml.closed == 1, "a library that lost its GPUs is started anew"
    gpu.lost = False
    look(telemetry, clock, 61)
    assert nvml.opened == 2
    assert telemetry.gpu(FACTS) is not None


def test_one_lost_gpu_does_not_take_the_others_along(tmp_path: Path, clock: Clock) -> None:
    lost, well = ScriptedGpu(), ScriptedGpu(replace(H100, uuid="GPU-2"))
    nvml = ScriptedNvml(lost, well)
    telemetry = Telemetry(nvml, clock=clock, thread=False)
    recorders = [program(tmp_path, device={**DEVICE, "uuid": uuid}) for uuid in ("GPU-1", "GPU-2")]
    telemetry.watch([Process(r.writer.path, JournalReader(r.writer.path, r.writer)) for r in recorders])
    look(telemetry, clock, 3)
    lost.lost = True
    look(telemetry, clock, 3)
    assert telemetry.gpu(FACTS) is None
    assert telemetry.counters({"device": {**DEVICE, "uuid": "GPU-2"}}) is not None
    assert nvml.closed == 0
    for recorder in recorders:
        recorder.close()


def test_a_surprise_ends_nothing(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise() -> Readings:
        raise ZeroDivisionError("by NVML")

    monkeypatch.setattr(gpu, "readings", surprise)
    telemetry.watch([rank])
    look(telemetry, clock)
    assert "ZeroDivisionError" in telemetry.missing(FACTS)["gpu_power_watts"]


def test_a_gpu_without_counters_has_the_rest(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    gpu.no_counters = "this GPU has no counters that NVML reads (GPM needs Hopper or newer)"
    telemetry.watch([rank])
    look(telemetry, clock, 3)
    assert telemetry.counters(FACTS) is None
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.power_watts == 400.0
    assert telemetry.missing(FACTS) == {
        "gpu_dram_active_ratio": gpu.no_counters,
        "gpu_tensor_active_ratio": gpu.no_counters,
    }


def test_nvml_is_let_go_after_the_last_rank(
    telemetry: Telemetry, nvml: ScriptedNvml, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    telemetry.watch([rank])
    look(telemetry, clock, 2)
    telemetry.watch([])
    look(telemetry, clock)
    assert gpu.closed
    assert nvml.closed == 1
    assert telemetry.gpu(FACTS) is None
    telemetry.close()
    assert nvml.closed == 1


def test_clocks_held_down_by_heat_are_noted(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    telemetry.watch([rank])
    look(telemetry, clock, 6)
    gpu.change(sm_clock_hertz=1200e6, clocks_event_reasons=0x40)
    look(telemetry, clock, 5)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.throttled_ratio == pytest.approx(0.5)
    assert view.power_capped_ratio == 0
    assert view.throttle_reasons is not None
    assert view.throttle_reasons["hardware_thermal"]
    assert view.notes == ("clocks are held down 50% of the time (hardware_thermal): SM 1200 MHz of 1980 MHz",)


def test_the_power_limit_caps_without_a_note_unless_somebody_lowered_it(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    gpu.change(sm_clock_hertz=1700e6, clocks_event_reasons=0x4)
    telemetry.watch([rank])
    look(telemetry, clock, 11)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert (view.power_capped_ratio, view.throttled_ratio) == (1.0, 0.0)
    assert view.notes == ()
    gpu.change(power_limit_watts=350.0)
    look(telemetry, clock, 6)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.notes == ("its power limit is 350 W, 700 W by default",)


def test_slow_memory_is_noted_while_the_gpu_works(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu
) -> None:
    gpu.change(memory_clock_hertz=1593e6, clocks_event_reasons=0x1)
    telemetry.watch([rank])
    look(telemetry, clock, 2)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.notes == (), "an idle GPU may do as it likes"
    gpu.change(clocks_event_reasons=0x2)
    look(telemetry, clock)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert "1593 MHz of 2619 MHz" in view.notes[0]


def test_another_process_on_the_gpu_is_remembered_for_the_window(
    telemetry: Telemetry, clock: Clock, rank: Process, gpu: ScriptedGpu, tmp_path: Path
) -> None:
    (tmp_path / "root/proc/77").mkdir(parents=True)
    gpu.listed = [GpuProcess(os.getpid(), None), GpuProcess(77, None)]
    telemetry.watch([rank])
    look(telemetry, clock, 6)
    counters = telemetry.counters(FACTS)
    assert counters is not None
    assert counters.shared is True
    gpu.listed = [GpuProcess(os.getpid(), None)]
    look(telemetry, clock, 6)
    counters = telemetry.counters(FACTS)
    assert counters is not None
    assert counters.shared is True, "its work is still in the mean"
    look(telemetry, clock, 15)
    counters = telemetry.counters(FACTS)
    assert counters is not None
    assert counters.shared is None, "of another namespace nobody knows"


def test_two_measured_processes_on_one_gpu_share_it(tmp_path: Path, clock: Clock, gpu: ScriptedGpu) -> None:
    telemetry = Telemetry(ScriptedNvml(gpu), clock=clock, thread=False)
    recorders = [program(tmp_path, device=DEVICE, group=group) for group in ("a", "b")]
    telemetry.watch([Process(r.writer.path, JournalReader(r.writer.path, r.writer)) for r in recorders])
    look(telemetry, clock, 2)
    view = telemetry.gpu(FACTS)
    assert view is not None
    assert view.shared is True
    assert "2 measured processes" in view.notes[0]
    for recorder in recorders:
        recorder.close()


def test_a_driver_that_hangs_holds_up_nobody(rank: Process, gpu: ScriptedGpu) -> None:
    entered, goes_on = threading.Event(), threading.Event()

    class Hanging(ScriptedGpu):
        def readings(self) -> Readings:
            entered.set()
            goes_on.wait(30)
            return super().readings()

    telemetry = Telemetry(ScriptedNvml(Hanging()))
    telemetry.watch([rank])
    assert entered.wait(10)
    assert telemetry.gpu(FACTS) is None
    telemetry.watch([rank])
    goes_on.set()
    end = time.monotonic() + 10
    while telemetry.gpu(FACTS) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert telemetry.gpu(FACTS) is not None
    telemetry.close()


# In the collector's views


@pytest.fixture
def on_gpu(server: Server, telemetry: Telemetry, tmp_path: Path, clock: Clock) -> Iterator[Any]:
    server.worker.update_facts(device=DEVICE, clock="cuda", pid=os.getpid())
    found = collector(tmp_path, clock, server, telemetry=telemetry)
    yield found
    found.close()


def test_a_rank_s_view_has_its_gpu_counters_and_notes(
    on_gpu: Any, server: Server, telemetry: Telemetry, clock: Clock, gpu: ScriptedGpu
) -> None:
    gpu.change(power_limit_watts=350.0)
    on_gpu.tick(final=True)
    busy_second(server, clock.now)
    look(telemetry, clock, 3)
    view = only(on_gpu)
    (shown,) = view.ranks
    assert shown.gpu is not None
    assert shown.counters is not None
    assert shown.gpu.dram_active_ratio == shown.counters.dram_active_ratio == 0.6
    assert "rank 0: its power limit is 350 W, 700 W by default" in view.notes
    assert "gpu_dram_active_ratio" not in view.missing


def test_a_shared_gpu_makes_the_verdict_unknown(
    on_gpu: Any, server: Server, telemetry: Telemetry, clock: Clock, gpu: ScriptedGpu, tmp_path: Path
) -> None:
    (tmp_path / "root/proc/77").mkdir(parents=True)
    on_gpu.tick(final=True)
    gpu.listed = [GpuProcess(os.getpid(), None), GpuProcess(77, None)]
    for _ in range(10):
        busy_second(server, clock.now)
        look(telemetry, clock)
        on_gpu.tick()
    view = only(on_gpu)
    assert view.ranks[0].counters is not None
    assert view.ranks[0].counters.shared is True
    assert view.verdicts["decode"].cause == "shared_gpu"


def test_why_there_are_no_counters_stands_in_missing(
    on_gpu: Any, telemetry: Telemetry, clock: Clock, gpu: ScriptedGpu
) -> None:
    gpu.no_counters = "not on this one"
    on_gpu.tick(final=True)
    look(telemetry, clock, 2)
    assert only(on_gpu).missing["gpu_dram_active_ratio"] == "not on this one"


# Peaks


def test_bandwidth_is_nvml_s_where_it_tells_one(tmp_path: Path) -> None:
    found = peaks_for(FACTS, tmp_path / "none", replace(H100, memory_clock_max_hertz=2500e6))
    assert found is not None
    assert found.bandwidth_bytes_per_second == pytest.approx(3200e9)
    assert found.flops_per_second == pytest.approx(989.4e12)
    assert "bandwidth: 5120 bit x 2500 MHz x 2 by NVML" in found.detail
    assert found.source == "nominal"


@pytest.mark.parametrize("changes", [{"bus_width_bits": None}, {"memory_clock_max_hertz": None}])
def test_bandwidth_stays_published_where_nvml_does_not_tell(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = peaks_for(FACTS, tmp_path / "none", replace(H100, **changes))
    assert found is not None
    assert found.bandwidth_bytes_per_second == pytest.approx(3352e9)
    assert "NVML" not in found.detail


def test_an_absurd_bandwidth_is_not_used_and_said(tmp_path: Path) -> None:
    found = peaks_for(FACTS, tmp_path / "none", replace(H100, bus_width_bits=10240))
    assert found is not None
    assert found.bandwidth_bytes_per_second == pytest.approx(3352e9)
    assert "not used" in found.detail


def test_a_mig_slice_has_no_published_peaks(tmp_path: Path) -> None:
    assert peaks_for(FACTS, tmp_path / "none", replace(H100, mig=True)) is None
