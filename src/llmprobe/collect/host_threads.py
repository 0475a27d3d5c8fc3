"""The threads of one process as the kernel tells of them: CPU time, waiting for a core, switches.

A process may have hundreds of threads of which a handful work, so those that ran when last seen are read at
each look, the others in turn, and all the sooner while the process uses CPU time that no thread explains.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llmprobe.collect import procfs
from llmprobe.compute.host import ThreadLoad

MAIN = "main"  #: the label of a process's first thread
OTHER = "other"  #: the label of all threads without one of their own

_HOT_THREADS = 16  # read at each look
_COLD_THREADS = 16  # read in turn
_SEARCH_THREADS = 128  # read in turn while CPU time is unexplained
_MOST_THREADS = 2048
_MOST_NAMES = 64
_SAVED_THREADS = 32
_LIST_EVERY = 10  # looks; and whenever the number of threads changed
_UNEXPLAINED_RATIO = 0.05  # of a core


def thread_label(name: str) -> str:
    """A thread's name without what numbers it: ``pt_autograd_0`` and ``pt_autograd_1`` are one label."""
    plain = re.sub(r"[^\w.:+-]+", "_", re.sub(r"[-_.:#/]*\d+", "", name), flags=re.ASCII)
    return plain.strip("_-.:") or OTHER


class _Reading(NamedTuple):
    time_ns: int
    cpu_ns: int
    delay_ns: int | None


class _Booked(NamedTuple):
    """What of a thread is in the totals already; times in nanoseconds."""

    cpu_ns: int
    delay_ns: int | None  # None: the kernel does not count it; likewise
    voluntary: int | None
    involuntary: int | None


_NOTHING = _Booked(0, None, None, None)


class _Thread:
    """One thread as last read, and over the window."""

    def __init__(self, tid: str) -> None:
        self.tid = tid
        self.name = ""
        self.readings: deque[_Reading] = deque()
        self.booked = _NOTHING
        self.cpus_allowed: str | None = None
        self.moved_ns = 0  # CPU time between the last two readings

    def add(self, reading: _Reading, since_ns: int) -> None:
        """Take in a reading, and forget those that the window does not need."""
        self.readings.append(reading)
        while len(self.readings) > 2 and self.readings[1].time_ns <= since_ns:
            self.readings.popleft()

    def load(self, since_ns: int) -> ThreadLoad | None:
        """Its part of the time since ``since_ns``; None if it did not run."""
        if len(self.readings) < 2 or self.readings[-1].time_ns < since_ns:
            return None
        first, last = self.readings[0], self.readings[-1]
        ran, wall = last.cpu_ns - first.cpu_ns, last.time_ns - first.time_ns
        if ran <= 0 or wall <= 0:
            return None
        delay = None
        if first.delay_ns is not None and last.delay_ns is not None:
            delay = min(max(last.delay_ns - first.delay_ns, 0) / wall, 1.0)
        return ThreadLoad(self.name, min(ran / wall, 1.0), delay)


