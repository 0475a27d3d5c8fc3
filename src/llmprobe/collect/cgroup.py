"""What a process's control groups say: time taken away by a CPU quota, and pressure (PSI).

Both versions of control groups, and both at once. Formats: Documentation/admin-guide/cgroup-v2.rst,
Documentation/scheduler/sched-bwc.rst and Documentation/accounting/psi.rst of the kernel.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import NamedTuple

from llmprobe.collect.procfs import read

_DEFAULT_PERIOD_SECONDS = 0.1


class Throttled(NamedTuple):
    """Cumulative, of one group."""

    seconds: float  # summed over cores, so it may outrun the clock
    periods: int  # quota periods in which the group had to wait
    period_seconds: float


class Groups:
    """The control groups of one process, found once."""

    def __init__(self, root: Path, pid: int) -> None:
        """
        Args:
            root: ``/``, or a tree that looks like it.
            pid: the process; it need not exist.
        """
        self._root = root
        self._cpu: list[Path] = []  # innermost first: a quota on any of them takes time away
        self._unified: list[Path] = []
        for kind, path in _memberships(root, pid):
            if kind == "":
                self._unified = _levels(root, "cgroup2", kind, path)
            elif "cpu" in kind.split(","):
                self._cpu = _levels(root, "cgroup", "cpu", path)
        self._cpu = [level for level in [*self._cpu, *self._unified] if _has_quota_figures(level)]
        self._periods = [_period_seconds(level) for level in self._cpu]
        self._pressure = {kind: self._pressure_file(kind) for kind in ("cpu", "memory")}

    def throttled(self) -> tuple[Throttled, ...] | None:
        """By level, innermost first; None if no control group tells."""
        found = []
        for level, period in zip(self._cpu, self._periods, strict=True):
            try:
                stat = _pairs(read(level / "cpu.stat"))
            except (OSError, ValueError):
                return None  # the group is gone, or one of them; levels must stay comparable
            seconds = (
                stat["throttled_usec"] / 1e6
                if "throttled_usec" in stat
                else stat.get("throttled_time", 0) / 1e9
            )
            found.append(Throttled(seconds, stat["nr_throttled"], period))
        return tuple(found) or None

    def pressure_seconds(self, kind: str) -> float | None:
        """Cumulative time in which some task waited for ``cpu`` or ``memory``.

        Of the process's own control group where it counts that, else of the machine; None if neither does.
        """
        path = self._pressure[kind]
        return None if path is None else _some_seconds(path)

    def _pressure_file(self, kind: str) -> Path | None:
        own = self._unified[:1]
        candidates = [*(level / f"{kind}.pressure" for level in own), self._root / "proc/pressure" / kind]
        return next((path for path in candidates if _some_seconds(path) is not None), None)


def throttled_ratio(
    before: tuple[Throttled, ...] | None, now: tuple[Throttled, ...] | None, wall_seconds: float
) -> float | None:
    """The part of the time that a quota took away, from the level that took most; None if not known.

    The kernel sums waiting over cores. A group cannot have waited longer than all of the periods in which
    it was throttled, nor than the clock says: the least of the three is taken.
    """
    if before is None or now is None or len(before) != len(now) or wall_seconds <= 0:
        return None
    waited = [
        min(new.seconds - old.seconds, (new.periods - old.periods) * new.period_seconds, wall_seconds)
        for old, new in zip(before, now, strict=True)
    ]
    return max(0.0, *waited) / wall_seconds


def _memberships(root: Path, pid: int) -> list[tuple[str, str]]:
    """Controllers (empty for version 2) and path of each hierarchy."""
    try:
        lines = read(root / "proc" / str(pid) / "cgroup").splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines]
    return [(part[1], part[2]) for part in parts if len(part) == 3]


def _levels(root: Path, fstype: str, controller: str, path: str) -> list[Path]:
    """The group's directory and those above it, innermost first.

    A path that is not below the mount (seen from another namespace) stands for the mount itself: in a
    container that is the container's own group.
    """
    mount = _mount(root, fstype, controller)
    if mount is None:
        return []
    mounted, at = mount
    inside = posixpath.normpath(path)
    if mounted != "/" and (inside + "/").startswith(mounted + "/"):
        inside = inside[len(mounted) :]
    base = root / at.lstrip("/")
    level = base / inside.lstrip("/")
    if ".." in inside.split("/") or not level.is_dir():
        return [base]
    return [level, *(parent for parent in level.parents if parent == base or base in parent.parents)]


def _mount(root: Path, fstype: str, controller: str) -> tuple[str, str] | None:
    """What of a hierarchy is mounted, and where (proc_pid_mountinfo(5))."""
    try:
        lines = read(root / "proc/self/mountinfo").splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        kind, _, options = right.partition(" ")
        if kind == fstype and (not controller or controller in options.split(" ")[-1].split(",")):
            fields = left.split(" ")
            return fields[3], fields[4]
    return None


def _has_quota_figures(level: Path) -> bool:
    try:
        return "nr_throttled" in _pairs(read(level / "cpu.stat"))
    except (OSError, ValueError):
        return False


def _period_seconds(level: Path) -> float:
    for name, field in (("cpu.max", 1), ("cpu.cfs_period_us", 0)):
        try:
            return int(read(level / name).split()[field]) / 1e6
        except (OSError, ValueError, IndexError):
            continue
    return _DEFAULT_PERIOD_SECONDS


def _pairs(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines() if line)}


def _some_seconds(path: Path) -> float | None:
    """The total of the line ``some`` of a pressure file; it is in microseconds."""
    try:
        for line in read(path).splitlines():
            if line.startswith("some "):
                return int(line.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):  # pressure switched off: EOPNOTSUPP
        return None
    return None
