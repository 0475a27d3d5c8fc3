"""Where the agent is found, and how an engine process starts one that outlives it.

Engines know the agent only by the files in the shared directory and by the module they start by name.
Standard library alone: this runs inside the engine, on a housekeeping thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import llmprobe
from llmprobe.settings import DEFAULT_LISTEN, Settings, logger

LOCK_NAME = "agent.lock"
INFO_NAME = "agent.json"
SOCKET_NAME = "agent.sock"
LOG_NAME = "agent.log"
TOKEN_NAME = "token"
CONTROL_NAME = "control.json"
EXPOSITION_NAME = "exposition"

_MODULE = "llmprobe.agent"
_PARENT_SECONDS = 20.0
_BACK_OFF_SECONDS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
#: One that fails as it starts has held its lock for a second or two by then.
_UP_SECONDS = 15.0
# What would make the agent a CUDA program, a profiled one, or one that reads our settings twice.
_DROPPED = re.compile(r"(CUDA|NSYS|NVTX|CUPTI|LLMPROBE|LD_PRELOAD$|LD_AUDIT$)")


class _Attempts:
    """How often this process started an agent in vain; so that a broken one is not started every second."""

    failures = 0
    not_before = 0.0
    running_since: float | None = None  # as of the last looks
    compared = False  # our wishes with those of the agent that runs


def agent_running(directory: Path) -> bool:
    """Whether an agent serves ``directory``: it holds a lock on ``agent.lock`` until it dies.

    Not for the agent itself: looking would drop its lock (POSIX).
    """
    try:
        lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared, so that two processes that look at the same time do not take each other for the agent.
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(lock)
    return False


def agent_info(directory: Path) -> dict[str, Any] | None:
    """What the running agent says about itself (``pid address port requested socket version started``).

    None if no agent runs. ``port`` is null if it found none free.
    """
    if not agent_running(directory):
        return None
    try:
        info = json.loads((directory / INFO_NAME).read_text())
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def exposition_path(directory: Path, group: str, server: str) -> Path:
    """The file in which the agent keeps the metric families of one server, as JSON.

    Args:
        group: its group id. Servers that were started from one environment may share it.
        server: the label it gave itself.
    """
    return directory / EXPOSITION_NAME / f"{quote(group, safe='')[:100]}-{quote(server, safe='')[:120]}.json"


def ensure_agent(settings: Settings) -> None:
    """Start an agent unless one runs. Cheap if one does; meant to be called about once a second.

    The agent leaves this process's tree: engines kill their descendants. One that does not come up is
    tried again after ever longer pauses and said once; nothing is raised.
    """
    directory, now = settings.directory, time.monotonic()
    if agent_running(directory):
        if _Attempts.running_since is None:
            _Attempts.running_since = now
        if now - _Attempts.running_since >= _UP_SECONDS:
            _Attempts.failures = 0
        if not _Attempts.compared:
            _compare(settings)
        return
    _Attempts.running_since = None
    if now < _Attempts.not_before:
        return
    _Attempts.failures += 1
    _Attempts.not_before = now + _BACK_OFF_SECONDS[min(_Attempts.failures, len(_BACK_OFF_SECONDS) - 1)]
    if _Attempts.failures == 3:
        logger().warning(
            "the agent does not stay up; see %s. The server is not affected.", directory / LOG_NAME
        )
    try:
        started = subprocess.Popen(
            agent_command(settings),
            env=agent_environment(os.environ),
            cwd="/",  # "-m" looks there first: never in the engine's own folder
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_PARENT_SECONDS)
    except OSError as error:
        if _Attempts.failures == 1:
            logger().warning("no agent can be started: %s. The server is not affected.", error)


def _compare(settings: Settings) -> None:
    """Say it once if the agent, which serves every engine of its directory, listens elsewhere than we ask."""
    info = agent_info(settings.directory)
    if info is None:  # still starting
        return
    _Attempts.compared = True
    if settings.listen != DEFAULT_LISTEN and info.get("requested") != settings.listen_text:
        logger().warning(
            "LLMPROBE_LISTEN=%s has no effect: the agent of %s runs already, for another server, on "
            "%s:%s. Set LLMPROBE_DIR too for an agent of its own.",
            settings.listen_text,
            settings.directory,
            info.get("address"),
            info.get("port"),
        )


def agent_command(settings: Settings) -> list[str]:
    """The command line of the agent that serves ``settings``."""
    command = [sys.executable, "-m", _MODULE, "--directory", str(settings.directory)]
    command += ["--listen", settings.listen_text]
    if settings.token_file is not None:
        command += ["--token-file", str(settings.token_file)]
    if settings.capture_dir is not None:
        command += ["--capture-dir", str(settings.capture_dir)]
    command += ["--capture-max-seconds", f"{settings.capture_max_seconds:g}"]
    command += ["--capture-max-bytes", str(settings.capture_max_bytes)]
    if settings.thresholds is not None:
        command += ["--thresholds", str(settings.thresholds)]
    if settings.snapshot_dir is not None:
        command += ["--snapshot-dir", str(settings.snapshot_dir)]
    return [*command, "--log-level", settings.log_level]


def agent_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what belongs to the engine alone."""
    kept = {name: value for name, value in environ.items() if not _DROPPED.match(name)}
    kept.pop("PYTHONPATH", None)
    if path := os.pathsep.join(_import_path(environ.get("PYTHONPATH", ""))):
        kept["PYTHONPATH"] = path
    # Arithmetic on a few arrays: no thread a core, no allocator arena a thread.
    kept.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MALLOC_ARENA_MAX="2")
    return kept


def _import_path(pythonpath: str) -> Iterator[str]:
    entries = [str(Path(entry).absolute()) for entry in pythonpath.split(os.pathsep) if entry]
    yield from entries
    home = Path(llmprobe.__file__).resolve().parent.parent
    # From a checkout that the program put on sys.path itself. An installed one is found anyway, and
    # would shadow the standard library from here.
    if home.name not in ("site-packages", "dist-packages") and str(home) not in entries:
        yield str(home)
