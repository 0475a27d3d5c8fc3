"""What a capture of kernels leaves behind; the library that records is scripted here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.record import cupti_memory, kernel_trace
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.kernel_trace import KernelTrace, beginning
from llmprobe.record.recorder import Recorder
from llmprobe.record.room import Room
from llmprobe.record.window_file import read_window, window_path

SECOND = 1_000_000_000


def window(begins: list[int], end: int) -> Window:
    rows = np.zeros(len(begins), ACTIVITY)
    rows["begin"] = sorted(begins)
    rows["end"] = rows["begin"] + 1
    return Window(0, end, rows, ["gemm"], 0)


class Scripted:
    filling = False

    def open(self) -> None:
        pass

    def close(self) -> Window:
        return window(list(range(0, 3 * SECOND, SECOND // 4)), 3 * SECOND)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder.open(tmp_path, "worker", {})
    yield made
    made.close(remove=True)


def capture(recorder: Recorder, target: Path) -> None:
    trace = KernelTrace(recorder)
    trace.start()
    trace.stop()
    trace.save(target)


def test_its_beginning_is_left_for_the_verdict_too(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted()
    monkeypatch.setattr(kernel_trace, "of_process", lambda: scripted)
    numbers = []
    for _ in range(2):
        capture(recorder, tmp_path / "asked")
        whole = read_window(tmp_path / "asked").window
        assert (len(whole.activities), whole.end_ns) == (12, 3 * SECOND)
        seen = read_window(window_path(recorder.writer.path))
        assert (len(seen.window.activities), seen.window.end_ns) == (4, SECOND)
        numbers.append(seen.number)
    assert numbers[1] > numbers[0], "a reader takes each once"


def test_a_capture_is_there_though_nothing_can_be_left_for_the_verdict(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted()
    monkeypatch.setattr(kernel_trace, "of_process", lambda: scripted)
    trace = KernelTrace(recorder)
    trace.start()
    trace.stop()
    monkeypatch.setattr(trace, "_live", tmp_path / "nowhere" / "at" / "all")
    trace.save(tmp_path / "asked")
    assert len(read_window(tmp_path / "asked").window.activities) == 12


def test_it_ends_early_while_what_it_holds_still_fits(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Held(Scripted):
        filling = True
        held = 0

        def drain(self) -> int:
            return self.held

    scripted, mib = Held(), 1 << 20
    monkeypatch.setattr(kernel_trace, "of_process", lambda: scripted)
    size = SimpleNamespace(f_blocks=64 * mib, f_bavail=40 * mib, f_frsize=1)
    monkeypatch.setattr(kernel_trace, "Room", lambda folder: Room(folder, lambda folder: size))  # 8 MiB left
    trace = KernelTrace(recorder)
    trace.start()
    assert trace.look() is None
    scripted.held = 250_000
    assert trace.look() is None
    scripted.held = 300_000
    assert (trace.look() or "").startswith("ended early: 300000 kernels")
    trace.stop()
    trace.save(tmp_path / "asked")


@given(st.lists(st.integers(0, 5 * SECOND), max_size=40), st.integers(1, 30))
def test_the_beginning_is_bounded_and_whole(begins: list[int], most: int) -> None:
    found = window(begins, 5 * SECOND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_trace, "_VERDICT_ACTIVITIES", most)
        part = beginning(found)
    assert len(part.activities) <= most
    assert part.end_ns <= max(SECOND, 0)
    # Everything that began before its end is in it.
    assert len(part.activities) == (found.activities["begin"] < part.end_ns).sum()


def test_no_capture_beyond_what_cupti_can_time(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trace, "loaded_library", lambda: "libcupti.so")
    recorder.update_facts(clock="cuda")
    assert kernel_trace.unavailable(recorder) is None
    monkeypatch.setattr(cupti_memory.Recorded, "kernels", cupti_memory.CAPTURES_AT_MOST)
    reason = kernel_trace.unavailable(recorder)
    assert reason is not None
    assert "16000000 kernels" in reason
    assert "start the engine anew" in reason
