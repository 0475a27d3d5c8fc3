"""How long a server's threads waited for a core, as the kernel counts: on a busy machine labels are wider."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil


class Waited:
    """From when it is made."""

    def __init__(self, pid: int) -> None:
        """``pid``: of the server's first process."""
        self._pid = pid
        self._begin = time.monotonic()
        self._before = self._look()

    def ratio(self) -> float:
        """The largest share of the time so far that one of its threads could run and had no core."""
        seconds = time.monotonic() - self._begin
        moved = (now - self._before.get(thread, 0) for thread, now in self._look().items())
        return max(moved, default=0) / 1e9 / seconds

    def _look(self) -> dict[str, int]:
        """Nanoseconds by thread."""
        seen: dict[str, int] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._pid)
            for process in (first, *first.children(recursive=True)):
                for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                    with contextlib.suppress(OSError, ValueError):
                        seen[task.parent.name] = int(task.read_text().split()[1])
        return seen
