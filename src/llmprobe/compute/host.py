"""What the host of an engine was doing: the evidence behind a host-bound verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class ThreadLoad:
    """One thread over the window."""

    name: str  # as the kernel has it (``comm``), 15 characters at most
    cpu_ratio: float  # of one core; 1.0 is a full core
    run_queue_ratio: float | None  # of the wall time, runnable but waiting for a core; None: no schedstat
    of_core: bool = False  # in the engine core's process, where workers have processes of their own

    @property
    def taken_ratio(self) -> float:
        """Share of the wall time in which it ran or wanted to: at 1 it has no time left."""
        return min(self.cpu_ratio + (self.run_queue_ratio or 0.0), 1.0)


@dataclass(frozen=True)
class HostSignals:
    """One process over the last window, or a worker's together with its engine core's (`together`).

    What this kernel or container does not tell is None, never 0.
    """

    window_seconds: float
    cpus_allowed: int | None  # cores that the process may run on
    threads: tuple[ThreadLoad, ...]  # busiest first, at most 8 a process, the one that waited most among them
    cpu_ratio: float  # of one core, all threads together
    run_queue_ratio: float | None  # of the thread that waited for a core most
    voluntary_switches_per_second: float | None
    involuntary_switches_per_second: float | None
    minor_faults_per_second: float
    major_faults_per_second: float
    throttled_ratio: float | None  # of the wall time, by the cgroup's CPU quota
    cpu_pressure_ratio: float | None  # PSI "some" of the cgroup or the machine
    memory_pressure_ratio: float | None  # likewise
    numa_nodes_allowed: int | None  # over how many NUMA nodes the allowed cores spread
    core_apart: bool = False  # the engine core's process is in it, besides the worker's

    @property
    def busiest(self) -> ThreadLoad | None:
        """The thread that used most CPU time; of the worker's process where the core has one of its own."""
        return next((thread for thread in self.threads if not thread.of_core), None)

    @property
    def starved(self) -> ThreadLoad | None:
        """The thread that waited for a core most; None where that is not known."""
        return _starved(self.threads)

    @property
    def starved_of_core(self) -> ThreadLoad | None:
        """Likewise where steps are scheduled."""
        return _starved(thread for thread in self.threads if thread.of_core or not self.core_apart)

    @property
    def starved_of_worker(self) -> ThreadLoad | None:
        """Likewise where they run."""
        return _starved(thread for thread in self.threads if not thread.of_core)

    @property
    def fullest(self) -> ThreadLoad | None:
        """The thread that has least time left."""
        return max(self.threads, key=lambda thread: thread.taken_ratio, default=None)


def together(worker: HostSignals | None, core: HostSignals | None) -> HostSignals | None:
    """The signals of a worker's process and those of its engine core's as one.

    Rates add up. What a container or the machine does to both is counted once: the larger.
    """
    if worker is None or core is None:
        return worker
    threads = [*worker.threads, *(replace(thread, of_core=True) for thread in core.threads)]
    threads.sort(key=lambda thread: thread.cpu_ratio, reverse=True)
    return HostSignals(
        window_seconds=min(worker.window_seconds, core.window_seconds),
        cpus_allowed=_most(worker.cpus_allowed, core.cpus_allowed),
        threads=tuple(threads),
        cpu_ratio=worker.cpu_ratio + core.cpu_ratio,
        run_queue_ratio=_most(worker.run_queue_ratio, core.run_queue_ratio),
        voluntary_switches_per_second=_both(
            worker.voluntary_switches_per_second, core.voluntary_switches_per_second
        ),
        involuntary_switches_per_second=_both(
            worker.involuntary_switches_per_second, core.involuntary_switches_per_second
        ),
        minor_faults_per_second=worker.minor_faults_per_second + core.minor_faults_per_second,
        major_faults_per_second=worker.major_faults_per_second + core.major_faults_per_second,
        throttled_ratio=_most(worker.throttled_ratio, core.throttled_ratio),
        cpu_pressure_ratio=_most(worker.cpu_pressure_ratio, core.cpu_pressure_ratio),
        memory_pressure_ratio=_most(worker.memory_pressure_ratio, core.memory_pressure_ratio),
        numa_nodes_allowed=_most(worker.numa_nodes_allowed, core.numa_nodes_allowed),
        core_apart=True,
    )


def _starved(threads: Iterable[ThreadLoad]) -> ThreadLoad | None:
    known = [thread for thread in threads if thread.run_queue_ratio is not None]
    return max(known, key=lambda thread: thread.run_queue_ratio or 0.0, default=None)


def _most(one: _Number | None, other: _Number | None) -> _Number | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _both(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
