"""How much may be written where the engine keeps its own shared memory.

``/dev/shm`` is often small (64 MiB is the default of container runtimes), and whoever first touches a page of
shared memory that he has mapped, such as a queue between vLLM's processes, dies of SIGBUS once it is full. So
what an engine process leaves there for the agent stops well before: files that are written fail in time,
mapped pages do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

#: Stays free for others, or half of the file system where that is less.
RESERVE_BYTES = 256 << 20


class NoRoom(OSError):
    """Writing would leave others too little; the message says how much there is and what to do."""


class Room:
    """What may be written in a folder, as of when this was made: at most half of what was free then.

    Several processes may write at once: each looks at what is free now, so that together they stop at what
    the last of them leaves, and never below `RESERVE_BYTES`.
    """

    def __init__(self, folder: Path, look: Callable[[Path], os.statvfs_result] = os.statvfs) -> None:
        """
        Args:
            folder: that exists.

        Raises:
            OSError: it does not.
        """
        self._folder = folder
        self._look = look
        found = look(folder)
        total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        #: Bytes that stay free; none where the file system has no limit of its own (ramfs).
        self.reserve_bytes = max(min(RESERVE_BYTES, total // 2), free // 2) if total else None

    def holds(self, wanted_bytes: int) -> bool:
        """Whether so much may still be written. Raises OSError."""
        return self.reserve_bytes is None or self._free() - self.reserve_bytes >= wanted_bytes

    def check(self, wanted_bytes: int) -> None:
        """Raise `NoRoom` unless so much may still be written."""
        if self.reserve_bytes is not None and not self.holds(wanted_bytes):
            free, kept = self._free() >> 20, self.reserve_bytes >> 20
            raise NoRoom(
                f"{self._folder} has {free} MiB free, and {kept} MiB stay free for the engine's own shared "
                "memory: record less, or give /dev/shm more (--shm-size)"
            )

    def take(self, fd: int, wanted_bytes: int) -> None:
        """Have so much allocated for the file of ``fd``, all or nothing; raises `NoRoom` or OSError."""
        self.check(wanted_bytes)
        os.posix_fallocate(fd, 0, wanted_bytes)
        self.check(0)  # others may have taken theirs at the same moment

    def _free(self) -> int:
        found = self._look(self._folder)
        return found.f_bavail * found.f_frsize
