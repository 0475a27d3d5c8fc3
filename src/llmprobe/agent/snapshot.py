"""One file with what is known about every server right now: journals, status, flags, host signals.

For a report of a problem, and for looking at it later: gzipped JSON, ``schema_version`` 1, built by whoever
asks for it (the command line, with or without an agent). It reads what journals still hold, so an agent that
died, or never ran, takes nothing away. There is no environment and no command line in it, and what looks
like a secret is replaced; names of servers and models, and paths, are in it.

Steps and requests are columns, one list a field of `llmprobe.record.layout`. Times in them are nanoseconds
of CLOCK_MONOTONIC; ``clock`` says which Unix time that is.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llmprobe
from llmprobe.collect.host import HostWatch, lock_holder
from llmprobe.collect.watches import core_of
from llmprobe.compute.host import together
from llmprobe.export.summary import plain
from llmprobe.record import layout
from llmprobe.record.journal import JournalError
from llmprobe.record.journal_reader import JournalReader

SCHEMA_VERSION = 1
KIND = "llmprobe-snapshot"
DEFAULT_SECONDS = 600.0

_HOST_SECONDS = 2.0
_LEFT_OUT = {"seq", "kind", "reserved", "crc"}
_MOST_BYTES = 1 << 30
_REMOVED = "[removed]"
_SECRET_NAME = re.compile(
    r"(^|_|-)(token|secret|password|passwd|api_?key|authorization|credentials?|cookie)s?$", re.IGNORECASE
)
_SECRET_TEXT = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password in an address
    r"|\b(?:hf|ghp|gho|glpat|xox[abp]|sk|pk|nvapi)[-_][A-Za-z0-9_-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<=Bearer )\S+"
    r"|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+",
)

Progress = Callable[[str, int, int], None]


class SnapshotError(Exception):
    """A snapshot cannot be made, saved or read; the message says which file and what to do."""


def build(
    directory: Path,
    *,
    seconds: float = DEFAULT_SECONDS,
    status: dict[str, Any] | None = None,
    no_status: str = "",
    host_seconds: float = _HOST_SECONDS,
    progress: Progress = lambda what, number, total: None,
) -> dict[str, Any]:
    """Everything about the servers of ``directory``, JSON-ready.

    Args:
        directory: the shared directory (``Settings.directory``).
        seconds: how far back steps and requests go; journals may hold less.
        status: what ``/api/status`` says.
        no_status: if there is none, why.
        host_seconds: for how long to watch the processes that live; 0: not at all.
        progress: told what is done, and how many of how many things have been.

    Raises:
        SnapshotError: there is no journal that could be read, and no status.
    """
    now_ns, now = time.monotonic_ns(), time.time()
    try:
        paths = sorted((directory / "journals").glob("*.journal"))
    except OSError as error:
        raise SnapshotError(f"cannot look into {directory}: {os.strerror(error.errno or 0)}") from None
    processes: list[dict[str, Any]] = []
    unread: dict[str, str] = {}
    readers: list[tuple[dict[str, Any], JournalReader]] = []
    try:
        for number, path in enumerate(paths):
            progress(f"reading {path.name}", number, len(paths))
            try:
                reader = JournalReader(path)
            except JournalError as error:
                unread[path.name] = str(error)
                continue
            found = _process(reader, now_ns - round(seconds * 1e9))
            processes.append(found)
            readers.append((found, reader))
        if not processes and status is None:
            why = "; ".join(unread.values()) or "there is no journal: is an engine running with LLMPROBE=1?"
            raise SnapshotError(f"nothing to save from {directory}: {why}")
        if host_seconds > 0:
            progress("watching the processes", len(paths), len(paths))
            _watch(readers, host_seconds)
    finally:
        for _, reader in readers:
            reader.close()
    document = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "provenance": {
            "llmprobe_version": llmprobe.__version__,
            "made": now,
            "machine": platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "directory": str(directory),
            "seconds": seconds,
        },
        "clock": {"monotonic_ns": now_ns, "unix": now},
        "status": status,
        "no_status": no_status,
        "processes": processes,
        "unread": unread,
    }
    cleaned: dict[str, Any] = redact(plain(document))
    return cleaned


def save(document: dict[str, Any], path: Path) -> int:
    """Write a snapshot, mode 0600; returns its size in bytes.

    Raises:
        SnapshotError: ``path`` exists, or cannot be written. Nothing is left behind then.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise SnapshotError(f"{path} exists; name another file with --output") from None
    except OSError as error:
        raise SnapshotError(f"cannot write {path}: {error.strerror}; name another with --output") from None
    try:
        with os.fdopen(fd, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, compresslevel=6) as file:
            file.write(json.dumps(document, separators=(",", ":"), allow_nan=False).encode())
        return path.stat().st_size
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            path.unlink()
        if not isinstance(error, OSError):
            raise
        raise SnapshotError(f"cannot write {path}: {error.strerror}; name another with --output") from None


