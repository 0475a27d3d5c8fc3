"""Captures on their way: who may begin, what fails how, and that every state survives a restart."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from llmprobe.capture import nsys_tool, run
from llmprobe.capture.manager import Manager, Refused
from llmprobe.capture.nsys import Nsys
from llmprobe.capture.nsys_tool import NsysTool
from llmprobe.capture.session import Capture, Request
from llmprobe.capture.store import RAW, Store, StoreError

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
    with pytest.raises(Refused, match="8 captures wait already") as caught:  # behind the one whose turn it is
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


def test_what_fails_while_the_disk_is_full_says_so(
    manager: Manager, nsys: ScriptedNsys, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    nsys.does("silent-stop", "")
    monkeypatch.setattr(run, "STOP_FREE_BYTES", 1 << 62)
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert f"{store.root} has" in (failed.reason or "")
    assert "MiB free: make room" in (failed.reason or "")
    waited = Request("nsys", 1.0, None, when="sync_gap_ratio > 0.99", wait_seconds=0.1)
    failed = until(manager, manager.request("g", "s", waited), "failed")
    assert "did not come true" in (failed.reason or "")
    assert "make room" not in (failed.reason or "")  # it had recorded nothing yet


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


def test_an_nsys_that_begins_is_not_cut_short(manager: Manager, nsys: ScriptedNsys) -> None:
    nsys.does("hang-start")
    capture = manager.request("g", "s", ask(seconds=60.0))
    while nsys.state() != "ConfiguredLaunched":
        time.sleep(0.01)
    assert not manager.delete(capture.id, wait_seconds=0.5)
    nsys.undo("hang-start")
    assert manager.delete(capture.id, wait_seconds=60.0)
    assert [call.split()[0] for call in nsys.calls()] == ["start", "stop"]
    assert nsys.state() == "Launched"


def test_an_nsys_that_was_cut_short_as_it_began_is_said(
    manager: Manager, nsys: ScriptedNsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nsys.settled, "__defaults__", (0.2,))
    nsys.set_state("ConfiguredLaunched")
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "cannot record any more: start the server again" in (failed.reason or "")
    assert nsys.calls() == []


def test_somebody_elses_recording_is_left_alone(manager: Manager, nsys: ScriptedNsys) -> None:
    nsys.set_state("Collection")
    failed = until(manager, manager.request("g", "s", ask()), "failed")
    assert "somebody else records" in (failed.reason or "")
    assert nsys.state() == "Collection"


def test_a_condition_that_never_comes_fails_in_time(manager: Manager, nsys: ScriptedNsys) -> None:
    failed = until(manager, manager.request("g", "s", ask(NEVER, wait=0.2)), "failed")
    assert NEVER in (failed.reason or "")
    assert (failed.reason or "").endswith(" was not known in all that time")  # the server shows no figures
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


def test_one_that_was_removed_at_the_second_try_is_not_known_any_more(
    manager: Manager, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that for a moment takes neither the capture's end nor its removal."""
    capture = manager.request("g", "s", ask(NEVER))
    remove, write, tries = store.remove, store.write, []

    def remove_later(capture_id: str) -> None:
        tries.append(capture_id)
        if len(tries) == 1:
            raise StoreError("read-only")
        remove(capture_id)

    def write_live(capture: Capture) -> None:
        if not capture.live:
            raise OSError(errno.EROFS, "read-only")
        write(capture)

    monkeypatch.setattr(store, "remove", remove_later)
    monkeypatch.setattr(store, "write", write_live)
    assert manager.delete(capture.id, wait_seconds=30)
    assert len(tries) == 2
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

    refused = until(manager, manager.request("g", "s", ask()), "failed")
    assert "records" in (refused.reason or "")
    assert nsys.session.dead_man(directory).exists()


def test_a_queued_one_that_is_cancelled_leaves_the_end_of_the_one_that_runs(
    manager: Manager, nsys: ScriptedNsys, directory: Path
) -> None:
    runs = manager.request("g", "s", ask(seconds=60.0))
    until(manager, runs, "recording")
    while manager.get(runs.id).progress is None:
        time.sleep(0.01)
    waits = manager.request("g", "s", ask(seconds=60.0), queue=True)
    assert manager.delete(waits.id)
    assert nsys.session.dead_man(directory).exists()
    assert manager.delete(runs.id, wait_seconds=30)
    assert not nsys.session.dead_man(directory).exists()


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


@pytest.mark.parametrize(("graphs", "noted"), [("node", True), ("graph", False)])
def test_a_capture_of_graphs_by_node_notes_what_that_costs(
    manager: Manager, nsys: ScriptedNsys, directory: Path, graphs: str, noted: bool
) -> None:
    dataclasses.replace(nsys.session, trace=("cuda",), cuda_graph_trace=graphs).write(directory)
    nsys.exports(DATA / "nsys" / "transformers_cpu.sqlite")
    done = until(manager, manager.request("g", "s", ask()), "done")
    assert any("by node" in note for note in done.notes) == noted


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
