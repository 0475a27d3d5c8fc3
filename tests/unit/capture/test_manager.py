"""Captures on their way: who may begin, what fails how, and that every state survives a restart."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from llmprobe.capture import nsys_tool, run
from llmprobe.capture.condition import Live
from llmprobe.capture.manager import Manager, Refused, choose_tool
from llmprobe.capture.nsys import Nsys
from llmprobe.capture.nsys_tool import NsysTool, ask_why_not_nsys
from llmprobe.capture.session import Capture, Request
from llmprobe.capture.stopped import wait_for_signs
from llmprobe.capture.store import RAW, Store
from llmprobe.capture.tool import Worker
from llmprobe.capture.tools import nsys_session, tools_of
from llmprobe.compute.stall import Bound, Stall

from .managed import NEVER, ask, left, until
from .scripted_engine import ScriptedEngine
from .scripted_nsys import PretendedServer, ScriptedNsys

DATA = Path(__file__).parents[2] / "data"


def test_one_at_a_time_and_the_refusal_names_the_other(manager: Manager) -> None:
    first = manager.request("g", "s", ask(NEVER))
    with pytest.raises(Refused) as caught:
        manager.request("g", "s", ask())
    assert (caught.value.kind, caught.value.other) == ("busy", first.id)
    assert len(manager.all()) == 1


def test_one_that_has_just_ended_is_in_nobodys_way(
    store: Store, directory: Path, nsys: ScriptedNsys, server: PretendedServer
) -> None:
    next_ones: list[Capture] = []
    refused: list[Refused] = []

    def entered(capture: Capture) -> None:
        if capture.state == "failed" and not next_ones:
            try:
                next_ones.append(manager.request("g", "s", ask(NEVER)))
            except Refused as error:
                refused.append(error)

    manager = Manager(store, directory, server, max_seconds=60.0, entered=entered)
    try:
        manager.request("g", "s", ask())
        deadline = time.monotonic() + 120
        while not next_ones:
            assert refused == [] and time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Refused) as caught:
            manager.request("g", "s", ask(NEVER))
        assert caught.value.other == next_ones[0].id
        assert manager.delete(next_ones[0].id, wait_seconds=30)
    finally:
        manager.close()


def test_a_queued_one_waits_and_follows(manager: Manager) -> None:
    first = manager.request("g", "s", ask(NEVER))
    second = manager.request("g", "s", ask(NEVER), queue=True)
    third = manager.request("g", "s", ask(), queue=True)
    assert manager.delete(second.id)
    assert {capture.id for capture in manager.all()} == {first.id, third.id}
    assert manager.get(third.id).state == "pending"
    assert manager.delete(first.id)
    until(manager, third, "failed")  # what the script exports is no database


def test_a_queue_has_an_end(manager: Manager) -> None:
    for _ in range(9):
        manager.request("g", "s", ask(NEVER), queue=True)
    with pytest.raises(Refused) as caught:
        manager.request("g", "s", ask(NEVER), queue=True)
    assert caught.value.kind == "rate"


def test_captures_may_not_begin_all_the_time(manager: Manager) -> None:
    for _ in range(30):
        assert manager.delete(manager.request("g", "s", ask(NEVER)).id)
    with pytest.raises(Refused) as caught:
        manager.request("g", "s", ask(NEVER))
    assert caught.value.kind == "rate"


@pytest.mark.parametrize("wrong", [ask("$(reboot)"), ask(seconds=61.0)])
def test_what_is_not_allowed_leaves_nothing(manager: Manager, store: Store, wrong: Request) -> None:
    with pytest.raises(Refused) as caught:
        manager.request("g", "s", wrong)
    assert caught.value.kind == "invalid"
    assert not store.root.exists()


def test_a_directory_that_cannot_be_used_is_refused_by_name(directory: Path, server: PretendedServer) -> None:
    with pytest.raises(Refused, match="LLMPROBE_CAPTURE_DIR") as caught:
        Manager(Store(Path("/sys/captures"), 1), directory, server, max_seconds=60).request("g", "s", ask())
    assert caught.value.kind == "unavailable"


def test_a_failed_start_ends_with_the_words_of_nsys(
    manager: Manager, nsys: ScriptedNsys, store: Store
) -> None:
    nsys.does("fail-start", "The disk is on fire.\nSorry.\n")
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert failed.reason == "nsys start failed (exit status 1): The disk is on fire. / Sorry."
    assert left(store, failed) == {"capture.json"}
    assert manager.ended[("nsys", "failed")] == 1


@pytest.mark.parametrize(
    ("what", "words", "reason"),
    [
        ("fail-stop", "Connection refused\n", "nsys stop failed (exit status 1): Connection refused"),
        ("silent-stop", "", "wrote no capture.nsys-rep"),
        ("fail-export", "Importer crashed\n", "Importer crashed"),
        ("silent-export", "", "nsys exported nothing"),
    ],
)
def test_whatever_fails_says_why_and_cleans_up(
    manager: Manager, nsys: ScriptedNsys, store: Store, what: str, words: str, reason: str
) -> None:
    nsys.does(what, words)
    (Path(nsys.session.temporary) / "nsys-report-1234.qdstrm").write_text("secrets")
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert reason in (failed.reason or "")
    assert left(store, failed) == {"capture.json"}
    # Nothing is taken from an nsys that still records: it would die of it. Who runs the server ends that.
    assert bool(list(Path(nsys.session.temporary).iterdir())) == (what == "fail-stop")


def test_nothing_is_taken_from_an_nsys_that_writes(nsys: ScriptedNsys) -> None:
    written = Path(nsys.session.temporary) / "nsys-report-1234.qdstrm"
    written.write_text("recorded")
    nsys.set_state("Generation")
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(Nsys(nsys.session).abandon()))
    thread.start()
    time.sleep(0.5)
    assert written.exists()
    nsys.set_state("Launched")
    thread.join(60)
    assert ended == [True]
    assert not written.exists()


def a_stall(since_ns: int) -> Stall:
    return Stall("step", since_ns, 12.3, Bound(10.0, "at least 10 s"), 7, "decode", 16, ())


@pytest.mark.parametrize(("graphs", "known"), [("node", "records them by node"), ("graph", "start it anew")])
def test_a_capture_that_fails_tells_of_a_server_that_hangs(
    manager: Manager, nsys: ScriptedNsys, server: PretendedServer, directory: Path, graphs: str, known: str
) -> None:
    dataclasses.replace(nsys.session, trace=("cuda",), cuda_graph_trace=graphs).write(directory)
    nsys.does("silent-stop")
    capture = manager.request("g", "s", ask(seconds=0.5))
    until(manager, capture, "recording")
    server.now = Live({"rank0": {"decode": 1}}, working=True, stalls=((0, a_stall(time.monotonic_ns())),))
    reason = until(manager, capture, "failed").reason or ""
    assert "wrote no capture.nsys-rep" in reason
    assert "has not got on: rank 0 has been in step 7 (decode, 16 tokens) for 12 s. " in reason
    assert known in reason.split(" for 12 s. ")[1]


def test_who_cancels_does_not_wait_for_signs_of_a_hang(
    manager: Manager, nsys: ScriptedNsys, server: PretendedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "wait_for_signs", functools.partial(wait_for_signs, seconds=1e9))
    nsys.does("silent-stop")
    server.now = Live({"rank0": {"decode": 1}}, working=True)
    capture = manager.request("g", "s", ask(seconds=0.5))
    until(manager, capture, "importing")
    server.now = Live({"rank0": {"decode": 1}}, working=True)
    while server.looks_since(server.now) < 3:
        time.sleep(0.05)
    assert manager.delete(capture.id, wait_seconds=30.0)


def test_a_capture_of_a_server_that_hung_before_is_not_blamed(
    manager: Manager, nsys: ScriptedNsys, server: PretendedServer
) -> None:
    nsys.does("silent-stop")
    server.now = Live(working=True, stalls=((0, a_stall(time.monotonic_ns() - 60_000_000_000)),))
    reason = until(manager, manager.request("g", "s", ask()), "failed").reason or ""
    assert "wrote no capture.nsys-rep" in reason
    assert "got on" not in reason


def test_a_capture_that_is_done_notes_a_server_that_hangs_once(
    manager: Manager, nsys: ScriptedNsys, server: PretendedServer
) -> None:
    nsys.exports(DATA / "nsys" / "transformers_cpu.sqlite")
    capture = manager.request("g", "s", ask(seconds=0.5))
    until(manager, capture, "recording")
    server.now = Live(working=True, stalls=((0, a_stall(time.monotonic_ns())),))
    done = until(manager, capture, "done")
    assert len([note for note in done.notes if "has not got on: rank 0" in note]) == 1


def test_a_file_that_is_no_database_is_one_line(manager: Manager, store: Store) -> None:
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert (failed.reason or "").startswith("the capture cannot be analysed: ")
    assert "\n" not in (failed.reason or "")
    assert "Traceback" not in (failed.reason or "")
    assert left(store, failed) == {"capture.json"}


def test_the_seconds_of_nsys_are_known_only_roughly_and_it_is_said(
    manager: Manager, nsys: ScriptedNsys, server: PretendedServer, store: Store, directory: Path
) -> None:
    nsys.exports(DATA / "nsys" / "transformers_cpu.sqlite")
    engine = ScriptedEngine(directory)
    server.processes.append(engine.worker)
    try:
        engine._step()  # long before
        time.sleep(0.05)
        capture = manager.request("g", "s", ask(seconds=0.5))
        until(manager, capture, "recording")
        for _ in range(3):
            engine._step()
        done = until(manager, capture, "done")
    finally:
        engine.close()
    live = json.loads((store.folder(done.id) / "live.json").read_text())
    assert live["meanwhile"]["rough"] is True
    (rank,) = live["meanwhile"]["ranks"]
    assert rank["figures"]["decode"]["steps"] == 3
    assert live["comparison"]["same_seconds"] is False


def test_nsys_that_is_not_there_is_said(manager: Manager, nsys: ScriptedNsys) -> None:
    Path(nsys.session.nsys).unlink()
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "cannot be started: No such file" in (failed.reason or "")


def test_a_session_that_is_gone_is_never_started(manager: Manager, nsys: ScriptedNsys) -> None:
    nsys.does("gone")
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "session is gone" in (failed.reason or "")
    assert nsys.calls() == []  # `nsys start` would have made a new one


def test_somebody_elses_recording_is_left_alone(manager: Manager, nsys: ScriptedNsys) -> None:
    nsys.set_state("Collection")
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "somebody else records" in (failed.reason or "")
    assert nsys.state() == "Collection"


def test_a_condition_that_never_comes_fails_in_time(manager: Manager, nsys: ScriptedNsys) -> None:
    failed = until(manager, manager.request("g", "s", ask(NEVER, wait=0.2)), "failed")
    assert NEVER in (failed.reason or "")
    assert nsys.calls() == []


def test_a_server_that_vanishes_ends_its_capture(
    manager: Manager, server: PretendedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_GONE_SECONDS", 0.2)
    capture = manager.request("g", "s", ask(NEVER))
    server.now = None
    assert until(manager, capture, "failed").reason == "the server s is gone"


def test_a_disk_that_fills_ends_the_recording_early(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, nsys: ScriptedNsys
) -> None:
    monkeypatch.setattr(run, "STOP_FREE_BYTES", 1 << 60)
    ended = until(manager, manager.request("g", "s", ask(seconds=60.0)), "failed")
    assert "ended early" in ended.notes[0]
    assert nsys.calls()[1].startswith("stop")


def test_what_was_recorded_is_kept_though_the_shared_directory_is_full(
    manager: Manager, nsys: ScriptedNsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    nsys.exports(DATA / "nsys" / "transformers_cpu.sqlite")
    capture = manager.request("g", "s", ask(seconds=0.5))
    while manager.get(capture.id).progress is None:
        time.sleep(0.01)

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nsys_tool, "write_json", full)
    until(manager, capture, "done")


def test_a_recording_that_grows_too_large_is_ended_early(manager: Manager, nsys: ScriptedNsys) -> None:
    (Path(nsys.session.temporary) / "nsys-report-1.qdstrm").write_bytes(bytes(600 << 10))
    ended = until(manager, manager.request("g", "s", ask(seconds=60.0)), "failed")
    assert "LLMPROBE_CAPTURE_MAX_BYTES" in ended.notes[0]


def test_cancelling_stops_the_recording_and_removes_everything(
    manager: Manager, nsys: ScriptedNsys, store: Store
) -> None:
    capture = manager.request("g", "s", ask(seconds=60.0))
    until(manager, capture, "recording")
    while manager.get(capture.id).progress is None:
        time.sleep(0.01)
    assert manager.delete(capture.id, wait_seconds=30)
    assert nsys.state() == "Launched"
    assert not store.folder(capture.id).exists()
    with pytest.raises(KeyError):
        manager.get(capture.id)


def test_a_recording_is_ended_though_the_temporary_folder_is_gone(
    manager: Manager, nsys: ScriptedNsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "removed"))
    capture = manager.request("g", "s", ask(seconds=60.0))
    until(manager, capture, "recording")
    while manager.get(capture.id).progress is None:
        time.sleep(0.01)
    assert manager.delete(capture.id, wait_seconds=30)
    assert nsys.state() == "Launched"


@pytest.mark.parametrize("broken", ["abandon", "forget"])
def test_an_error_while_one_ends_is_not_the_end_of_the_next(
    manager: Manager, nsys: ScriptedNsys, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(self: NsysTool) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    nsys.does("fail-stop", "as told")
    with monkeypatch.context() as patch:
        patch.setattr(NsysTool, broken, fails)
        first = manager.request("g", "s", ask())
        assert "as told" in (until(manager, first, "failed").reason or "")
    nsys.set_state("Launched")
    second = manager.request("g", "s", ask())
    assert "as told" in (until(manager, second, "failed").reason or "")


def test_an_error_of_ours_at_the_end_does_not_stop_the_queue(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = manager.request("g", "s", ask(NEVER))
    second = manager.request("g", "s", ask(NEVER, wait=0.1), queue=True)

    def fails(self: run.Run, state: str, reason: str) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    monkeypatch.setattr(run.Run, "_end", fails)
    manager._runs[first.id].cancelled.set()
    assert NEVER in (until(manager, second, "failed").reason or "")
    assert "ZeroDivisionError" in (manager.get(first.id).reason or "")


def test_a_recording_that_cannot_be_ended_is_left_to_whoever_runs_the_server(
    manager: Manager, nsys: ScriptedNsys, directory: Path
) -> None:
    nsys.does("fail-stop", "Connection refused\n")
    until(manager, manager.request("g", "s", ask()), "failed")
    assert nsys.state() == "Collection"
    assert nsys.session.dead_man(directory).exists()


def test_nothing_from_a_request_is_on_a_command_line(manager: Manager, nsys: ScriptedNsys) -> None:
    label = "--output=/etc/passwd; $(touch /tmp/x) `id`"
    request = Request("nsys", 0.1, None, label=label)
    capture = until(manager, manager.request("g", "s$(id)", request), "failed")
    folder = manager.store.folder(capture.id)
    assert nsys.calls()[:2] == [
        "start --session=llmprobe-0123456789ab --sample=none --cpuctxsw=none --force-overwrite=true "
        f"-o {folder}/capture",
        "stop --session=llmprobe-0123456789ab",
    ]


def worker(rank: int, **refusals: str | None) -> Worker:
    return Worker(Path(f"/journals/worker-{rank}.journal"), f"rank{rank}", rank, refusals)


def test_tools_say_what_they_lack(directory: Path, nsys: ScriptedNsys) -> None:
    workers = [worker(0, torch=None, kernels="no GPU"), worker(1, torch="busy", kernels="no GPU")]
    said = tools_of(directory, "g", workers)
    assert said == {"nsys": None, "torch": "rank1: busy", "kernels": "rank0: no GPU"}
    assert tools_of(directory, "g", workers[:1])["kernels"] == "no GPU"
    assert "no process" in (tools_of(directory, "g", [])["torch"] or "")
    assert "not said" in (tools_of(directory, "g", [worker(0)])["torch"] or "")


def test_the_deepest_tool_that_is_available_is_taken(directory: Path, nsys: ScriptedNsys) -> None:
    both, light = worker(0, torch=None, kernels=None), worker(0, torch="busy", kernels=None)
    assert choose_tool(directory, "g", "auto", [both]) == "nsys"
    assert choose_tool(directory, "g", "kernels", [both]) == "kernels"
    assert choose_tool(directory, "another", "auto", [both]) == "torch"
    assert choose_tool(directory, "another", "auto", [light]) == "kernels"
    careful = dataclasses.replace(both, unsafe={"torch": "it would stop the engine"})
    assert choose_tool(directory, "another", "auto", [both, careful]) == "kernels"
    assert choose_tool(directory, "another", "torch", [careful]) == "torch"
    alone = dataclasses.replace(careful, refusals={"torch": None, "kernels": "no GPU"})
    assert choose_tool(directory, "another", "auto", [alone]) == "torch"
    with pytest.raises(Refused, match="llmprobe run --nsys"):
        choose_tool(directory, "another", "nsys", [both])
    with pytest.raises(Refused, match=r"nsys: .*llmprobe run --nsys.*; torch: busy; kernels: no GPU"):
        choose_tool(directory, "another", "auto", [worker(0, torch="busy", kernels="no GPU")])


@pytest.mark.parametrize(("broken", "said"), [("gone", "session is gone"), ("Shutdown", "has failed")])
def test_an_nsys_that_is_no_more_is_refused_and_shown_until_it_is_back(
    directory: Path, nsys: ScriptedNsys, manager: Manager, broken: str, said: str
) -> None:
    one = worker(0, torch=None, kernels=None)
    nsys.does(broken) if broken == "gone" else nsys.set_state(broken)
    with pytest.raises(Refused, match=said) as caught:
        choose_tool(directory, "g", "nsys", [one])
    assert caught.value.kind == "unavailable"
    assert said in (tools_of(directory, "g", [one])["nsys"] or "")
    assert choose_tool(directory, "g", "auto", [one]) == "torch"
    assert said in (until(manager, manager.request("g", "s", ask()), "failed").reason or "")
    nsys.undo("gone")
    nsys.set_state("Launched")
    assert choose_tool(directory, "g", "nsys", [one]) == "nsys"
    assert tools_of(directory, "g", [one])["nsys"] is None
    nsys.session.lose(directory, "it broke")
    nsys.session.forget(directory)
    assert not list((directory / "nsys").iterdir())
    nsys.session.lose(directory, "it broke")  # by an agent that asked nsys while the server ended
    assert not list((directory / "nsys").iterdir())


def test_nsys_is_asked_about_a_session_once_at_a_time(directory: Path, nsys: ScriptedNsys) -> None:
    nsys.set_state("Shutdown")
    nsys.does("hang")
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(ask_why_not_nsys(directory, "g")))
    thread.start()
    deadline = time.monotonic() + 60
    while not nsys.asked():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ask_why_not_nsys(directory, "g") is None  # nothing is noted yet
    assert (nsys.asked(), found) == (1, [])
    nsys.undo("hang")
    thread.join(60)
    assert "has failed" in (found[0] or "")
    assert ask_why_not_nsys(directory, "g") == found[0]
    assert nsys.asked() == 2


@pytest.mark.parametrize(
    ("trace", "said", "known"),
    [
        (["cuda", "nvtx"], {}, "node"),  # older notes did not say it: it was always so
        (["nvtx"], {}, None),
        (["cuda"], {"cuda_graph_trace": "graph"}, "graph"),
    ],
)
def test_how_graphs_are_recorded_is_noted(
    directory: Path, nsys: ScriptedNsys, trace: list[str], said: dict[str, str], known: str | None
) -> None:
    path = nsys.session.note(directory)
    note = json.loads(path.read_text())
    del note["cuda_graph_trace"]
    path.write_text(json.dumps({**note, "trace": trace, **said}))
    assert nsys_session(directory, "g") == {"trace": trace, "cuda_graph_trace": known}
    assert nsys_session(directory, "another") is None


@pytest.mark.parametrize(("graphs", "noted"), [("node", True), ("graph", False)])
def test_a_capture_of_graphs_by_node_notes_what_that_costs(
    manager: Manager, nsys: ScriptedNsys, directory: Path, graphs: str, noted: bool
) -> None:
    dataclasses.replace(nsys.session, trace=("cuda",), cuda_graph_trace=graphs).write(directory)
    nsys.exports(DATA / "nsys" / "transformers_cpu.sqlite")
    done = until(manager, manager.request("g", "s", ask()), "done")
    assert any("by node" in note for note in done.notes) == noted


def test_some_ranks_are_not_for_nsys(directory: Path, nsys: ScriptedNsys) -> None:
    workers = [worker(0, torch=None, kernels=None), worker(1, torch="busy", kernels=None)]
    assert choose_tool(directory, "g", "auto", workers, [0, 1]) == "nsys"
    assert choose_tool(directory, "g", "auto", workers, [0]) == "torch"
    assert choose_tool(directory, "g", "auto", workers, [1]) == "kernels"
    for wanted, ranks, said in (
        ("nsys", [1], "every process"),
        ("torch", [2], "there are"),
        ("auto", [], "there"),
    ):
        with pytest.raises(Refused, match=said) as caught:
            choose_tool(directory, "g", wanted, workers, ranks)
        assert caught.value.kind == "invalid"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "x; reboot"),
        ("name", "--help"),
        ("nsys", "nsys"),
        ("temporary", "tmp"),
        ("group", "other"),
        ("trace", 1),
    ],
)
def test_a_note_that_is_not_ours_is_no_session(
    directory: Path, nsys: ScriptedNsys, key: str, value: object
) -> None:
    import json

    path = nsys.session.note(directory)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert tools_of(directory, "g", [])["nsys"] is not None


def test_raw_files_are_readable_by_their_owner_only(
    manager: Manager, store: Store, nsys: ScriptedNsys
) -> None:
    nsys.does("fail-export", "x")
    seen: list[int] = []
    capture = manager.request("g", "s", ask())
    raw = store.folder(capture.id) / RAW
    while manager.get(capture.id).live:
        if raw.exists():
            seen.append(raw.stat().st_mode & 0o777)
        time.sleep(0.002)
    assert store.folder(capture.id).stat().st_mode & 0o777 == 0o700
    assert not raw.exists()


def test_every_state_that_is_entered_is_told_once_it_is_on_disk(
    store: Store, directory: Path, nsys: ScriptedNsys, server: PretendedServer
) -> None:
    told: list[tuple[str, str]] = []

    def entered(capture: Capture) -> None:
        told.append((capture.state, store.read(capture.id).state))

    manager = Manager(store, directory, server, max_seconds=60.0, entered=entered)
    try:
        assert manager.delete(manager.request("g", "s", ask(NEVER)).id)
    finally:
        manager.close()
    assert told == [("pending", "pending"), ("cancelled", "cancelled")]
