"""Captures that engines make themselves, from the request to the files; the engine is scripted here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmprobe.analysis import analyze
from llmprobe.capture import asking, run
from llmprobe.capture.manager import Manager
from llmprobe.capture.session import Capture, Request
from llmprobe.capture.store import Store
from llmprobe.record.asked import Paths
from llmprobe.record.layout import Clock

from .managed import left, until
from .scripted_engine import SECRET, ScriptedEngine
from .scripted_nsys import PretendedServer


@pytest.fixture
def nsys() -> None:
    """The server was not started under it."""


@pytest.fixture
def engines(directory: Path, server: PretendedServer) -> Iterator[Callable[..., ScriptedEngine]]:
    """Starts engines, which the server then has as its processes."""
    started: list[ScriptedEngine] = []

    def start(rank: int = 0, clock: Clock = Clock.CUDA) -> ScriptedEngine:
        started.append(ScriptedEngine(directory, rank, clock))
        server.processes.append(started[-1].worker)
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "captures", 1 << 24, least_free_bytes=0)


def ask(tool: str = "kernels", steps: int | None = None, ranks: tuple[int, ...] | None = None) -> Request:
    seconds = None if steps else 30.0
    return Request(tool, seconds, steps, ranks=ranks)  # type: ignore[arg-type]


def test_kernels_become_a_report_with_phases(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engine = engines()
    done = until(manager, manager.request("g", "s", ask()), "done")
    assert list(done.times) == ["pending", "recording", "importing", "analysing", "done"]
    assert left(store, done) == {
        "capture.json",
        "live.json",
        "report.json",
        "report.txt",
        "kernels-rank0.npz",
    }
    assert set(manager.store.files(done.id)) == left(store, done) - {"capture.json"}
    folder = store.folder(done.id)
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    report = json.loads((folder / "report.json").read_text())
    assert report["source"]["path"] == "kernels-rank0.npz"
    (gpu,) = report["gpus"]
    assert (gpu["name"], gpu["kernels"], gpu["copies"]) == ("GPU 0 (NVIDIA H100)", 4, 4)
    phases = {(row["name"], row["part"]): row for row in report["phases"]}
    decode = phases[("decode", None)]
    assert (decode["steps"], decode["tokens"]) == (4, 8)
    assert decode["busy_ratio"] == 1.0
    assert decode["sync_gap_ratio"] > 0.5  # half of the time between what ran, and the copies are exposed
    cut = "f::{lambda at /…:3}"  # names of folders are nobody's business
    assert {row["name"] for row in report["kernels"]} == {"gemm(int)", "memcpy HtoD", cut}
    with np.load(folder / "kernels-rank0.npz") as file:  # compressed: its bytes would not show it
        assert all(SECRET.encode() not in file[name].tobytes() for name in file.files)
    assert engine.left == []
    assert manager.ended[("kernels", "done")] == 1
    again = analyze(folder / "kernels-rank0.npz").to_json()
    assert again["gpus"] == report["gpus"]


def test_engines_take_up_steps_however_long_captures_may_last(
    store: Store, directory: Path, server: PretendedServer, engines: Callable[..., ScriptedEngine]
) -> None:
    engine = engines()
    manager = Manager(store, directory, server, max_seconds=86400)
    try:
        until(manager, manager.request("g", "s", ask(steps=4)), "done")
    finally:
        manager.close()
    assert engine.asks[0].seconds == manager.max_seconds == 3600


def test_one_that_is_larger_than_all_may_be_is_there_and_says_so(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engines()
    until(manager, manager.request("g", "s", ask()), "done")
    store.max_bytes = 4000
    done = until(manager, manager.request("g", "s", ask()), "done")
    assert any("LLMPROBE_CAPTURE_MAX_BYTES" in note for note in done.notes)
    assert store.read(done.id).notes == done.notes
    assert "kernels-rank0.npz" in store.files(done.id)
    assert [capture.id for capture in manager.all()] == [done.id]
    assert manager.delete(manager.request("g", "s", ask()).id)
    assert manager.all() == []


def test_a_torch_trace_is_scrubbed_and_has_the_journals_steps(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engines()
    done = until(manager, manager.request("g", "s", ask("torch")), "done")
    folder = store.folder(done.id)
    assert left(store, done) >= {"torch-rank0.json.gz", "report.json"}
    import gzip

    content = gzip.decompress((folder / "torch-rank0.json.gz").read_bytes())
    assert SECRET.encode() not in content
    assert not [path for path in folder.iterdir() if SECRET.encode() in path.read_bytes()]
    report = json.loads((folder / "report.json").read_text())
    decode = next(row for row in report["phases"] if row["name"] == "decode" and row["part"] is None)
    assert (decode["steps"], decode["tokens"], decode["gpu"]) == (4, 8, "GPU 0 (NVIDIA H100)")


def test_stacks_are_kept_for_who_wants_them_all_the_same(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engine = engines()
    request = Request("torch", 30.0, None, torch_stacks=True)
    done = until(manager, manager.request("g", "s", request), "done")
    assert "torch-rank0.raw.json.gz" in left(store, done)
    assert (engine.asks[0].cpu, engine.asks[0].stacks) == (False, True)
    with store.open(done.id, "torch-rank0.raw.json.gz"):
        pass


def test_a_cpu_device_shows_its_steps_without_a_gpu(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engines(clock=Clock.HOST)
    done = until(manager, manager.request("g", "s", ask("torch")), "done")
    content = json.loads((store.folder(done.id) / "report.json").read_text())
    assert content["gpus"]  # the script's kernels; what matters is that the ranges are the host's
    import gzip

    events = json.loads(gzip.decompress((store.folder(done.id) / "torch-rank0.json.gz").read_bytes()))
    marks = [event for event in events["traceEvents"] if event["name"] == "llmprobe:decode"]
    assert [event["cat"] for event in marks] == ["user_annotation"] * 4
    (until_when,) = [event for event in events["traceEvents"] if event["ph"] == "i"]
    assert until_when["name"] == "llmprobe:recorded_until"
    assert until_when["ts"] >= max(event["ts"] + event["dur"] for event in marks)


@pytest.mark.parametrize("tool", ["kernels", "torch"])
def test_several_processes_are_one_report(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store, tool: str
) -> None:
    for rank in (0, 1):
        engines(rank)
    done = until(manager, manager.request("g", "s", ask(tool)), "done")
    files = {name for name in left(store, done) if name.startswith(tool)}
    suffix = "npz" if tool == "kernels" else "json.gz"
    assert files == {f"{tool}-rank{rank}.{suffix}" for rank in (0, 1)}
    report = json.loads((store.folder(done.id) / "report.json").read_text())
    assert [gpu["name"] for gpu in report["gpus"]] == [f"rank{r}: GPU 0 (NVIDIA H100)" for r in (0, 1)]
    assert {row["gpu"]: row["steps"] for row in report["phases"] if row["part"] is None} == {
        "rank0: GPU 0 (NVIDIA H100)": 4,
        "rank1: GPU 0 (NVIDIA H100)": 4,
    }


def test_only_the_ranks_that_are_wanted_are_asked(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    first, second = engines(0), engines(1)
    done = until(manager, manager.request("g", "s", ask(ranks=(1,))), "done")
    assert (len(first.asks), len(second.asks)) == (0, 1)
    assert "kernels-rank1.npz" in left(store, done)
    assert "kernels-rank0.npz" not in left(store, done)


def test_the_request_reaches_the_engine_as_numbers_and_words(
    manager: Manager, engines: Callable[..., ScriptedEngine]
) -> None:
    engine = engines()
    request = Request("torch", None, 7, label="; reboot", torch_cpu=True)
    done = until(manager, manager.request("g", "s$(id)", request), "done")
    (asked,) = engine.asks
    assert (asked.id, asked.tool, asked.steps, asked.seconds) == (done.id, "torch", 7, 60.0)
    assert (asked.cpu, asked.stacks) == (True, False)


def test_notes_of_the_engine_are_the_captures(
    manager: Manager, engines: Callable[..., ScriptedEngine]
) -> None:
    engines().notes = ("ended early: full",)
    done = until(manager, manager.request("g", "s", ask()), "done")
    assert done.notes[0] == "rank0: ended early: full"


@pytest.mark.parametrize("tool", ["kernels", "torch"])
def test_live_gaps_beside_it_are_those_of_the_recorded_steps(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store, tool: str
) -> None:
    engine = engines()
    engine._step()  # long before: none of the capture's
    done = until(manager, manager.request("g", "s", ask(tool)), "done")
    live = json.loads((store.folder(done.id) / "live.json").read_text())
    (rank,) = live["meanwhile"]["ranks"]
    decode = rank["figures"]["decode"]
    assert (rank["name"], decode["steps"]) == ("rank0", 4)
    assert 0 < decode["sync_gap_ratio"] < 0.4  # half a millisecond of each before sampling
    found = live["comparison"]
    assert found["same_seconds"]
    assert live["meanwhile"]["rough"] is False
    assert found["phases"]["decode"]["live"] == pytest.approx(decode["sync_gap_ratio"])
    # The device was idle inside the steps, which the step clock cannot see.
    assert (found["disagree"], found["trusted"]) == (True, "capture")
    assert done.notes == (found["why"],)


@pytest.mark.parametrize("breaks", ["meanwhile", "kept_steps", "compare"])
@pytest.mark.parametrize("error", [KeyError("kernels"), ValueError("x\ny"), OSError(5, "I/O error")])
def test_live_figures_that_cannot_be_had_cost_no_capture(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store, monkeypatch: pytest.MonkeyPatch,
    breaks: str, error: Exception,
) -> None:  # fmt: skip
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, breaks, broken)
    engines()
    done = until(manager, manager.request("g", "s", ask()), "done")
    assert {"report.json", "kernels-rank0.npz"} <= left(store, done)
    (note,) = (note for note in done.notes if type(error).__name__ in note)
    assert "\n" not in note


def test_what_an_engine_refuses_is_the_reason(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engine = engines()
    engine.does = "refuse"
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert failed.reason == "rank0: as told"
    assert left(store, failed) == {"capture.json"}
    assert engine.left == []


def test_what_cannot_be_captured_by_then_is_not_asked(
    manager: Manager, engines: Callable[..., ScriptedEngine]
) -> None:
    engine = engines()
    engine.refusals["kernels"] = "an engine died in a window"
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert failed.reason == "rank0: an engine died in a window"
    assert engine.asks == []


def test_an_engine_that_does_not_answer_fails_it(
    manager: Manager, engines: Callable[..., ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_ANSWER_SECONDS", 0.3)
    engine = engines()
    engine.does = "nothing"
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "did not answer" in (failed.reason or "")
    assert engine.left == []


@pytest.mark.parametrize("all_of_it", [True, False])
def test_an_engine_that_dies_fails_it(
    manager: Manager,
    engines: Callable[..., ScriptedEngine],
    server: PretendedServer,
    monkeypatch: pytest.MonkeyPatch,
    all_of_it: bool,
) -> None:
    monkeypatch.setattr(asking, "_GONE_SECONDS", 0.2)
    monkeypatch.setattr(run, "_GONE_SECONDS", 0.2)
    engine, other = engines(0), engines(1)
    engine.does = other.does = "hang"
    capture = manager.request("g", "s", ask())
    until(manager, capture, "recording")
    while not (engine.asks and other.asks):
        time.sleep(0.01)
    if all_of_it:
        server.now, server.processes[:] = None, []
    else:
        del server.processes[0]
    reason = until(manager, capture, "failed").reason or ""
    assert "ended while it was captured" in reason or "is gone" in reason


def test_cancelling_calls_it_off_and_removes_everything(
    manager: Manager, engines: Callable[..., ScriptedEngine], store: Store
) -> None:
    engine = engines()
    engine.does = "hang"
    capture = manager.request("g", "s", ask())
    until(manager, capture, "recording")
    while not any(name.endswith(".said") for name in engine.left):
        time.sleep(0.01)
    assert manager.delete(capture.id, wait_seconds=30)
    assert engine.left == []
    assert not store.folder(capture.id).exists()


@pytest.mark.parametrize("tool", ["kernels", "torch"])
def test_a_disk_that_fills_ends_what_the_engine_records_and_keeps_it(
    manager: Manager,
    engines: Callable[..., ScriptedEngine],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
) -> None:
    running = [engines(0), engines(1)]
    for engine in running:
        engine.does = "until ended"
    capture = manager.request("g", "s", ask(tool))
    until(manager, capture, "recording")
    while not all(engine.asks for engine in running):
        time.sleep(0.01)
    monkeypatch.setattr(run, "STOP_FREE_BYTES", 1 << 60)
    done = until(manager, capture, "done")
    assert done.times["importing"] - done.times["recording"] < 30  # what was asked for
    assert "ended early" in done.notes[0]
    assert "report.json" in left(store, done)
    for engine in running:
        first, last = engine.asks
        assert (first.id, first.end, last.end) == (last.id, False, True)
        assert engine.left == []


@pytest.mark.parametrize("content", [b"", b"not a window", b'{"schema": 1}\n'])
@pytest.mark.parametrize("tool", ["kernels", "torch"])
def test_a_result_that_is_damaged_is_one_line(
    manager: Manager,
    engines: Callable[..., ScriptedEngine],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    content: bytes,
) -> None:
    engine = engines()
    path = Paths.of(engine.recorder.writer.path).result
    for name in ("_kernels", "_torch"):
        monkeypatch.setattr(engine, name, lambda *arguments: path.write_bytes(content))
    failed = until(manager, manager.request("g", "s", ask(tool)), "failed")
    assert (failed.reason or "").startswith("the capture cannot be analysed: ")
    assert "Traceback" not in (failed.reason or "")
    assert left(store, failed) == {"capture.json"}


def test_a_link_for_a_result_leads_nowhere(
    manager: Manager, engines: Callable[..., ScriptedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    (tmp_path / "secret").write_text(SECRET)
    path = Paths.of(engine.recorder.writer.path).result
    monkeypatch.setattr(engine, "_kernels", lambda *arguments: path.symlink_to(tmp_path / "secret"))
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "cannot be fetched" in (failed.reason or "")


WAY = ("recording", "importing")


@pytest.mark.parametrize("reached", range(3))
def test_the_next_agent_goes_on_from_what_is_on_disk(
    make: Callable[[], Manager],
    engines: Callable[..., ScriptedEngine],
    store: Store,
    directory: Path,
    reached: int,
) -> None:
    engine = engines()
    request = ask()
    capture = Capture(store.new_id(), str(directory), "s", "g", request, times={"pending": time.time()})
    for state in WAY[:reached]:
        capture = capture.enter(state, time.time())  # type: ignore[arg-type]
    store.create(capture)
    if reached:  # the agent before this one had asked
        asking.AskingTool(
            "kernels",
            capture.id,
            store.folder(capture.id),
            lambda: [engine.worker],
            seconds=30,
            steps=None,
            interrupted=lambda: False,
        ).start(30, None)
    manager = make()
    manager.resume()
    done = until(manager, capture, "done")
    assert "kernels-rank0.npz" in left(store, done)
    assert engine.left == []


def test_an_agent_that_died_before_it_asked_fails_it(
    make: Callable[[], Manager], engines: Callable[..., ScriptedEngine], store: Store, directory: Path
) -> None:
    engines()
    capture = Capture(store.new_id(), str(directory), "s", "g", ask(), times={"pending": time.time()})
    store.create(capture.enter("recording", time.time()))
    manager = make()
    manager.resume()
    assert "was not asked" in (until(manager, capture, "failed").reason or "")


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_what_an_agent_before_had_asked_of_processes_that_are_not_found_again_is_called_off(
    make: Callable[[], Manager],
    engines: Callable[..., ScriptedEngine],
    store: Store,
    directory: Path,
    server: PretendedServer,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    engine = engines()
    engine.does = "hang"
    capture = Capture(store.new_id(), str(directory), "s", "g", ask(), times={"pending": time.time()})
    store.create(capture.enter("recording", time.time()))
    asking.AskingTool(
        "kernels",
        capture.id,
        store.folder(capture.id),
        lambda: [engine.worker],
        seconds=30,
        steps=None,
        interrupted=lambda: False,
    ).start(30, None)
    while not engine.asks:
        time.sleep(0.01)
    server.processes.clear()
    monkeypatch.setattr(asking, "_GONE_SECONDS", 60.0 if how == "cancelled" else 0.0)
    manager = make()
    manager.resume()
    if how == "cancelled":
        assert manager.delete(capture.id, wait_seconds=60.0)
    else:
        until(manager, capture, "failed")
    assert engine.left == []


def test_what_nobody_waits_for_any_more_is_swept(
    make: Callable[[], Manager], engines: Callable[..., ScriptedEngine], store: Store, directory: Path
) -> None:
    engine = engines()
    engine.does = "hang"
    tool = asking.AskingTool(
        "kernels",
        "20261126-104500-abcdef",
        store.root,
        lambda: [engine.worker],
        seconds=30,
        steps=None,
        interrupted=lambda: False,
    )
    tool.start(30, None)
    while not engine.asks:
        time.sleep(0.01)
    asking.sweep_asks(directory, {"20261126-104500-abcdef"})
    assert engine.left
    make().resume()
    assert engine.left == []


def test_a_capture_survives_as_data() -> None:
    request = Request("torch", 1.0, None, ranks=(0, 3), torch_cpu=True)
    capture = Capture("20261126-104500-abcdef", "o", "s", "g", request, times={"pending": 1.0})
    assert Capture.from_json(json.loads(json.dumps(capture.to_json()))) == capture


def test_steps_reach_a_little_before_their_mark_but_not_into_each_other() -> None:
    from llmprobe.capture.worker_files import ranges_of
    from llmprobe.record.layout import STEP

    steps = np.zeros(3, STEP)
    steps["phase"] = [0, 1, 1]
    steps["e0"], steps["e3"] = [1000, 2000, 2010], [1900, 2008, 3000]
    steps["e1"] = steps["e2"] = steps["e3"]
    found = ranges_of(steps, 50)
    steps["flags"] = [0, 8, 2]  # the second's parts were not stamped, the third has no sampling
    assert len(found) == len(ranges_of(steps, 50)) + 1
    whole = found[:3]
    assert whole["begin"].tolist() == [950, 1950, 2009]
    assert whole["end"].tolist() == [1900, 2008, 3000]
