"""The housekeeping thread: nothing that fails in it ends it, and readers learn that the probe gave up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprobe.agent.files import switch
from llmprobe.hooks import session
from llmprobe.hooks.probe import Probe
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings


class Rounds:
    """In the place of `time`: the thread goes round so many times, and its probe is gone."""

    def __init__(self, probe: Probe, count: int) -> None:
        self._probe, self._count = probe, count
        self.monotonic = lambda: 0.0
        self.thread_time_ns = time.thread_time_ns

    def sleep(self, seconds: float) -> None:
        self._count -= 1
        if not self._count:
            self._probe._recorders, self._probe._adopted = {}, []


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    made = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(tmp_path), "LLMPROBE_AGENT": "off"}))
    assert made.arm("worker", lambda: {"role": "frontend"}) is not None  # of which no captures are asked
    yield made
    made.disarm()


def run(probe: Probe, monkeypatch: pytest.MonkeyPatch, rounds: int) -> Recorder:
    recorder = probe.recorder
    assert recorder is not None
    monkeypatch.setattr(session, "time", Rounds(probe, rounds))
    session._Housekeeping(probe, recorder).run()
    return recorder


@pytest.mark.swallows
def test_a_status_that_cannot_be_told_does_not_end_the_thread(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**status: bool) -> None:
        raise ValueError("mmap closed or invalid")

    written: list[int] = []
    other = Recorder.open(probe.settings.directory, "frontend", {"role": "frontend"})
    monkeypatch.setattr(other, "status", broken)
    probe.adopt(other)
    probe.writers.append(lambda: written.append(1))
    recorder = run(probe, monkeypatch, 3)
    assert len(written) == 3
    assert probe.guard.errors["housekeeping.status"] >= 1
    for opened in (recorder, other):
        opened.close(remove=True)


def test_a_switch_is_followed_by_the_processes_it_names(probe: Probe) -> None:
    """Servers of one group have no more in common than a script that started both."""
    front = Recorder.open(probe.settings.directory, "frontend", {"role": "frontend"})
    other = Recorder.open(probe.settings.directory, "frontend", {"role": "frontend"})
    probe.adopt(front)
    recorder = probe.recorder
    assert recorder is not None
    keeping = session._Housekeeping(probe, recorder)
    for armed, named, follows in (
        (False, [other], False),
        (False, [front, other], True),
        (True, [other], False),
        (True, None, True),
    ):
        before = probe.enabled
        switch(
            probe.settings.directory,
            armed,
            None if named is None else ["one"],
            None if named is None else [one.writer.path for one in named],
        )
        keeping._follow_switch()
        assert probe.enabled is (armed if follows else before)
    other.close(remove=True)


@pytest.mark.parametrize(("role", "where"), [("worker", "thread_ns_step"), ("frontend", "thread_ns_request")])
def test_what_the_thread_itself_takes_is_told_with_the_totals(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, role: str, where: str
) -> None:
    recorder = Recorder.open(probe.settings.directory, role, {"role": role})
    reader = JournalReader(recorder.writer.path, recorder.writer)

    def work() -> None:  # so much of this thread's processor time, and something whose totals are due
        until = time.thread_time_ns() + 2_000_000
        while time.thread_time_ns() < until:
            pass
        if role == "worker":
            now = time.monotonic_ns()
            counts = {"requests": 1, "prefill_requests": 0, "prompt_tokens": 0, "decode_tokens": 1}
            recorder.step(recorder.begin(2, 1, now), now, 2, 0, 0, (now,) * 4, **counts)
        else:
            recorder.tokens(generated=1, later=True)

    begun = time.thread_time_ns()
    probe._recorders = {role: recorder}
    probe.writers.append(work)
    run(probe, monkeypatch, 3)
    used = time.thread_time_ns() - begun
    # As of the round before the last one, in the time of this thread, which did other things before.
    assert begun + 4_000_000 <= reader.counters()[where] <= begun + used
    other = {"thread_ns_step", "thread_ns_request"} - {where}
    assert reader.counters()[other.pop()] == 0
    reader.close()
    recorder.close(remove=True)


@pytest.mark.swallows
def test_readers_learn_that_the_probe_gave_up(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    probe.guard.inert = True
    recorder = run(probe, monkeypatch, 1)
    reader = JournalReader(recorder.writer.path, recorder.writer)
    load = reader.load()
    assert load is not None and load.inert
    reader.close()
    recorder.close(remove=True)


#: Ends right after a round of the thread, so long before the next one.
_ENDS_SOON = """
import multiprocessing, os, sys, threading
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import _Housekeeping
from llmprobe.settings import Settings

