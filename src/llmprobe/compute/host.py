"""What the host of an engine was doing: the evidence behind a host-bound verdict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ThreadLoad:
    """One thread over the window."""

    name: str  # as the kernel has it (``comm``), 15 characters at most
    cpu_ratio: float  # of one core; 1.0 is a full core
    run_queue_ratio: float | None  # of the wall time, runnable but waiting for a core; None: no schedstat

    @property
    def taken_ratio(self) -> float:
        """Share of the wall time in which it ran or wanted to: at 1 it has no time left."""
        return min(self.cpu_ratio + (self.run_queue_ratio or 0.0), 1.0)


@dataclass(frozen=True)
class HostSignals:
    """One process over the last window. What this kernel or container does not tell is None, never 0."""

    window_seconds: float
    cpus_allowed: int  # cores that the process may run on
    threads: tuple[ThreadLoad, ...]  # busiest first, at most 8, the one that waited most among them
    cpu_ratio: float  # of one core, all threads together
    run_queue_ratio: float | None  # of the thread that waited for a core most
    voluntary_switches_per_second: float
    involuntary_switches_per_second: float
    minor_faults_per_second: float
    major_faults_per_second: float
    throttled_ratio: float | None  # of the wall time, by the cgroup's CPU quota
    cpu_pressure_ratio: float | None  # PSI "some" of the cgroup or the machine
    memory_pressure_ratio: float | None  # likewise
    numa_nodes_allowed: int | None  # over how many NUMA nodes the allowed cores spread

    @property
    def busiest(self) -> ThreadLoad | None:
        """The thread that used most CPU time."""
        return self.threads[0] if self.threads else None

    @property
    def starved(self) -> ThreadLoad | None:
        """The thread that waited for a core most; None where that is not known."""
        known = [thread for thread in self.threads if thread.run_queue_ratio is not None]
        return max(known, key=lambda thread: thread.run_queue_ratio or 0.0, default=None)

    @property
    def fullest(self) -> ThreadLoad | None:
        """The thread that has least time left."""
        return max(self.threads, key=lambda thread: thread.taken_ratio, default=None)
