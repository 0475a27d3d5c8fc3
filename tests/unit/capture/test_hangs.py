"""What a capture says of a server that stopped getting on while it was recorded."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import pytest

from llmprobe.capture import run
from llmprobe.capture.condition import Live
from llmprobe.capture.manager import Manager
from llmprobe.capture.session import Capture
from llmprobe.capture.stopped import wait_for_signs
from llmprobe.capture.store import Store
from llmprobe.compute.stall import Bound, Stall

from .managed import ask, until
from .scripted_nsys import PretendedServer, ScriptedNsys

DATA = Path(__file__).parents[2] / "data"


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


class StoppedWhileItWrites(PretendedServer):
    """As by torch's profiler, which stops the engine while it puts its trace together."""

    def live(self, capture: Capture) -> Live | None:
        hung = capture.state == "importing"
        return Live(working=True, stalls=((0, a_stall(time.monotonic_ns())),) if hung else ())


def test_a_server_that_gets_on_by_the_end_is_not_said_to_hang(
    store: Store, directory: Path, nsys: ScriptedNsys
) -> None:
    nsys.exports(DATA / "nsys" / "transformers_cpu.sqlite")
    manager = Manager(store, directory, StoppedWhileItWrites(), max_seconds=60.0)
    try:
        done = until(manager, manager.request("g", "s", ask()), "done")
    finally:
        manager.close()
    assert not [note for note in done.notes if "got on" in note]


def test_what_cannot_be_analysed_tells_of_a_hang_too(
    manager: Manager, nsys: ScriptedNsys, server: PretendedServer
) -> None:
    capture = manager.request("g", "s", ask(seconds=0.5))
    until(manager, capture, "recording")
    server.now = Live(working=True, stalls=((0, a_stall(time.monotonic_ns())),))
    reason = until(manager, capture, "failed").reason or ""
    assert "cannot be analysed" in reason
    assert "has not got on: rank 0" in reason
