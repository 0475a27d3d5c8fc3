"""Captures on their way: who may begin, what fails how, and that every state survives a restart."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmprobe.capture import run
from llmprobe.capture.boot import boot_id
from llmprobe.capture.condition import Live
from llmprobe.capture.manager import Manager, Refused, choose_tool
from llmprobe.capture.nsys_tool import NsysTool
from llmprobe.capture.session import FINAL, Capture, Request
from llmprobe.capture.store import RAW, Store
from llmprobe.capture.tool import Worker
from llmprobe.capture.tools import tools_of

from .scripted_engine import ScriptedEngine
from .scripted_nsys import PretendedServer, ScriptedNsys

DATA = Path(__file__).parents[2] / "data"
NEVER = "sync_gap_ratio > 9"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def nsys(tmp_path: Path, directory: Path) -> ScriptedNsys:
    return ScriptedNsys(tmp_path / "nsys", directory)


@pytest.fixture
def server() -> PretendedServer:
    return PretendedServer()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "captures", 1 << 20, least_free_bytes=0)


@pytest.fixture
def make(
    store: Store, directory: Path, nsys: ScriptedNsys, server: PretendedServer
) -> Iterator[Callable[[], Manager]]:
    """Makes managers over the same disk; all are closed at the end."""
    made: list[Manager] = []

    def manager() -> Manager:
        made.append(Manager(store, directory, server, max_seconds=60.0))
        return made[-1]

    yield manager
    for one in made:
        one.close()


@pytest.fixture
def manager(make: Callable[[], Manager]) -> Manager:
    return make()


def ask(
    when: str = "now", seconds: float | None = 0.1, steps: int | None = None, wait: float = 60.0
) -> Request:
    return Request("nsys", seconds, steps, when, wait)


def until(manager: Manager, capture: Capture, *states: str) -> Capture:
    deadline = time.monotonic() + 30
    while (now := manager.get(capture.id)).state not in states:
        assert now.state not in FINAL, now
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    while now.state in FINAL and manager.busy():  # the end is noted a moment later
        assert time.monotonic() < deadline, now
        time.sleep(0.01)
    return now


def left(store: Store, capture: Capture) -> set[str]:
    return {path.name for path in store.folder(capture.id).iterdir()}


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
        deadline = time.monotonic() + 30
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
    assert not list(Path(nsys.session.temporary).iterdir())


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


def kept_in(store: Store, directory: Path, *states: str) -> Capture:
    """A capture that an agent left on disk in the last of these states."""
    capture = Capture(
        id=store.new_id(),
        owner=str(directory),
        server="s",
        group="g",
        request=ask(NEVER, wait=0.3),
        times={"pending": time.time()},
    )
    for state in states:
        capture = capture.enter(state, time.time())  # type: ignore[arg-type]
    store.create(capture)
    return capture


WAY = ("recording", "importing", "analysing")


@pytest.mark.parametrize("reached", range(4))
@pytest.mark.parametrize("recording", [True, False])
def test_after_a_restart_every_live_state_comes_to_an_end(
    make: Callable[[], Manager],
    store: Store,
    directory: Path,
    nsys: ScriptedNsys,
    reached: int,
    recording: bool,
) -> None:
    capture = kept_in(store, directory, *WAY[:reached])
    if recording:
        nsys.record_into(store.folder(capture.id))
    manager = make()
    manager.resume()
    ended = until(manager, capture, "failed")
    assert ended.reason
    assert left(store, ended) == {"capture.json"}
    if reached in (1, 2):  # a recording of ours goes on for nobody
        assert nsys.state() == "Launched"


def test_a_recording_is_taken_up_where_it_was(
    make: Callable[[], Manager], store: Store, directory: Path, nsys: ScriptedNsys
) -> None:
    capture = kept_in(store, directory, "recording")
    nsys.record_into(store.folder(capture.id))
    manager = make()
    manager.resume()
    until(manager, capture, "failed")
    assert [call.split()[0] for call in nsys.calls()][:1] == ["stop"]


def test_a_recording_that_is_being_written_is_waited_for(
    make: Callable[[], Manager], store: Store, directory: Path, nsys: ScriptedNsys
) -> None:
    capture = kept_in(store, directory, "recording", "importing")
    nsys.set_state("Generation")
    manager = make()
    manager.resume()
    time.sleep(0.5)
    assert manager.get(capture.id).state == "importing"
    (store.folder(capture.id) / RAW).write_text("report")
    nsys.set_state("Launched")
    assert "cannot be analysed" in (until(manager, capture, "failed").reason or "")
    assert [call.split()[0] for call in nsys.calls()] == ["export"]


@pytest.mark.parametrize("set_by", [-3600.0, 3600.0])
def test_whoever_sets_the_clock_makes_no_recording_longer_or_shorter(
    store: Store, directory: Path, nsys: ScriptedNsys, server: PretendedServer, set_by: float
) -> None:
    capture = kept_in(store, directory)
    capture = dataclasses.replace(capture, request=ask(seconds=0.5))
    wall = [0.0]

    def entered(capture: Capture) -> None:
        if capture.state == "recording":
            wall[0] = set_by

    one = run.Run(
        capture, store, directory, server, max_seconds=60, entered=entered, wall=lambda: time.time() + wall[0]
    )
    thread = threading.Thread(target=one.go, name="llmprobe-run")
    thread.start()
    thread.join(30)
    try:
        assert "cannot be analysed" in (one.capture.reason or "")
    finally:
        one.cancelled.set()
        thread.join()
    clocks = one.capture.clocks
    assert clocks["importing"] - clocks["recording"] >= 0.5


@pytest.mark.parametrize("set_by", [-3600.0, 3600.0])
def test_a_recording_that_is_taken_up_lasts_as_long_as_asked_for(
    make: Callable[[], Manager], store: Store, directory: Path, nsys: ScriptedNsys, set_by: float
) -> None:
    capture = dataclasses.replace(kept_in(store, directory), request=ask(seconds=0.5), boot=boot_id())
    begun = time.monotonic()
    capture = capture.enter("recording", time.time() + set_by, clock=begun)
    store.write(capture)
    nsys.record_into(store.folder(capture.id))
    manager = make()
    manager.resume()
    ended = until(manager, capture, "failed")
    assert "cannot be analysed" in (ended.reason or "")
    assert ended.clocks["importing"] - begun >= 0.5


def test_steps_are_counted_from_the_first_look_that_saw_the_server(
    make: Callable[[], Manager],
    store: Store,
    directory: Path,
    nsys: ScriptedNsys,
    server: PretendedServer,
) -> None:
    capture = dataclasses.replace(kept_in(store, directory), request=ask(seconds=None, steps=5))
    capture = capture.enter("recording", time.time())
    store.write(capture)
    nsys.record_into(store.folder(capture.id))
    server.now = None
    manager = make()
    manager.resume()
    while manager.get(capture.id).progress is None:
        time.sleep(0.01)
    time.sleep(0.3)
    server.now = Live({"rank0": {"decode": 1000}, "rank1": {"decode": 7}})
    while server.looks_since(server.now) < 2:
        time.sleep(0.01)
    assert manager.get(capture.id).state == "recording"
    server.now = Live({"rank0": {"decode": 1000}, "rank1": {"decode": 12}})
    ended = until(manager, capture, "failed")
    assert "cannot be analysed" in (ended.reason or "")
    assert ended.notes == ()


def test_the_time_at_which_llmprobe_run_ends_a_recording_is_not_set_by_anybody(
    manager: Manager, nsys: ScriptedNsys, directory: Path
) -> None:
    capture = manager.request("g", "s", ask(seconds=60.0))
    until(manager, capture, "recording")
    while not (path := nsys.session.dead_man(directory)).exists():
        time.sleep(0.01)
    assert json.loads(path.read_text())["until"] <= time.monotonic() + 90
    assert manager.delete(capture.id, wait_seconds=30)


@pytest.mark.parametrize("ids", ["0123", "3210"])
def test_the_queue_is_in_the_same_order_after_a_restart(
    make: Callable[[], Manager], store: Store, directory: Path, nsys: ScriptedNsys, ids: str
) -> None:
    """Though all were asked for within a second, so that their ids say nothing of it."""
    now, clock = time.time(), time.monotonic()
    kept = []
    for number, end in enumerate(ids):
        capture = Capture(
            id=f"20261126-160000-{end * 6}",
            owner=str(directory),
            server="s",
            group="g",
            request=ask(NEVER, seconds=60.0),
            times={"pending": now - number / 10},  # the clock was being set back
            clocks={"pending": clock - 1 + number / 10},
            boot=boot_id(),
        )
        kept.append(capture.enter("recording", now, clock=clock) if number == 1 else capture)
        store.create(kept[-1])
    nsys.record_into(store.folder(kept[1].id))
    manager = make()
    manager.resume()
    assert [run.capture.id for run in manager._queues["g"]] == [kept[at].id for at in (1, 0, 2, 3)]
    for capture in kept:
        manager.delete(capture.id, wait_seconds=30)


def test_leaving_leaves_a_capture_for_the_next_agent(
    make: Callable[[], Manager], store: Store, server: PretendedServer
) -> None:
    first = make()
    capture = first.request("g", "s", ask(NEVER))
    first.close()
    assert not first.busy()
    assert store.read(capture.id).state == "pending"
    second = make()
    second.resume()
    assert second.busy()
    assert second.delete(capture.id)


def grow_old(note: Path) -> None:
    os.utime(note, (1.0, 1.0))


def test_what_a_killed_run_left_is_swept(
    make: Callable[[], Manager], nsys: ScriptedNsys, directory: Path
) -> None:
    nsys.does("gone")
    grow_old(nsys.session.note(directory))
    make().resume()
    deadline = time.monotonic() + 30
    while nsys.session.note(directory).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_nsys_that_hangs_keeps_nothing_waiting(
    make: Callable[[], Manager], store: Store, nsys: ScriptedNsys, directory: Path
) -> None:
    waiting = dataclasses.replace(kept_in(store, directory), request=ask(NEVER))
    store.write(waiting)
    nsys.does("hang")
    grow_old(nsys.session.note(directory))
    manager = make()
    manager.resume()
    sweeping = [thread for thread in threading.enumerate() if thread.name == "llmprobe-capture-sweep"]
    assert len(sweeping) == 1, "it is being asked, and not waited for"
    assert manager.get(waiting.id).state == "pending"
    assert manager.busy()
    manager.close()
    assert not sweeping[0].is_alive()
    assert nsys.session.note(directory).exists()


def test_ended_captures_and_those_of_living_agents_are_left_alone(
    make: Callable[[], Manager], store: Store, directory: Path, tmp_path: Path
) -> None:
    done = kept_in(store, directory, *WAY, "done")
    (tmp_path / "other").mkdir()
    others = kept_in(store, tmp_path / "other", "recording")
    orphan = kept_in(store, tmp_path / "removed", "recording")
    manager = make()
    manager.resume()
    assert not manager.busy()
    assert manager.get(done.id) == done
    assert manager.get(others.id) == others
    assert manager.get(orphan.id).reason == "its agent is gone"


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
