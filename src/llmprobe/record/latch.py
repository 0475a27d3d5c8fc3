"""Tells, when an engine starts, that an earlier one died while a kernel window was open.

A window is open only while its process holds a lock on a file of its own. Whoever finds such a file without a
lock knows that its process is gone, and that it went in a window: then no more windows are opened in this
directory until somebody removes the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

_SUFFIX = ".open"


class Latch:
    """The file of one process."""

    def __init__(self, folder: Path, name: str) -> None:
        """
        Args:
            folder: shared by all processes that look for each other's files.
            name: this process's own.
        """
        self._path = folder / f"{name}{_SUFFIX}"
        self._fd = -1

    def close_window(self) -> None:
        """The window is closed, and nothing happened."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1

    def open_window(self) -> None:
        """A window is about to open. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        draft = self._path.with_suffix(".part")
        self._fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.replace(self._path)  # locked before anybody can see it


def died_in_a_window(folder: Path) -> Path | None:
    """The file that a process left which died while its window was open; None if there is none."""
    try:
        files = sorted(folder.glob(f"*{_SUFFIX}"))
    except OSError:
        return None
    return next((path for path in files if not _locked(path)), None)


def _locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True  # gone, or not ours to judge
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # several may look at once
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