def load(path: Path) -> dict[str, Any]:
    """Read a snapshot.

    Raises:
        SnapshotError: it cannot be read, or is no snapshot of a version that this llmprobe knows.
    """
    try:
        with gzip.open(path) as file:
            text = file.read(_MOST_BYTES)
        document = json.loads(text)
    except FileNotFoundError:
        raise SnapshotError(f"{path} does not exist") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise SnapshotError(f"{path} is not a snapshot, or is cut short: {error}") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise SnapshotError(f"{path} is not a snapshot of llmprobe")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise SnapshotError(
            f"{path} has schema_version {document.get('schema_version')!r}; "
            f"this llmprobe reads {SCHEMA_VERSION}"
        )
    return document


def default_name(made: float) -> str:
    """A file name with the time, in UTC."""
    return time.strftime("llmprobe-%Y%m%dT%H%M%SZ.json.gz", time.gmtime(made))


def redact(value: Any) -> Any:
    """``value`` without what looks like a secret: by the name it stands under, or by its own form."""
    if isinstance(value, dict):
        return {
            key: _REMOVED
            if isinstance(item, str) and item and _SECRET_NAME.search(str(key))
            else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        # Columns of numbers are most of a snapshot, and hold no text.
        return value if value and isinstance(value[0], (int, float)) else [redact(item) for item in value]
    return _SECRET_TEXT.sub(_REMOVED, value) if isinstance(value, str) else value


def _process(reader: JournalReader, since_ns: int) -> dict[str, Any]:
    records = reader.read()
    load, progress = reader.load(), reader.progress()
    steps = records.steps[records.steps["e3"] >= since_ns]
    requests = records.requests[records.requests["time"] >= since_ns]
    pending = records.pending[records.pending["time"] >= since_ns]
    return {
        "journal": reader.path.name,
        "identity": reader.identity,
        "alive": reader.alive(),
        "facts": reader.facts(),
        "counters": reader.counters(),
        "load": None if load is None else load._asdict(),
        "progress": None if progress is None else progress._asdict(),
        "steps": _columns(steps),
        "requests": _columns(requests),
        "pending": _columns(pending),
        # How far back the ring went, by its oldest record: it holds some 15 000 records, not a time.
        "records_from_ns": _oldest(records.steps, records.requests, records.pending),
        "records_lost": records.lost,
        "histograms": {name: _counts(reader.histogram(name)) for name in layout.HISTOGRAMS},
        "host": None,
        "host_totals": None,
    }


def _columns(rows: np.ndarray) -> dict[str, list[Any]]:
    names = rows.dtype.names or ()
    return {name: rows[name].tolist() for name in names if name not in _LEFT_OUT}


def _oldest(*kinds: np.ndarray) -> int | None:
    times = [int(rows["time"].min()) for rows in kinds if len(rows)]
    return min(times, default=None)


def _counts(counts: np.ndarray) -> dict[str, int]:
    """Only the buckets that hold anything: index → count."""
    return {str(index): int(counts[index]) for index in np.flatnonzero(counts)}


def _watch(readers: list[tuple[dict[str, Any], JournalReader]], seconds: float) -> None:
    """Fill in the host signals of living processes."""
    watches: list[tuple[dict[str, Any], HostWatch, HostWatch | None]] = []
    cores: dict[int, HostWatch] = {}  # several workers may have one
    for found, reader in readers:
        pid, started = lock_holder(reader.fileno()), found["facts"].get("started")
        if pid is None:
            continue
        watch = HostWatch(pid, started=started)
        if watch.sample(time.monotonic_ns()):
            core = core_of(pid, found["facts"])
            if core is not None and core not in cores:
                cores[core] = HostWatch(core, started=started)
                cores[core].sample(time.monotonic_ns())
            watches.append((found, watch, None if core is None else cores[core]))
    if not watches:
        return
    time.sleep(seconds)
    for core_watch in cores.values():
        core_watch.sample(time.monotonic_ns())
    for found, watch, of_core in watches:
        watch.sample(time.monotonic_ns())
        found["host"] = together(watch.signals(), None if of_core is None else of_core.signals())
        found["host_totals"] = watch.totals()
