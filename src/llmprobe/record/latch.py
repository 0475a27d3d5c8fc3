"""Tells, when an engine starts, that an earlier one died while a kernel window was open.

A window is open only while its process holds a lock on a file of its own. Whoever finds such a file without a
lock knows that its process is gone, and that it went in a window: then no more windows are opened in this
directory until somebody removes the file.

A program that ends in the ordinary way did not die: it closes its windows first (`ending`). A child that it
forks while one is open would keep the lock, so the child closes the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from multiprocessing.util import Finalize
from pathlib import Path

_SUFFIX = ".open"
#: How long a program that ends waits for its windows to be closed, which takes milliseconds. One that is open
#: even then hangs in CUPTI: its file stays.
_LAST_SECONDS = 2.0


class ProgramEndsError(OSError):
    """No window is opened any more."""


class _Process:
    """What this process has open, and whether it has come to its end."""

    def __init__(self) -> None:
        self.open: set[Latch] = set()
        self.ending = threading.Event()
        self._watched = False

    def watch(self) -> None:
        """Have `end` called at the end, once."""
        if not self._watched:
            self._watched = True
            # Not `atexit`: forked workers of `multiprocessing`, as vLLM's may be, end without it. In a child
            # that this process forks it does not run.
            Finalize(None, self.end, exitpriority=0)

    def end(self) -> None:
        """The program ends: whoever has a window open is told, and waited for."""
        self.ending.set()
        until = time.monotonic() + _LAST_SECONDS
        for latch in list(self.open):
            latch.shut.wait(max(until - time.monotonic(), 0))


_process = _Process()


def _forked() -> None:
    """This is a child: windows are its parent's."""
    global _process
    inherited, _process = _process, _Process()
    for latch in inherited.open:
        latch.let_go()


os.register_at_fork(after_in_child=_forked)


def ending() -> bool:
    """Whether this program is at its end: windows are to be closed at once, and none is opened."""
    return _process.ending.is_set()


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
        #: Set when the window is closed.
        self.shut = threading.Event()

    def close_window(self) -> None:
        """The window is closed, and nothing happened."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self.let_go()
        _process.open.discard(self)
        self.shut.set()

    def let_go(self) -> None:
        """Leave the file to whoever else has it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def open_window(self) -> None:
        """A window is about to open. Raises OSError."""
        self.shut.clear()
        _process.watch()
        _process.open.add(self)  # before the look: `end` sees this, or this sees it
        try:
            if ending():
                raise ProgramEndsError("this program ends")
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            draft = self._path.with_suffix(".part")
            self._fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.replace(self._path)  # locked before anybody can see it
        except BaseException:
            self.close_window()
            raise


def died_in_a_window(folder: Path) -> Path | None:
    """The file that a process left which died while its window was open; None if there is none."""
    return next(iter(deaths_in_windows(folder)), None)


def deaths_in_windows(folder: Path) -> list[Path]:
    """All such files."""
    try:
        files = sorted(folder.glob(f"*{_SUFFIX}"))
    except OSError:
        return []
    return [path for path in files if not _locked(path)]


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
