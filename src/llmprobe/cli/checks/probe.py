"""Checks of what the probe itself uses: settings, shared memory, directory, port, agent."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import llmprobe
from llmprobe.capture.store import LEAST_FREE_BYTES, default_directory
from llmprobe.cli.checks import Check
from llmprobe.collect.thresholds import load_thresholds
from llmprobe.record.agent_launch import agent_info, agent_running
from llmprobe.record.layout import DEFAULT_SIZE
from llmprobe.settings import Settings, SettingsError

_JOURNALS = 4  # of a small server: front end and a few workers


class _Read(dict[str, str]):
    """An environment that remembers which variables were asked for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        self.asked: set[str] = set()

    def get(self, key: str, default: str | None = None) -> str | None:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)


def settings(environ: Mapping[str, str]) -> tuple[Check, Settings]:
    """Whether every ``LLMPROBE_*`` variable can be used; and the settings, the default ones if not."""
    reading = _Read(environ)
    try:
        found = Settings.from_env(reading)
    except SettingsError as error:
        check = Check(
            "settings",
            "not ok",
            f"{error.variable}={error.value!r}",
            "the probe stays off and says so in one line",
            f"set it to {error.allowed}, or unset it",
            needed=True,
        )
        return check, Settings.from_env({})
    ours = sorted(name for name in environ if name.startswith("LLMPROBE"))
    unknown = [name for name in ours if name not in reading.asked]
    if unknown:
        return Check(
            "settings", "not ok", f"{', '.join(unknown)}: no such variable", "it has no effect", "unset it"
        ), found
    _, problem = load_thresholds(found.thresholds)
    if problem is not None:
        return Check(
            "settings",
            "not ok",
            problem,
            "nothing in the file counts, not only what is wrong",
            "mend the file, or unset the variable: docs/verdicts.md has names and ranges",
        ), found
    return Check("settings", "ok", ", ".join(ours) if ours else "all defaults"), found


def shared_memory(directory: Path) -> Check:
    """Whether the journals will find room."""
    name, needed = "room for journals", _JOURNALS * DEFAULT_SIZE
    place = _existing(directory)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check(
            name, "not ok", f"{place}: {error}", "the probe stays off", "set LLMPROBE_DIR", needed=True
        )
    found = f"{free >> 20} MiB free at {place}"
    if free < needed:
        return Check(
            name,
            "not ok",
            found,
            f"each process of an engine allocates {DEFAULT_SIZE >> 20} MiB; without it its probe stays off",
            "give the container more shared memory (docker run --shm-size, an emptyDir of medium Memory), "
            "or set LLMPROBE_DIR",
            needed=True,
        )
    return Check(name, "ok", found)


def directory(path: Path) -> Check:
    """Whether the shared directory is, or can be, ours alone."""
    name, fix = "directory", "set LLMPROBE_DIR to a directory of yours"
    try:
        status = path.lstat()
    except FileNotFoundError:
        parent = _existing(path)
        if os.access(parent, os.W_OK | os.X_OK):
            return Check(name, "ok", f"{path} (made when an engine starts)")
        return Check(name, "not ok", f"{path} cannot be made", "the probe stays off", fix, needed=True)
    except OSError as error:
        return Check(name, "not ok", f"{path}: {error.strerror}", "the probe stays off", fix, needed=True)
    if not path.is_dir() or status.st_uid != os.getuid():
        what = "belongs to another user" if path.is_dir() else "is not a directory"
        return Check(name, "not ok", f"{path} {what}", "the probe stays off", fix, needed=True)
    if not os.access(path, os.W_OK | os.X_OK):
        return Check(name, "not ok", f"{path} cannot be written", "the probe stays off", fix, needed=True)
    if status.st_mode & 0o077:
        mode = f"{status.st_mode & 0o777:o}"
        why = "others can read the token and then switch probes and take captures"
        return Check(name, "not ok", f"{path} has mode {mode}", why, f"chmod 700 {path}", needed=True)
    return Check(name, "ok", str(path))


def captures(settings: Settings) -> Check:
    """Whether a capture could be kept, as far as can be told without making anything."""
    path = settings.capture_dir or default_directory(settings.directory)
    why = "captures are refused; all else works"
    fix = "set LLMPROBE_CAPTURE_DIR to a folder that the server's user may write"
    place = _existing(path)
    try:
        status, free = place.stat(), shutil.disk_usage(place).free
    except OSError as error:
        return Check("captures", "not ok", f"{place}: {error.strerror}", why, fix)
    if not place.is_dir():
        return Check("captures", "not ok", f"{place} is not a directory", why, fix)
    if not os.access(place, os.W_OK | os.X_OK):
        volume = f"mount a writable volume at {path}, or {fix}"
        return Check("captures", "not ok", f"{place} cannot be written", why, volume)
    if place == path and status.st_uid != os.getuid():
        return Check("captures", "not ok", f"{path} belongs to another user", why, fix)
    if place == path and status.st_mode & 0o022:
        return Check("captures", "not ok", f"others may write in {path}", why, f"chmod 700 {path}, or {fix}")
    found = f"{path}, {free >> 20} MiB free"
    if free < LEAST_FREE_BYTES:
        wants = f"a capture wants {LEAST_FREE_BYTES >> 20} MiB; {why}"
        return Check("captures", "not ok", found, wants, f"make room, or {fix}")
    return Check("captures", "ok", found)


def agent(path: Path) -> Check:
    """Whether an agent serves the directory, and whether it is of this version."""
    if not agent_running(path):
        return Check("agent", "absent", "none runs", "the first engine with LLMPROBE=1 starts one")
    info = agent_info(path) or {}
    version = info.get("version")
    if version != llmprobe.__version__:
        return Check(
            "agent",
            "not ok",
            f"pid {info.get('pid')} is version {version}, this is {llmprobe.__version__}",
            "an older agent may not read what a newer engine writes",
            f"kill {info.get('pid')}; engines start a new one",
        )
    where = f"http://{info['address']}:{info['port']}/metrics" if info.get("port") else "its Unix socket only"
    return Check("agent", "ok", f"pid {info.get('pid')} at {where}")


def port(listen: tuple[str, int], path: Path) -> Check:
    """Whether the agent's port is free, or the agent's already."""
    host, number = listen
    shown = f"{host}:{number}"
    info = agent_info(path)
    if info is not None and (info.get("address"), info.get("port")) == (host, number):
        return Check("port", "ok", f"{shown} is the agent's")
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, number))
    except OSError as error:
        return Check(
            "port",
            "not ok",
            f"{shown}: {error.strerror}",
            "the agent takes the next free port and says which; a scraper would not find it",
            "set LLMPROBE_LISTEN to a free port",
        )
    return Check("port", "ok", f"{shown} is free")


def _existing(path: Path) -> Path:
    """``path`` or the nearest parent that is there."""
    for parent in (path, *path.parents):
        with contextlib.suppress(OSError):  # one whose own parent must not be searched, a name too long
            if parent.exists():
                return parent
    return Path("/")
