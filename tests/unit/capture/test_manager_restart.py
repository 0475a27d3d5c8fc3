"""What an agent that starts anew makes of the captures and nsys sessions that the one before it left."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmprobe.capture import run
from llmprobe.capture.boot import boot_id
from llmprobe.capture.condition import Live
from llmprobe.capture.manager import Manager
from llmprobe.capture.nsys import Nsys
from llmprobe.capture.session import Capture
from llmprobe.capture.store import RAW, Store

from .managed import NEVER, ask, left, until
from .scripted_nsys import PretendedServer, ScriptedNsys


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


def test_one_that_nsys_may_yet_begin_is_left_to_whoever_runs_the_server(
    make: Callable[[], Manager], store: Store, directory: Path, nsys: ScriptedNsys
) -> None:
    """The agent was killed while nsys was about to: what comes of that nobody waits for."""
    capture = kept_in(store, directory, "recording")
    nsys.session.dead_man(directory).write_text("{}")
    manager = make()
    manager.resume()
    assert "does not record" in (until(manager, capture, "failed").reason or "")
    assert nsys.session.dead_man(directory).exists()


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


def test_the_time_that_nsys_takes_to_begin_is_not_taken_from_the_recording(
    store: Store,
    directory: Path,
    nsys: ScriptedNsys,
    server: PretendedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture = dataclasses.replace(kept_in(store, directory), request=ask(seconds=0.5))
    ahead = [0.0]
    start = Nsys.start

    def slow(self: Nsys, folder: Path) -> None:
        start(self, folder)
        ahead[0] = 3600.0

    monkeypatch.setattr(Nsys, "start", slow)
    one = run.Run(
        capture, store, directory, server, max_seconds=60, clock=lambda: time.monotonic() + ahead[0]
    )
    one.go()
    assert "cannot be analysed" in (one.capture.reason or "")
    clocks = one.capture.clocks
    assert clocks["importing"] - clocks["recording"] >= 3600.5


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


def test_leaving_waits_for_no_recording_that_nsys_writes(
    make: Callable[[], Manager], store: Store, nsys: ScriptedNsys
) -> None:
    nsys.set_state("Generation")
    manager = make()
    capture = manager.request("g", "s", ask())
    until_asked(nsys)
    manager.close()
    assert not manager.busy()
    assert store.read(capture.id).state == "pending"


def until_asked(nsys: ScriptedNsys) -> None:
    deadline = time.monotonic() + 60
    while nsys.asked() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def grow_old(note: Path) -> None:
    os.utime(note, (1.0, 1.0))


def test_what_a_killed_run_left_is_swept(
    make: Callable[[], Manager], nsys: ScriptedNsys, directory: Path
) -> None:
    nsys.does("gone")
    grow_old(nsys.session.note(directory))
    make().resume()
    deadline = time.monotonic() + 120
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
