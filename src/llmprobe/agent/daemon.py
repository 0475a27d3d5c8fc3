"""Being a daemon: out of the engine's process tree, one a directory, and no burden on the node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from pathlib import Path

from llmprobe.record.agent_launch import INFO_NAME, LOCK_NAME, agent_environment

_LOG_BYTES = 1 << 20
_LOG_KEPT_BYTES = 64 << 10
_LOCK_TRIES = 10


def detach(log_path: Path) -> bool:
    """Fork twice, so that the caller's process tree does not contain the daemon, nor its process group.

    It stays in the caller's session: see `llmprobe.processors.own_group`.

    Returns:
        True in the daemon, whose output goes to ``log_path``; False in the caller.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return False
    os.setpgrp()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes is no reason to leave
    os.chdir("/")
    _redirect(log_path)
    return True


def _redirect(log_path: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:  # a full disk, say: better an agent without a log than none
        output = nothing
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for fd in {nothing, output} - {0, 1, 2}:
        os.close(fd)


def clear_environment() -> None:
    """Drop what belongs to the engine alone (see `agent_environment`), for ourselves and for children."""
    kept = agent_environment(os.environ)
    for name in set(os.environ) - set(kept):
        del os.environ[name]
    os.environ.update(kept)


def be_modest() -> None:
    """Give way to the engine, and be the first to go when memory runs out."""
    with contextlib.suppress(OSError):
        os.nice(5)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")


class Lock:
    """The lock that says which agent serves a directory; gone with the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def in_place(self) -> bool:
        """Whether the locked file is still the directory's: not so once somebody removed that."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._fd))
        except OSError:
            return False

    def release(self) -> None:
        """Let another agent take over."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def take_lock(directory: Path) -> Lock | None:
    """Become the agent of ``directory``; None if there is one.

    Tried for a moment: whoever only looks whether an agent runs holds a shared lock while it does.
    """
    path = directory / LOCK_NAME
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(fd)
                raise
            time.sleep(0.02)
        else:
            # What a killed agent said about itself is not true of this one.
            (directory / INFO_NAME).unlink(missing_ok=True)
            return Lock(path, fd)
    os.close(fd)
    return None


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cap_log(path: Path, limit: int = _LOG_BYTES, kept: int = _LOG_KEPT_BYTES) -> None:
    """Cut the log to its last ``kept`` bytes once it is longer than ``limit``.

    Cut in place: our own output is open on that file and appends to it.
    """
    try:
        if path.stat().st_size <= limit:
            return
        with path.open("r+b") as file:
            file.seek(-kept, os.SEEK_END)
            tail = file.read().partition(b"\n")[2]
            file.seek(0)
            file.write(tail)
            file.truncate()
    except FileNotFoundError:
        return
