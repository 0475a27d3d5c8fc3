"""The agent's listening sockets, and the note in the directory that says where they are."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import llmprobe
from llmprobe.agent.files import write_json
from llmprobe.record.agent_launch import INFO_NAME, SOCKET_NAME

log = logging.getLogger("llmprobe.agent")

_FURTHER_PORTS = 50
_SOCKET_PATH_LIMIT = 107


def bind_tcp(host: str, port: int) -> socket.socket | None:
    """Listen on the first free port from ``port`` on, at most 50 further; None if that is impossible.

    Why it is impossible, or that it became another port, is said in the log.
    """
    for candidate in range(port, min(port + _FURTHER_PORTS, 65535) + 1):
        try:
            bound = _listen(host, candidate)
        except (OSError, UnicodeError) as error:  # the latter of what cannot be a host's name
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            log.error("cannot listen on %s:%d: %s; set LLMPROBE_LISTEN", host, candidate, error)
            return None
        if candidate != port:
            log.warning("port %d is taken; listening on %s:%d instead", port, host, candidate)
        return bound
    log.error("ports %d to %d of %s are taken; set LLMPROBE_LISTEN", port, port + _FURTHER_PORTS, host)
    return None


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def bind_unix(directory: Path) -> socket.socket:
    """Listen on ``agent.sock`` in ``directory``, for its owner only. Replaces a dead agent's socket."""
    path = directory / SOCKET_NAME
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "is there and no socket; remove it", str(path))
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_socket_path(directory) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def short_socket_path(directory: Path) -> Iterator[str]:
    """A name of ``agent.sock`` that fits into a socket address (107 bytes), however long the path is."""
    path = directory / SOCKET_NAME
    if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
        yield str(path)
        return
    held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{held}/{SOCKET_NAME}"
    finally:
        os.close(held)


def about(directory: Path, tcp: socket.socket | None, requested: tuple[str, int]) -> dict[str, object]:
    """Who serves this directory, and where."""
    address, port = tcp.getsockname()[:2] if tcp is not None else (requested[0], None)
    return {
        "pid": os.getpid(),
        "address": address,
        "port": port,
        "requested": f"[{requested[0]}]:{requested[1]}"
        if ":" in requested[0]
        else "{}:{}".format(*requested),
        "socket": str(directory / SOCKET_NAME),
        "version": llmprobe.__version__,
        "started": time.time(),
    }


def publish(directory: Path, info: dict[str, object]) -> None:
    """Write ``agent.json``, which says what `about` does, unless it is there. Raises OSError."""
    path = directory / INFO_NAME
    if not path.exists():
        write_json(path, info)


def unpublish(directory: Path) -> None:
    """Remove what `publish` and `bind_unix` made."""
    for name in (INFO_NAME, SOCKET_NAME):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
