"""What the kernel's files about processes say, parsed. Paths are the caller's, so that tests bring their own.

Formats: proc(5), and Documentation/scheduler/sched-stats.rst for ``schedstat``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def read(path: str | Path, dir_fd: int | None = None) -> str:
    """The text of a small file, at most 64 KiB. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.read(fd, 1 << 16).decode(errors="replace")
    finally:
        os.close(fd)


class ProcessStat(NamedTuple):
    """From ``/proc/PID/stat``: sums over all threads, those that ended included."""

    minor_faults: int
    major_faults: int
    cpu_seconds: float  # in steps of a clock tick, 10 ms as a rule
    threads: int
    start_ticks: int  # since boot; together with the pid it names one process


def process_stat(text: str) -> ProcessStat:
    """Parse ``/proc/PID/stat``. Raises ValueError."""
    # The name is in brackets and may itself hold brackets and blanks.
    fields = text.rpartition(")")[2].split()
    if len(fields) < 20:
        raise ValueError(f"not a process's stat: {text[:80]!r}")
    return ProcessStat(
        minor_faults=int(fields[7]),
        major_faults=int(fields[9]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND,
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


def started_unix(stat: ProcessStat, proc_stat: str) -> float | None:
    """When a process started, in Unix seconds; ``proc_stat`` is the text of ``/proc/stat``."""
    for line in proc_stat.splitlines():
        if line.startswith("btime "):
            return int(line.split()[1]) + stat.start_ticks / _TICKS_PER_SECOND
    return None


def schedstat(text: str) -> tuple[int, int] | None:
    """Nanoseconds on a core, and runnable but waiting for one; None if the kernel does not count them."""
    on_core, waiting, timeslices = (int(field) for field in text.split()[:3])
    return (on_core, waiting) if on_core or timeslices else None


class ThreadStatus(NamedTuple):
    """From ``/proc/PID/task/TID/status``. None where the kernel lists none: gVisor counts no switches."""

    name: str
    voluntary_switches: int | None
    involuntary_switches: int | None
    cpus_allowed: str | None  # as the kernel lists it, such as ``0-3,8``


def thread_status(text: str) -> ThreadStatus:
    """Parse a thread's ``status``. Raises ValueError."""
    name = _field(text, "Name")
    if name is None:
        raise ValueError(f"not a thread's status: {text[:80]!r}")
    voluntary, involuntary = (_field(text, f"{kind}voluntary_ctxt_switches") for kind in ("", "non"))
    return ThreadStatus(
        name=name,
        voluntary_switches=None if voluntary is None else int(voluntary),
        involuntary_switches=None if involuntary is None else int(involuntary),
        cpus_allowed=_field(text, "Cpus_allowed_list"),
    )


def _field(text: str, name: str) -> str | None:
    """One of sixty lines: to take all of them apart, for every thread, would cost the agent far more."""
    _, found, rest = f"\n{text}".partition(f"\n{name}:")
    return rest.partition("\n")[0].strip() if found else None


def innermost_pid(text: str) -> int | None:
    """What a process calls itself, from ``/proc/PID/status``; None where the kernel lists no namespaces."""
    pids = _field(text, "NSpid")
    return int(pids.split()[-1]) if pids else None


def cpu_list(text: str) -> frozenset[int]:
    """Cores of a list such as ``0-3,8``. Raises ValueError."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def numa_nodes(root: Path) -> list[frozenset[int]] | None:
    """The cores of each NUMA node that has any; None if the kernel does not say."""
    try:
        nodes = [cpu_list(read(path)) for path in root.glob("sys/devices/system/node/node*/cpulist")]
    except (OSError, ValueError):
        return None
    return [node for node in nodes if node] or None


def parent(text: str) -> int:
    """The parent's pid, from ``/proc/PID/stat``; 0 if it is in another namespace. Raises ValueError."""
    fields = text.rpartition(")")[2].split()
    if len(fields) < 2:
        raise ValueError(f"not a process's stat: {text[:80]!r}")
    return int(fields[1])