def main():
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": sys.argv[1], "LLMPROBE_AGENT": "off"}))
    came, ran = threading.Event(), []

    def write():
        print(os.getpid(), *ran, flush=True)
        came.set()

    probe.writers.append(write)
    probe.on_armed.append(lambda recorder: _Housekeeping(probe, recorder).start())
    probe.arm("worker", lambda: {"role": "frontend"})
    came.wait()
    ran.append("the last step")
    if not os.fork():
        sys.exit()
    os.wait()

if sys.argv[2] == "program":
    main()
else:
    child = multiprocessing.get_context(sys.argv[2]).Process(target=main)
    child.start()
    child.join()
"""


@pytest.mark.parametrize("kind", ["program", "fork"])
def test_a_program_or_worker_that_ends_leaves_nothing_unwritten(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ENDS_SOON, str(tmp_path), kind],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    rounds = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert rounds[-1][1:] == ["the last step"], done.stderr
    assert len({pid for pid, *_ in rounds}) == 1, "the child that it forked writes nothing"


def test_a_probe_is_armed_as_long_as_its_process_has_a_journal(probe: Probe) -> None:
    assert probe.armed
    child = os.fork()
    if not child:  # whose journals are its parent's
        os._exit(int(probe.armed or probe.recorder is not None))
    assert os.waitpid(child, 0)[1] == 0
    assert probe.armed
    probe.disarm()
    assert not probe.armed


def test_a_child_writes_to_no_journal_of_its_parent_and_may_have_one_of_its_own(probe: Probe) -> None:
    """A second ``vllm.LLM`` forks its engine from a process that has a front end."""
    parents = probe.recorder
    assert parents is not None
    reader = JournalReader(parents.writer.path, parents.writer)
    probe._arming.acquire()  # as another thread of the parent may have it just then
    child = os.fork()
    if child:
        probe._arming.release()
    else:
        signal.alarm(60)
        status = 1
        try:
            parents.tokens(0, 1000)  # as a hook does that still knows it
            own = probe.arm("frontend", lambda: {"role": "frontend"})
            if (
                own is not None
                and own is not parents
                and probe.recorder is own
                and probe.recorders() == [own]
            ):
                status = 0
                own.close(remove=True)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert reader.counters()["generated_tokens"] == 0
    reader.close()
    parents.tokens(0, 7)
    assert probe.recorder is parents


def test_a_program_that_ends_waits_for_the_round_that_is_under_way(probe: Probe) -> None:
    """Two at once would write the same twice, and the one of a daemon thread is cut off."""
    recorder = probe.recorder
    assert recorder is not None
    keeping = session._Housekeeping(probe, recorder)
    inside, go_on = threading.Event(), threading.Event()
    running: list[str] = []

    def write() -> None:
        running.append(threading.current_thread().name)
        inside.set()
        go_on.wait(300)
        running.append(threading.current_thread().name)

    probe.writers.append(write)
    first = threading.Thread(target=keeping._write, name="round")
    first.start()
    inside.wait(300)
    last = threading.Thread(target=keeping._write_last, name="end")
    last.start()
    last.join(0.05)
    go_on.set()
    for thread in (first, last):
        thread.join()
    assert running == ["round", "round", "end", "end"]


@pytest.mark.swallows
def test_the_wrappers_go_whatever_fails_before(probe: Probe) -> None:
    """A step that cannot be given up: ``llmprobe off`` is not asked for twice."""

    class Host:
        def step(self) -> None:
            pass

    def refuse() -> None:
        raise RuntimeError("the profiler is gone")

    original = Host.step
    probe.patch(Host, "step", lambda function, patch: lambda self: function(self))
    probe.on_paused.insert(0, refuse)
    probe.remove_patches()
    assert Host.step is original
    assert sum(probe.guard.errors.values()) == 1


@pytest.mark.swallows
def test_what_was_kept_when_the_probe_gives_up_is_written_once(probe: Probe) -> None:
    recorder = probe.recorder
    assert recorder is not None
    reader = JournalReader(recorder.writer.path, recorder.writer)
    keeping = session._Housekeeping(probe, recorder)
    written: list[bool] = []
    probe.writers.append(lambda: written.append(probe.active))
    keeping._write()
    recorder.tokens(0, 7, later=True)
    probe.guard.inert = True
    for _ in range(3):
        keeping._write()
    assert written == [True, False]
    assert reader.counters()["generated_tokens"] == 7
    reader.close()
