"""The file in which an engine process leaves what its last kernel window saw, for the agent to read.

One file a process, beside its journal: ``windows/<journal's name>.window``. It is replaced as a whole, so a
reader never sees half of one; a reader that is too slow misses windows, which are samples anyway. A line of
JSON, then the activities as numpy's ``.npy``. A capture of kernels leaves its beginning there too.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.room import Room

FOLDER = "windows"
_SCHEMA = 1
_MOST_BYTES = 64 << 20
_LONGEST_HEADER = 4 << 20
#: Of numpy's own, before the activities.
_MOST_COLUMNS_BYTES = 1 << 10
_numbers = itertools.count(1)


class WindowFileError(ValueError):
    """Not a window file of this version."""


@dataclass(frozen=True)
class Seen:
    """A window, and which of its process it is, counted from 1."""

    number: int
    window: Window


def window_path(journal: Path) -> Path:
    """Where the process of ``journal`` leaves its windows."""
    return journal.parent.parent / FOLDER / journal.with_suffix(".window").name


def next_number() -> int:
    """Of a window of this process, whoever opened it."""
    return next(_numbers)


def write_window(path: Path, seen: Seen, room: Room | None = None) -> None:
    """Replace ``path``. Raises OSError, also for lack of room; then no file of ours is left behind.

    Args:
        room: what may be written there; by default, as of now.
    """
    window = seen.window
    about = {
        "schema": _SCHEMA,
        "number": seen.number,
        "begin_ns": window.begin_ns,
        "end_ns": window.end_ns,
        "dropped": window.dropped,
        "names": window.names,
    }
    header = json.dumps(about).encode() + b"\n"
    draft = path.with_suffix(".part")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    room = room or Room(path.parent)
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            room.take(fd, len(header) + _MOST_COLUMNS_BYTES + window.activities.nbytes)
            file.write(header)
            np.save(file, window.activities, allow_pickle=False)
            file.truncate()
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def read_window(path: Path) -> Seen:
    """The window at ``path``. Raises OSError or WindowFileError."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise WindowFileError(f"{path} is larger than any window")
        data = file.read(_MOST_BYTES)
    line, newline, rest = data.partition(b"\n")
    try:
        if not newline or len(line) > _LONGEST_HEADER:
            raise ValueError("no header")
        header = json.loads(line)
        if header["schema"] != _SCHEMA:
            raise ValueError(f"schema {header['schema']}")
        activities = np.load(io.BytesIO(rest), allow_pickle=False)
        names = [str(name) for name in header["names"]]
        if activities.dtype != ACTIVITY or activities.ndim != 1:
            raise ValueError("other columns")
        if len(activities) and int(activities["name"].max()) >= len(names):
            raise ValueError("a name is missing")
        window = Window(
            int(header["begin_ns"]), int(header["end_ns"]), activities, names, int(header["dropped"])
        )
        return Seen(int(header["number"]), window)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise WindowFileError(f"{path} is not a window of this version: {error}") from None
