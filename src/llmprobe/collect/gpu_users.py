"""Whether somebody else uses a GPU: its processes as NVML lists them, held against the server's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprobe.collect import procfs
from llmprobe.collect.nvml import GpuProcess

#: A CUDA context alone takes more than this.
_HIDDEN_BYTES = 256 << 20
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the kernel
_MOST_PARENTS = 16


@dataclass(frozen=True)
class Users:
    """``shared``: another process uses the GPU; None where that cannot be told. ``note``: one line on it."""

    shared: bool | None
    note: str = ""


def users(
    listed: Sequence[GpuProcess] | None,
    own: Iterable[int],
    ranks: int,
    used_bytes: int | None,
    root: Path = Path("/"),
) -> Users:
    """Who uses a GPU besides one server.

    Args:
        listed: what NVML lists; None if it lists nothing.
        own: pids of the server's processes in this namespace.
        ranks: how many measured processes use the GPU, of this server or of others.
        used_bytes: memory in use on the whole GPU.
        root: of the file system.
    """
    if ranks > 1:
        return Users(True, f"{ranks} measured processes use one GPU: counters are those of all together")
    if not listed:  # at least ours uses it: the list is of another namespace, or withheld
        return Users(None)
    ours, pids = set(own), [process.pid for process in listed]
    hidden = _unexplained(listed, used_bytes)
    accounted = hidden is not None and hidden < _HIDDEN_BYTES
    if not ours & set(pids):
        # Pids of another namespace say nothing, but a single process must be ours.
        return Users(False if len(pids) == 1 and accounted else None)
    others = [pid for pid in pids if not _belongs(pid, ours, root) and _exists(pid, root)]
    if others:
        return Users(True, f"other processes use this GPU too: pid {', '.join(map(str, sorted(others)))}")
    if accounted or _sees_all(root):
        return Users(False)
    if hidden is None:
        return Users(None)
    size = f"{hidden / (1 << 30):.1f} GiB of this GPU's memory"
    return Users(None, f"{size} belong to processes that are not visible here")


def _unexplained(listed: Sequence[GpuProcess], used_bytes: int | None) -> int | None:
    """Memory in use that no listed process holds; None if that is not known.

    Processes of other containers may be hidden; what they hold is not.
    """
    known = [process.memory_bytes for process in listed if process.memory_bytes is not None]
    if used_bytes is None or len(known) != len(listed):
        return None
    return used_bytes - sum(known)


def _belongs(pid: int, ours: set[int], root: Path) -> bool:
    """Whether ``pid`` is one of ours, or a descendant of one."""
    for _ in range(_MOST_PARENTS):
        if pid in ours:
            return True
        try:
            pid = procfs.parent(procfs.read(root / "proc" / str(pid) / "stat"))
        except (OSError, ValueError):
            return False
        if pid <= 1:
            return False
    return False


def _exists(pid: int, root: Path) -> bool:
    return (root / "proc" / str(pid)).exists()


def _sees_all(root: Path) -> bool:
    """Whether this is the machine's own pid namespace."""
    try:
        return str((root / "proc/self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return False
