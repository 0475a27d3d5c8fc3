"""Whether somebody else uses a GPU: its processes as NVML lists them, held against the server's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
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
    kill: Callable[[int, int], None] = os.kill,
) -> Users:
    """Who uses a GPU besides one server.

    Args:
        listed: what NVML lists; None if it lists nothing.
        own: pids of the server's processes in this namespace.
        ranks: how many measured processes use the GPU, of this server or of others.
        used_bytes: memory in use on the whole GPU.
        root: of the file system.
        kill: asked with signal 0 whether there is a process that ``/proc`` does not show.
    """
    if ranks > 1:
        return Users(True, f"{ranks} measured processes use one GPU: counters are those of all together")
    if not listed:  # at least ours uses it: the list is of another namespace, or withheld
        return Users(None)
    ours, pids = set(own), [process.pid for process in listed]
    if not ours & set(pids):
        # Pids of another namespace say nothing, but a single process must be ours.
        return Users(False if len(pids) == 1 and _accounted(_unexplained(listed, used_bytes)) else None)
    mine = [process for process in listed if _belongs(process.pid, ours, root)]
    rest = {process.pid for process in listed} - {process.pid for process in mine}
    others = sorted(pid for pid in rest if _exists(pid, root, kill))
    if others:
        return Users(True, f"other processes use this GPU too: pid {', '.join(map(str, others))}")
    # What else is listed has ended, or is one of those that nobody shows us: then its memory is still in use.
    hidden = _unexplained(mine, used_bytes)
    if _accounted(hidden) or _sees_all(root):
        return Users(False)
    if hidden is None:
        return Users(None)
    size = f"{hidden / (1 << 30):.1f} GiB of this GPU's memory"
    return Users(None, f"{size} belong to processes that are not visible here")


def _accounted(hidden_bytes: int | None) -> bool:
    return hidden_bytes is not None and hidden_bytes < _HIDDEN_BYTES


def _unexplained(listed: Sequence[GpuProcess], used_bytes: int | None) -> int | None:
    """Memory in use that none of these processes holds; None if that is not known.

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


def _exists(pid: int, root: Path, kill: Callable[[int, int], None]) -> bool:
    """Whether there is such a process; one of somebody else's may not be shown (``hidepid`` of proc(5))."""
    if (root / "proc" / str(pid)).exists():
        return True
    try:
        kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    except OverflowError:
        return False
    return pid > 0  # 0 is our own group


def _sees_all(root: Path) -> bool:
    """Whether this is the machine's own pid namespace."""
    try:
        return str((root / "proc/self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return False
