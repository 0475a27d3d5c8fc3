"""How much memory there is left for this process, and how much it takes; Linux, a few file reads each."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CGROUP = Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """What this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """What may still be taken: of the machine, or of the container where that is less. None: nobody says."""
    found = [value for value in (_machine(meminfo), _container(cgroup)) if value is not None]
    return min(found, default=None)


def _machine(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def _container(cgroup: Path) -> int | None:
    try:
        most = int((cgroup / "memory.max").read_text())  # "max" where there is no limit
        taken = int((cgroup / "memory.current").read_text())
        rows = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return most - taken + int(rows.get("inactive_file", 0))
