"""When windows are opened, and what stops them; the library that records is scripted here."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmprobe.record import cupti_memory, kernels
from llmprobe.record.cupti import CuptiError
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.kernels import KernelWindowThread
from llmprobe.record.recorder import Recorder
from llmprobe.record.window_file import read_window, window_path
from llmprobe.settings import KernelWindows


class Scripted:
    """Opens and closes; each may fail when told to."""

    filling = False

    def __init__(self) -> None:
        self.opened = self.closed = 0
        self.failing: Exception | None = None

    def open(self) -> None:
        if self.failing:
            raise self.failing
        self.opened += 1

    def close(self) -> Window:
        self.closed += 1
        return Window(1, 2, np.zeros(3, ACTIVITY), ["one"], 0)


class Engine(threading.Thread):
    """Begins a step every millisecond."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(daemon=True)
        self._recorder = recorder
        self.running = True

    def run(self) -> None:
        while self.running:
            self._recorder.begin(1, 1, time.monotonic_ns())
            time.sleep(0.001)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    made = Scripted()
    monkeypatch.setattr(kernels, "of_process", lambda: made)
    return made


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder.open(tmp_path, "worker", {})
    yield made
    made.close(remove=True)


@pytest.fixture
def engine(recorder: Recorder) -> Iterator[Engine]:
    made = Engine(recorder)
    made.start()
    yield made
    made.running = False
    made.join()


Start = Callable[..., KernelWindowThread]


@pytest.fixture
def start(recorder: Recorder) -> Iterator[Start]:
    threads: list[KernelWindowThread] = []

    def make(spare_graphs: bool = False, **more: Any) -> KernelWindowThread:
        values: dict[str, Any] = {"active": lambda: True, "failed": lambda where, error: None, **more}
        threads.append(KernelWindowThread(recorder, KernelWindows(0.002, 0.01, spare_graphs), **values))
        threads[-1].start()
        return threads[-1]

    yield make
    recorder.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def said(recorder: Recorder) -> dict[str, Any]:
    return recorder.facts.get("kernel_windows") or {}


def test_windows_follow_each_other_while_steps_run(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start
) -> None:
    start()
    path = window_path(recorder.writer.path)
    until(lambda: path.exists() and read_window(path).number >= 3)
    assert said(recorder)["on"] is True
    engine.running = False
    engine.join()

    def rests() -> bool:
        opened = scripted.opened
        time.sleep(0.2)
        return scripted.opened == opened == scripted.closed

    # Nothing runs, nothing to see. One that is open already and saw too few steps waits two seconds for more.
    until(rests)


def test_windows_end_before_what_cupti_keeps_of_them_is_too_much(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = start()
    until(lambda: scripted.opened > 2)
    assert said(recorder)["on"] is True
    monkeypatch.setattr(cupti_memory.Recorded, "kernels", cupti_memory.WINDOWS_AT_MOST)
    thread.join(5)
    assert not thread.is_alive()
    assert said(recorder)["on"] is False
    assert "4000000 kernels" in said(recorder)["reason"]
    assert "145 MiB" in said(recorder)["reason"]


def test_no_window_while_the_probe_is_off_or_a_profiler_runs(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = False
    start(active=lambda: active)
    until(lambda: bool(said(recorder)))
    time.sleep(0.1)
    assert scripted.opened == 1  # the one that sets CUPTI up
    monkeypatch.setattr(kernels, "profiling", lambda: "a profiler runs")
    active = True
    until(lambda: "profiler" in said(recorder)["reason"])
    assert scripted.opened == 1
    monkeypatch.setattr(kernels, "profiling", lambda: None)
    until(lambda: scripted.opened > 2 and said(recorder)["on"])


def test_a_refusal_at_the_start_is_said_and_nothing_is_tried_again(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start
) -> None:
    scripted.failing = CuptiError("cuptiActivityEnable refused: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
    thread = start()
    thread.join(5)
    assert not thread.is_alive()
    assert (said(recorder)["on"], scripted.opened) == (False, 0)
    assert "INSUFFICIENT_PRIVILEGES" in said(recorder)["reason"]


def test_windows_that_keep_failing_end_and_tell(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start
) -> None:
    failures: list[str] = []
    thread = start(failed=lambda where, error: failures.append(f"{where}: {error}"))
    until(lambda: scripted.opened > 1)
    scripted.failing = CuptiError("gone")
    thread.join(10)
    assert not thread.is_alive()
    assert failures == ["kernel_windows: gone"] * 3
    assert said(recorder)["on"] is False and "gone" in said(recorder)["reason"]


def test_a_folder_that_cannot_be_written_never_reaches_the_host(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start
) -> None:
    window_path(recorder.writer.path).parent.write_text("a file where the folder should be")
    thread = start()
    thread.join(10)
    assert not thread.is_alive()
    assert said(recorder)["on"] is False


def test_an_injected_profiler_keeps_windows_off(
    scripted: Scripted, recorder: Recorder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_INJECTION64_PATH", "/opt/nsys/libToolsInjection64.so")
    thread = start()
    thread.join(5)
    assert scripted.opened == 0
    assert "CUDA_INJECTION64_PATH" in said(recorder)["reason"]


@pytest.mark.parametrize(("mode", "on"), [("FULL_AND_PIECEWISE", False), (None, False), ("NONE", True)])
def test_left_alone_vllm_with_graphs_is_spared(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start, mode: str | None, on: bool
) -> None:
    recorder.update_facts(framework="vllm", flags={"cudagraph_mode": mode} if mode else {})
    thread = start(spare_graphs=True)
    if on:
        until(lambda: scripted.opened > 2)
    else:
        thread.join(5)
        assert scripted.opened == 0
    assert said(recorder)["on"] is on
    assert on or "LLMPROBE_KERNEL_WINDOWS=" in said(recorder)["reason"]


def test_left_alone_a_program_that_begins_to_replay_graphs_is_spared_from_then_on(
    scripted: Scripted, recorder: Recorder, engine: Engine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.update_facts(framework="transformers")
    monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)
    start(spare_graphs=True)
    until(lambda: scripted.opened > 2)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", ModuleType("cudagraph_trees"))
    until(lambda: said(recorder)["on"] is False)
    until(lambda: scripted.opened == scripted.closed)
    opened = scripted.opened
    time.sleep(0.1)
    assert scripted.opened == opened


def test_a_profiler_in_another_thread_is_seen() -> None:
    torch = pytest.importorskip("torch")
    inside, over = threading.Event(), threading.Event()

    def profile() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            inside.set()
            over.wait(30)

    thread = threading.Thread(target=profile)
    thread.start()
    assert inside.wait(30)
    assert kernels.profiling() == "a torch profiler runs in this process"
    over.set()
    thread.join()
    assert kernels.profiling() is None


def test_tritons_profiler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = pytest.importorskip("triton.profiler.flags")
    assert kernels.profiling() is None
    monkeypatch.setattr(flags.flags, "profiling_on", True)  # what proton.start() does
    assert "Proton" in (kernels.profiling() or "")
    older = ModuleType("triton.profiler.flags")
    monkeypatch.setitem(sys.modules, "triton.profiler.flags", older)
    assert kernels.profiling() is None
    monkeypatch.setattr(older, "profiling_on", True, raising=False)
    assert "Proton" in (kernels.profiling() or "")
