"""Asks for captures: what is taken up and what is not, and that every one comes to an answer."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.record import asked_capture
from llmprobe.record.asked import Ask, Paths, Said, open_plain, read_ask, read_said, write
from llmprobe.record.asked_capture import AskedCaptures
from llmprobe.record.cupti import IN_USE, CuptiError
from llmprobe.record.memory import available_bytes, resident_bytes
from llmprobe.record.recorder import Recorder
from llmprobe.record.room import Room

IDS = ("20261126-104500-abcdef", "20261126-104501-abcdef")


def ask(number: int = 0, **changes: Any) -> Ask:
    wanted = Ask(IDS[number], "torch", 30.0, None, False, False, time.monotonic_ns())
    return dataclasses.replace(wanted, **changes)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    opened = Recorder.open(tmp_path, "worker", {"role": "worker", "clock": "host"})
    yield opened
    opened.close(remove=True)


@pytest.fixture
def paths(recorder: Recorder) -> Paths:
    found = Paths.of(recorder.writer.path)
    found.ask.parent.mkdir()
    return found


class Scripted:
    """A recording that does as it is told."""

    def __init__(self) -> None:
        self.notes = ["as told"]
        self.calls: list[str] = []
        self.early: str | None = None
        self.failing: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ("start", "look", "stop", "save", "forget"):
            raise AttributeError(name)

        def call(target: Path | None = None) -> str | None:
            if name != "look":
                self.calls.append(name)
            if error := self.failing.get(name):
                raise error
            if target is not None:
                target.write_text("result")
            return self.early if name == "look" else None

        return call


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(asked_capture._CaptureThread, "_trace", lambda self: scripted)
    monkeypatch.setattr(asked_capture, "available", lambda recorder: {"torch": None, "kernels": "no GPU"})
    monkeypatch.setattr(asked_capture, "unsafe", lambda recorder: {})  # it would ask torch
    return scripted


@pytest.fixture
def failures() -> list[Exception]:
    return []


@pytest.fixture
def captures(recorder: Recorder, failures: list[Exception]) -> Iterator[AskedCaptures]:
    made = AskedCaptures(recorder, profiler=lambda: None, failed=lambda where, error: failures.append(error))
    yield made
    made.close()
    wait(lambda: not capturing())


def capturing() -> bool:
    return any(thread.name == "llmprobe-capture" for thread in threading.enumerate())


def wait(ready: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def said(paths: Paths, *states: str) -> Said:
    def ready() -> Said | None:
        found = read_said(paths.said)
        return found if found is not None and found.state in states else None

    return wait(ready)  # type: ignore[no-any-return]


def test_what_is_written_is_read_and_private(paths: Paths) -> None:
    wanted = ask(steps=5, cpu=True, stacks=True)
    write(paths.ask, wanted)
    assert read_ask(paths.ask) == wanted
    answer = Said(IDS[0], "done", "", 3, 1, 2, ((5, 6), (7, 8)), ("a note",), 9)
    write(paths.said, answer)
    assert read_said(paths.said) == answer
    assert {path.stat().st_mode & 0o777 for path in paths.ask.parent.iterdir()} == {0o600}
    paths.remove()
    assert list(paths.ask.parent.iterdir()) == []
    assert read_ask(paths.ask) is read_said(paths.said) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../etc/passwd"},
        {"id": 7},
        {"tool": "gdb"},
        {"seconds": 0},
        {"seconds": "5"},
        {"seconds": True},
        {"seconds": 3601},
        {"seconds": float("inf")},
        {"seconds": float("nan")},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": 1_000_001},
        {"cpu": 1},
        {"stacks": "no"},
        {"end": 1},
        {"asked_ns": 0},
        {"asked_ns": 1 << 62},
        {"asked_ns": "now"},
    ],
)
def test_an_ask_that_no_agent_writes_is_none(paths: Paths, changes: dict[str, Any]) -> None:
    write(paths.ask, ask(**changes))
    assert read_ask(paths.ask) is None


def test_an_old_ask_is_none(paths: Paths) -> None:
    now = time.monotonic_ns()
    write(paths.ask, ask(asked_ns=now))
    assert read_ask(paths.ask, now + 9 * 10**9) is not None
    assert read_ask(paths.ask, now + 11 * 10**9) is None
    assert read_ask(paths.ask, now - 1) is None


@pytest.mark.parametrize("read", [read_ask, read_said])
def test_torn_foreign_and_linked_files_are_none(
    paths: Paths, tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    write(paths.ask, ask() if read is read_ask else Said(IDS[0], "done"))  # type: ignore[arg-type]
    assert read(paths.ask) is not None
    whole = paths.ask.read_bytes()
    for cut in range(0, len(whole), 7):
        paths.ask.write_bytes(whole[:cut])
        assert read(paths.ask) is None
    data = json.loads(whole)
    for other in ({**data, "schema": 2}, {**data, "command": "reboot"}, [data], None, "x", {}):
        paths.ask.write_text(json.dumps(other))
        assert read(paths.ask) is None
    paths.ask.write_bytes(whole + b" " * (1 << 17))
    assert read(paths.ask) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(whole)
    paths.ask.unlink()
    paths.ask.symlink_to(elsewhere)
    assert read(paths.ask) is None
    paths.ask.unlink()
    os.mkfifo(paths.ask)
    assert read(paths.ask) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    assert read_ask(path) is None
    assert read_said(path) is None


def test_a_file_that_is_too_large_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(OSError, match="too large"):
        open_plain(tmp_path / "large", 10)


def test_it_says_once_what_can_capture(captures: AskedCaptures, recorder: Recorder, trace: Scripted) -> None:
    captures.look()
    assert recorder.facts["captures"] == {"torch": None, "kernels": "no GPU"}


def test_an_ask_is_recorded_answered_and_only_once(
    captures: AskedCaptures, paths: Paths, recorder: Recorder, trace: Scripted
) -> None:
    write(paths.ask, ask(seconds=0.1))
    captures.look()
    done = said(paths, "done")
    assert (done.id, done.notes) == (IDS[0], ("as told",))
    assert done.begin_ns < done.end_ns
    assert len(done.clocks) == 2
    assert paths.result.read_text() == "result"
    assert trace.calls == ["start", "stop", "save", "forget"]
    for _ in range(3):
        captures.look()
    assert trace.calls == ["start", "stop", "save", "forget"]
    wait(lambda: not IN_USE.locked())  # a moment after the answer


def test_steps_end_it(captures: AskedCaptures, paths: Paths, recorder: Recorder, trace: Scripted) -> None:
    write(paths.ask, ask(steps=3))
    captures.look()
    said(paths, "recording")
    for _ in range(3):
        recorder.begin(1, 1, time.monotonic_ns())
    assert said(paths, "done").steps == 3


def test_too_few_steps_are_noted(captures: AskedCaptures, paths: Paths, trace: Scripted) -> None:
    write(paths.ask, ask(steps=3, seconds=0.1))
    captures.look()
    assert "0 instead of 3 steps" in said(paths, "done").notes[0]


def test_a_recording_at_its_limit_ends_early(captures: AskedCaptures, paths: Paths, trace: Scripted) -> None:
    trace.early = "ended early: full"
    write(paths.ask, ask())
    captures.look()
    assert said(paths, "done").notes == ("ended early: full", "as told")


@pytest.mark.parametrize("where", ["start", "look", "stop", "save"])
@pytest.mark.parametrize(
    "error", [CuptiError("it broke"), OSError(28, "No space left"), ZeroDivisionError("x")]
)
def test_whatever_fails_is_one_reason_and_leaves_no_result(
    captures: AskedCaptures,
    paths: Paths,
    trace: Scripted,
    failures: list[Exception],
    where: str,
    error: Exception,
) -> None:
    trace.failing[where] = error
    write(paths.ask, ask(seconds=0.1))
    captures.look()
    assert said(paths, "failed").reason == str(error)
    assert not paths.result.exists()
    wait(lambda: not IN_USE.locked())
    assert failures == ([error] if isinstance(error, ZeroDivisionError) else [])
    if where != "start":
        assert trace.calls[-1] == "forget"


def test_a_tool_that_cannot_says_why(captures: AskedCaptures, paths: Paths, trace: Scripted) -> None:
    write(paths.ask, ask(tool="kernels"))
    captures.look()
    assert said(paths, "failed").reason == "no GPU"
    assert trace.calls == []


def test_nothing_is_recorded_that_could_not_be_left_for_the_agent(
    captures: AskedCaptures, paths: Paths, trace: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(f_blocks=64 << 20, f_bavail=39 << 20, f_frsize=1)
    monkeypatch.setattr(asked_capture, "Room", lambda folder: Room(folder, lambda folder: free))
    write(paths.ask, ask(tool="torch"))
    captures.look()
    assert "39 MiB free, and 32 MiB stay free" in said(paths, "failed").reason
    assert trace.calls == []


def test_the_engines_own_profiler_comes_first(
    recorder: Recorder, paths: Paths, trace: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = AskedCaptures(recorder, profiler=lambda: "vLLM's own runs", failed=lambda where, error: None)
    write(paths.ask, ask())
    captures.look()
    assert said(paths, "failed").reason == "vLLM's own runs"
    assert recorder.facts["captures"] == {"torch": "vLLM's own runs", "kernels": "no GPU"}
    monkeypatch.setattr(asked_capture, "profiling", lambda: "a torch profiler runs in this process")
    captures = AskedCaptures(recorder, profiler=lambda: None, failed=lambda where, error: None)
    write(paths.ask, ask(1))
    captures.look()
    wait(lambda: (found := read_said(paths.said)) and found.id == IDS[1])
    assert said(paths, "failed").reason == "a torch profiler runs in this process"


def test_what_can_capture_is_said_anew_when_a_profiler_begins_or_ends(
    captures: AskedCaptures, paths: Paths, recorder: Recorder, trace: Scripted
) -> None:
    torch = pytest.importorskip("torch")
    captures.look()
    assert recorder.facts["captures"]["torch"] is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        captures.look()
        assert recorder.facts["captures"]["torch"] == "a torch profiler runs in this process"
        write(paths.ask, ask())
        captures.look()
        assert said(paths, "failed").reason == "a torch profiler runs in this process"
        assert trace.calls == []
    wait(lambda: not capturing())  # a moment after the answer; nothing is said until then
    captures.look()
    assert recorder.facts["captures"]["torch"] is None


def test_a_recording_of_ours_is_not_said_to_be_anothers(
    captures: AskedCaptures, paths: Paths, recorder: Recorder
) -> None:
    pytest.importorskip("torch", minversion="2.7")
    captures.look()
    before = recorder.facts["captures"]
    assert before["torch"] is None
    write(paths.ask, ask(seconds=0.5))
    captures.look()
    wait(lambda: asked_capture.profiling())
    captures.look()
    assert recorder.facts["captures"] == before
    said(paths, "done", "failed")


def test_another_recording_of_ours_is_waited_for_and_then_named(
    captures: AskedCaptures, paths: Paths, trace: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked_capture, "_IN_USE_SECONDS", 0.1)
    with IN_USE:
        write(paths.ask, ask())
        captures.look()
        assert "kernel window is open" in said(paths, "failed").reason


def test_removing_the_ask_calls_it_off_and_nothing_is_left(
    captures: AskedCaptures, paths: Paths, trace: Scripted
) -> None:
    write(paths.ask, ask())
    captures.look()
    said(paths, "recording")
    paths.ask.unlink()
    captures.look()
    wait(lambda: trace.calls[-1:] == ["forget"])
    wait(lambda: not IN_USE.locked())
    wait(lambda: list(paths.ask.parent.iterdir()) == [])
    assert "save" not in trace.calls


def test_ending_it_keeps_what_was_recorded(captures: AskedCaptures, paths: Paths, trace: Scripted) -> None:
    write(paths.ask, ask(steps=1000))
    captures.look()
    said(paths, "recording")
    write(paths.ask, ask(steps=1000, end=True))
    captures.look()
    assert said(paths, "done").notes == ("as told",)
    assert paths.result.read_text() == "result"
    # An end that comes when it is over already begins nothing.
    wait(lambda: not IN_USE.locked())
    write(paths.ask, ask(end=True))
    for _ in range(3):
        captures.look()
    assert trace.calls == ["start", "stop", "save", "forget"]


def test_an_end_that_comes_before_the_ask_was_seen_records_a_moment(
    captures: AskedCaptures, paths: Paths, trace: Scripted
) -> None:
    write(paths.ask, ask(end=True))
    captures.look()
    said(paths, "done")
    assert trace.calls == ["start", "stop", "save", "forget"]


def test_another_ask_takes_its_place(captures: AskedCaptures, paths: Paths, trace: Scripted) -> None:
    write(paths.ask, ask())
    captures.look()
    said(paths, "recording")
    write(paths.ask, ask(1, seconds=0.1))

    def second() -> bool:
        captures.look()
        found = read_said(paths.said)
        return found is not None and (found.id, found.state) == (IDS[1], "done")

    wait(second)


def test_a_recorder_that_closes_ends_it(recorder: Recorder, paths: Paths, trace: Scripted) -> None:
    captures = AskedCaptures(recorder, profiler=lambda: None, failed=lambda where, error: None)
    write(paths.ask, ask())
    captures.look()
    said(paths, "recording")
    recorder.closed = True
    assert "ended" in said(paths, "failed").reason


@pytest.mark.parametrize("stacks", [False, True])
def test_torch_records_what_another_thread_does(
    captures: AskedCaptures, paths: Paths, recorder: Recorder, stacks: bool
) -> None:
    torch = pytest.importorskip("torch", minversion="2.7")
    over = threading.Event()

    def engine() -> None:
        x = torch.randn(8, 8)
        while not over.is_set():
            recorder.begin(1, 1, time.monotonic_ns())
            x = (x @ x).clamp_(-1, 1)
            time.sleep(0.001)

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        write(paths.ask, ask(steps=30, stacks=stacks))
        captures.look()
        done = said(paths, "done", "failed")
    finally:
        over.set()
        thread.join()
    assert done.state == "done", done.reason
    held = [note for note in done.notes if "lock" in note]
    assert bool(held) == stacks
    events = json.loads(gzip.decompress(paths.result.read_bytes()))["traceEvents"]
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert len(products) >= 25
    assert {event["tid"] for event in products} == {thread.native_id}
    assert not asked_capture.profiling()


def test_a_profiler_that_comes_in_between_ends_it_and_is_left_alone(
    captures: AskedCaptures, paths: Paths
) -> None:
    torch = pytest.importorskip("torch", minversion="2.7")
    write(paths.ask, ask())
    captures.look()
    said(paths, "recording")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as theirs:
        torch.ones(3).add(1)
        assert "another torch profiler" in said(paths, "failed").reason
    assert theirs is not None
    assert not paths.result.exists()


def test_memory_is_known(tmp_path: Path) -> None:
    assert resident_bytes() > 1 << 20
    assert (available_bytes() or 0) > 1 << 20
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    assert available_bytes(meminfo, tmp_path) == 8 << 10
    for name, content in (("max", "5000"), ("current", "4000"), ("stat", "anon 1\ninactive_file 500\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert available_bytes(meminfo, tmp_path) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 8 << 10
    assert available_bytes(tmp_path / "missing", tmp_path) is None
