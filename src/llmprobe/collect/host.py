"""Watches an engine's process from outside: CPU time of its threads, switches, faults, quotas, pressure.

Only files of /proc and of control groups are read: the engine does nothing for it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprobe.collect import cgroup, procfs
from llmprobe.collect.host_threads import MAIN, OTHER, Threads
from llmprobe.compute.host import HostSignals, ThreadLoad

MOST_LABELS = 8  #: of threads, `MAIN` and `OTHER` included

_SHOWN_THREADS = 8
_LEAST_WINDOW_SECONDS = 0.5
_LABEL_SECONDS, _LABEL_RATIO = 0.5, 0.01  # of CPU time, from which a name is a label of its own
_STARTED_SLACK_SECONDS = 5.0  # the boot time is known to a second, and clocks are set
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux


def lock_holder(fd: int) -> int | None:
    """The process that holds the lock on a journal, by its pid in *this* namespace, and never by a number
    that another process has taken over since.

    Args:
        fd: an open descriptor of the journal; it stays open (closing one would drop a lock of our own).

    Returns:
        None if nobody holds it, or somebody whom this namespace does not see.
    """
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return int(pid) if kind != fcntl.F_UNLCK and pid > 0 else None


@dataclass(frozen=True)
class HostTotals:
    """Cumulative since the process began; no value ever falls."""

    #: By label: `MAIN`, at most six names, and `OTHER`, which holds what threads that ended used too, and
    #: what a name used before it was one of the six.
    cpu_seconds: dict[str, float]
    page_faults: dict[str, int]  # "minor", "major"
    #: "voluntary", "involuntary"; what a thread did between the last look at it and its end is missing.
    #: Empty where the kernel does not count them.
    context_switches: dict[str, int]
    run_queue_seconds: float | None  # runnable but waiting for a core; None: the kernel does not count it


@dataclass
class _Point:
    """Cumulative values of the whole process at one sample."""

    time_ns: int
    stat: procfs.ProcessStat
    voluntary: int | None
    involuntary: int | None
    throttled: tuple[cgroup.Throttled, ...] | None
    cpu_pressure: float | None
    memory_pressure: float | None


class HostWatch:
    """One process, sampled about once a second. Methods are called from one thread, and do not raise."""

    def __init__(
        self,
        pid: int,
        *,
        started: float | None = None,
        root: Path = Path("/"),
        window_seconds: float = 10.0,
    ) -> None:
        """
        Args:
            pid: as this namespace numbers it; see `lock_holder`.
            started: Unix seconds at which the process is known to have lived: one that started later has
                only inherited the number, and is not watched.
            root: of the file system.
            window_seconds: over which `signals` looks back.
        """
        self.pid = pid
        #: Why nothing more will be known; empty while all is well.
        self.problem = ""
        self._root = root
        self._proc = root / "proc" / str(pid)
        self._started = started
        self._window_ns = round(window_seconds * 1e9)
        self._start_ticks: int | None = None
        self._groups: cgroup.Groups | None = None
        self._nodes = procfs.numa_nodes(root)
        self._threads = Threads(self._proc, self._window_ns)
        self._points: deque[_Point] = deque()
        self._labels: dict[str, int] = {MAIN: 0}  # and what of its nanoseconds is among the others
        self._other_seconds = 0.0
        self._told = False  # whether anybody may have seen totals

    def sample(self, now_ns: int) -> bool:
        """Read what the kernel says now; False if the process is gone, or is not the one that was meant.

        Args:
            now_ns: CLOCK_MONOTONIC.
        """
        if self.problem:
            return False
        try:
            stat = procfs.process_stat(procfs.read(self._proc / "stat"))
            self._identify(stat)
            if not self.problem:
                self._look(stat, now_ns)
        except (OSError, ValueError) as error:
            gone = isinstance(error, (FileNotFoundError, ProcessLookupError))
            self.problem = f"process {self.pid} ended" if gone else f"process {self.pid}: {error}"
        return not self.problem

    def signals(self) -> HostSignals | None:
        """The last window, as of the last sample; None before there is one, and of a dead process."""
        if self.problem or len(self._points) < 2:
            return None
        first, last = self._points[0], self._points[-1]
        wall = (last.time_ns - first.time_ns) / 1e9
        if wall < _LEAST_WINDOW_SECONDS:
            return None
        loads = self._threads.loads(last.time_ns)
        cores = self._threads.cores(last.time_ns)
        waits = [load.run_queue_ratio for load in loads if load.run_queue_ratio is not None]
        nodes = self._nodes
        return HostSignals(
            window_seconds=wall,
            cpus_allowed=len(cores) or None,
            threads=_shown(loads),
            cpu_ratio=max(last.stat.cpu_seconds - first.stat.cpu_seconds, 0.0) / wall,
            run_queue_ratio=max(waits, default=None),
            voluntary_switches_per_second=_per_second(first.voluntary, last.voluntary, wall),
            involuntary_switches_per_second=_per_second(first.involuntary, last.involuntary, wall),
            minor_faults_per_second=(last.stat.minor_faults - first.stat.minor_faults) / wall,
            major_faults_per_second=(last.stat.major_faults - first.stat.major_faults) / wall,
            throttled_ratio=cgroup.throttled_ratio(first.throttled, last.throttled, wall),
            cpu_pressure_ratio=_rate(first.cpu_pressure, last.cpu_pressure, wall),
            memory_pressure_ratio=_rate(first.memory_pressure, last.memory_pressure, wall),
            numa_nodes_allowed=None if nodes is None else sum(bool(node & cores) for node in nodes) or None,
        )

    def totals(self) -> HostTotals | None:
        """As of the last sample; None before the first. A process that ended keeps its last."""
        if not self._points:
            return None
        stat, threads = self._points[-1].stat, self._threads
        switches = {"voluntary": threads.voluntary, "involuntary": threads.involuntary}
        cpu = {name: self._ran_ns(name) / 1e9 for name in self._labels}
        return HostTotals(
            cpu_seconds={**cpu, OTHER: self._other_seconds},
            page_faults={"minor": stat.minor_faults, "major": stat.major_faults},
            context_switches={kind: count for kind, count in switches.items() if count is not None},
            run_queue_seconds=None if threads.delay_ns is None else threads.delay_ns / 1e9,
        )

    @property
    def identity(self) -> str:
        """Names the process, also when its number is used again; empty before the first sample."""
        return "" if self._start_ticks is None else f"{self.pid}-{self._start_ticks}"

    @property
    def cpu_seconds(self) -> float | None:
        """Of all threads since the process began, as of the last sample; None before the first."""
        return self._points[-1].stat.cpu_seconds if self._points else None

    def save(self) -> dict[str, Any]:
        """What a watch that begins anew needs so that `totals` go on: about two kilobytes of JSON."""
        return {
            "start_ticks": self._start_ticks,
            "labels": self._labels,
            "other_seconds": self._other_seconds,
            **self._threads.save(),
        }

    def restore(self, saved: dict[str, Any]) -> bool:
        """Go on from `save`, before the first `sample`; False if that was about another process."""
        try:
            stat = procfs.process_stat(procfs.read(self._proc / "stat"))
        except (OSError, ValueError):
            return False
        if saved["start_ticks"] != stat.start_ticks:
            return False
        # An agent before this one may have kept names alone.
        labels = saved["labels"] if isinstance(saved["labels"], dict) else dict.fromkeys(saved["labels"], 0)
        self._labels = {str(name): int(others) for name, others in labels.items()}
        self._other_seconds = float(saved["other_seconds"])
        self._told = True
        self._threads.restore(saved)
        return True

    def _identify(self, stat: procfs.ProcessStat) -> None:
        if self._start_ticks is None:
            began = procfs.started_unix(stat, procfs.read(self._root / "proc/stat"))
            if None not in (began, self._started) and began > self._started + _STARTED_SLACK_SECONDS:  # type: ignore[operator]
                self.problem = f"pid {self.pid} is another process: it started after the engine"
            self._start_ticks = stat.start_ticks
        elif stat.start_ticks != self._start_ticks:
            self.problem = f"process {self.pid} ended, and another has its number"

    def _look(self, stat: procfs.ProcessStat, now_ns: int) -> None:
        before = self._points[-1] if self._points else None
        if before is None:
            self._threads.look(now_ns, None, 0.0, True)
        else:
            ran = stat.cpu_seconds - before.stat.cpu_seconds
            self._threads.look(now_ns, before.time_ns, ran, stat.threads != before.stat.threads)
        groups = self._groups = self._groups or cgroup.Groups(self._root, self.pid)
        point = _Point(
            now_ns,
            stat,
            self._threads.voluntary,
            self._threads.involuntary,
            throttled=groups.throttled(),
            cpu_pressure=groups.pressure_seconds("cpu"),
            memory_pressure=groups.pressure_seconds("memory"),
        )
        self._points.append(point)
        while len(self._points) > 2 and self._points[1].time_ns <= now_ns - self._window_ns:
            self._points.popleft()
        self._label(stat.cpu_seconds)

    def _label(self, cpu_seconds: float) -> None:
        """Give labels to names that use enough CPU time, while there are any left."""
        ran_by_name = self._threads.cpu_ns_by_label
        least = max(_LABEL_SECONDS, _LABEL_RATIO * cpu_seconds) * 1e9
        for name, ran in sorted(ran_by_name.items(), key=lambda item: item[1], reverse=True):
            if len(self._labels) >= MOST_LABELS - 1:
                break
            if ran >= least and name != OTHER and name not in self._labels:
                self._labels[name] = ran if self._told else 0
        named = sum(map(self._ran_ns, self._labels)) / 1e9
        # From the sum over the whole process, so that what ended threads used is in it.
        self._other_seconds = max(self._other_seconds, cpu_seconds - named, 0.0)
        self._told = True

    def _ran_ns(self, label: str) -> int:
        return self._threads.cpu_ns_by_label.get(label, 0) - self._labels[label]


def _shown(loads: list[ThreadLoad]) -> tuple[ThreadLoad, ...]:
    """The busiest, and the one that waited for a core most: starved, it is none of the busiest."""
    shown = loads[:_SHOWN_THREADS]
    if len(loads) > _SHOWN_THREADS:
        starved = max(loads, key=lambda load: load.run_queue_ratio or 0.0)
        if starved not in shown:
            shown[-1] = starved
    return tuple(shown)


def _per_second(before: int | None, now: int | None, wall_seconds: float) -> float | None:
    return None if before is None or now is None else (now - before) / wall_seconds


def _rate(before: float | None, now: float | None, wall_seconds: float) -> float | None:
    if before is None or now is None:
        return None
    return min(max(now - before, 0.0) / wall_seconds, 1.0)