class Threads:
    """All threads of a process. `look` about once a second; it raises OSError once the process is gone."""

    def __init__(self, proc: Path, window_ns: int) -> None:
        """
        Args:
            proc: the process's directory below ``/proc``.
            window_ns: how far `loads` looks back, in nanoseconds.
        """
        self._proc = proc
        self._window_ns = window_ns
        self._threads: dict[str, _Thread] = {}
        self._turn: deque[str] = deque()  # thread ids in the order in which their turn comes
        self._looks = 0
        self._unexplained_ns = 0.0  # CPU time of threads not read yet; fades, because ended ones used it too
        self._saved: dict[str, _Booked] | None = None
        #: Cumulative, since the process began.
        self.voluntary: int | None = None  # None: the kernel does not count it; likewise
        self.involuntary: int | None = None
        self.delay_ns: int | None = None
        self.cpu_ns_by_label: dict[str, int] = {}

    def look(self, now_ns: int, before_ns: int | None, ran_seconds: float, changed: bool) -> None:
        """Read the threads that deserve it.

        Args:
            now_ns: CLOCK_MONOTONIC.
            before_ns: when the look before was; None at the first, which reads all: what threads did
                until then is part of the totals, not of the window.
            ran_seconds: CPU time of the process since then.
            changed: whether the number of threads did.
        """
        directory = os.open(self._proc / "task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            new = self._list(directory) if changed or self._looks % _LIST_EVERY == 0 else []
            self._looks += 1
            if before_ns is None:
                self._read(directory, new, now_ns, None)
                self._saved = None
                return
            hot = sorted(
                (thread for thread in self._threads.values() if thread.moved_ns),
                key=lambda thread: thread.moved_ns,
                reverse=True,
            )
            first = [*new[:_SEARCH_THREADS], *(thread.tid for thread in hot[:_HOT_THREADS])]
            explained = self._read(directory, first, now_ns, before_ns)
            unexplained = self._unexplained_ns / 2 + ran_seconds * 1e9 - explained
            search = unexplained > _UNEXPLAINED_RATIO * (now_ns - before_ns)
            turn = self._next(_SEARCH_THREADS if search else _COLD_THREADS, set(first))
            unexplained -= self._read(directory, turn, now_ns, before_ns)
            self._unexplained_ns = max(unexplained, 0.0)
        finally:
            os.close(directory)

    def loads(self, now_ns: int) -> list[ThreadLoad]:
        """The threads that ran in the window, busiest first."""
        since = now_ns - self._window_ns
        loads = [load for thread in self._threads.values() if (load := thread.load(since))]
        return sorted(loads, key=lambda load: load.cpu_ratio, reverse=True)

    def cores(self, now_ns: int) -> frozenset[int]:
        """Where the threads that ran may run, all together: some engines bind each to a core of its own.

        None of them where the kernel does not say.
        """
        since = now_ns - self._window_ns
        ran = [thread for thread in self._threads.values() if thread.load(since)]
        lists = {thread.cpus_allowed for thread in ran or self._threads.values() if thread.cpus_allowed}
        return frozenset().union(*map(procfs.cpu_list, lists))

    def save(self) -> dict[str, Any]:
        """What `restore` needs: the totals, and how far the busiest threads are in them."""
        busiest = sorted(self._threads.values(), key=lambda thread: thread.booked.cpu_ns, reverse=True)
        return {
            "switches": [self.voluntary, self.involuntary],
            "delay_ns": self.delay_ns,
            "cpu_ns": self.cpu_ns_by_label,
            "threads": {thread.tid: list(thread.booked) for thread in busiest[:_SAVED_THREADS]},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`; before the first `look`."""
        self.voluntary, self.involuntary = (
            None if count is None else int(count) for count in saved["switches"]
        )
        self.delay_ns = None if saved["delay_ns"] is None else int(saved["delay_ns"])
        self.cpu_ns_by_label = {str(name): int(ran) for name, ran in saved["cpu_ns"].items()}
        self._saved = {str(tid): _Booked(*values) for tid, values in saved["threads"].items()}

    def _list(self, directory: int) -> list[str]:
        """Bring the threads up to date; returns those that are new."""
        there = os.listdir(directory)[:_MOST_THREADS]
        new = [tid for tid in there if tid not in self._threads]
        ended = set(self._threads).difference(there)
        for tid in ended:
            del self._threads[tid]
        if ended:
            self._turn = deque(tid for tid in self._turn if tid not in ended)
        for tid in new:
            self._threads[tid] = _Thread(tid)
        self._turn.extend(new)
        return new

    def _next(self, number: int, but: set[str]) -> list[str]:
        """The threads whose turn it is."""
        chosen: list[str] = []
        for _ in range(len(self._turn)):
            if len(chosen) == number:
                break
            tid = self._turn[0]
            self._turn.rotate(-1)
            if tid not in but:
                chosen.append(tid)
        return chosen

    def _read(self, directory: int, tids: Iterable[str], now_ns: int, before_ns: int | None) -> int:
        """Read threads; returns the CPU nanoseconds that they used since they were last read."""
        ran = 0
        for tid in tids:
            thread = self._threads[tid]
            try:
                self._read_one(directory, thread, now_ns, before_ns)
                ran += thread.moved_ns
            except (OSError, ValueError):
                thread.moved_ns = 0  # it ended; the next listing forgets it
        return ran

    def _read_one(self, directory: int, thread: _Thread, now_ns: int, before_ns: int | None) -> None:
        cpu_ns, delay_ns = _cpu_and_delay(directory, thread.tid)
        reading = _Reading(now_ns, cpu_ns, delay_ns)
        last = thread.readings[-1] if thread.readings else None
        if last is not None and cpu_ns == last.cpu_ns:
            thread.moved_ns = 0
            thread.add(reading, now_ns - self._window_ns)
            return
        status = procfs.thread_status(procfs.read(f"{thread.tid}/status", dir_fd=directory))
        thread.name, thread.cpus_allowed = status.name, status.cpus_allowed
        now = _Booked(cpu_ns, delay_ns, status.voluntary_switches, status.involuntary_switches)
        if last is None or cpu_ns < last.cpu_ns:  # a number that was used again is a new thread
            thread.readings.clear()
            thread.booked = self._booked_before(thread.tid, now)
            if before_ns is not None:
                thread.readings.append(_Reading(before_ns, 0, None if delay_ns is None else 0))
        thread.add(reading, now_ns - self._window_ns)
        thread.moved_ns = cpu_ns - thread.booked.cpu_ns
        self._book(thread, now)

    def _booked_before(self, tid: str, now: _Booked) -> _Booked:
        """Of a thread that is read for the first time."""
        if self._saved is None:
            return _NOTHING
        saved = self._saved.get(tid)
        # What `save` left out is taken as booked: a total that misses a little is better than one that
        # counts twice.
        return saved if saved is not None and saved.cpu_ns <= now.cpu_ns else now

    def _book(self, thread: _Thread, now: _Booked) -> None:
        booked = thread.booked
        self.voluntary = _more(self.voluntary, booked.voluntary, now.voluntary)
        self.involuntary = _more(self.involuntary, booked.involuntary, now.involuntary)
        self.delay_ns = _more(self.delay_ns, booked.delay_ns, now.delay_ns)
        label = MAIN if thread.tid == self._proc.name else thread_label(thread.name)
        if label not in self.cpu_ns_by_label and len(self.cpu_ns_by_label) >= _MOST_NAMES:
            label = OTHER
        self.cpu_ns_by_label[label] = self.cpu_ns_by_label.get(label, 0) + thread.moved_ns
        thread.booked = now


def _more(total: int | None, booked: int | None, now: int | None) -> int | None:
    """A total with what a thread added to it since it was booked; unchanged where the kernel is silent."""
    return total if now is None else (total or 0) + max(now - (booked or 0), 0)


def _cpu_and_delay(directory: int, tid: str) -> tuple[int, int | None]:
    """CPU time and time in the run queue of a thread, in nanoseconds; None where the kernel counts none."""
    try:
        counted = procfs.schedstat(procfs.read(f"{tid}/schedstat", dir_fd=directory))
    except FileNotFoundError:
        counted = None
    if counted is not None:
        return counted
    stat = procfs.process_stat(procfs.read(f"{tid}/stat", dir_fd=directory))
    return round(stat.cpu_seconds * 1e9), None
