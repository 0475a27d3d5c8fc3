"""The files through which an agent asks an engine process for a capture, and the process answers.

One way and without a port: beside the journals, in ``captures/`` of the shared directory (0700), the agent
leaves ``<journal's name>.ask``; the process answers in ``.said`` and leaves what it recorded in ``.result``.
Whoever removes the ask calls the capture off; whoever writes it once more with ``end`` ends the recording,
and what was recorded is kept. All three are replaced as wholes, so nobody reads half of one.

An ask holds checked numbers, words of a fixed choice and an id: no path, and nothing that is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = "captures"
TOOLS = ("torch", "kernels")
#: An ask that nobody took up for so long is ignored: whoever wrote it has given up.
GOOD_FOR_NS = 10 * 10**9
LONGEST_SECONDS = 3600.0
MOST_STEPS = 1_000_000
#: A result lies in shared memory until the agent has fetched it.
MOST_RESULT_BYTES = 128 << 20

_SCHEMA = 1
_MOST_BYTES = 64 << 10
_MOST_NOTES = 8
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
_STATES = ("recording", "writing", "done", "failed")


@dataclass(frozen=True)
class Ask:
    """What an agent wants.

    ``seconds`` is the longest it may last, ``steps`` after how many steps it ends before; ``cpu`` and
    ``stacks`` are for ``torch``. ``asked_ns`` is CLOCK_MONOTONIC. ``end``: record no longer than until now.
    """

    id: str
    tool: str
    seconds: float
    steps: int | None
    cpu: bool
    stacks: bool
    asked_ns: int
    end: bool = False


@dataclass(frozen=True)
class Said:
    """What an engine process says about the capture that was asked for.

    ``state``: ``recording``, ``writing``, ``done`` (the result is there) or ``failed`` (``reason`` says why).
    ``clocks`` holds pairs of the same moment in nanoseconds of CLOCK_REALTIME and of CLOCK_MONOTONIC.
    """

    id: str
    state: str
    reason: str = ""
    steps: int = 0
    begin_ns: int = 0
    end_ns: int = 0
    clocks: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()
    updated_ns: int = 0


@dataclass(frozen=True)
class Paths:
    """The files of one engine process."""

    ask: Path
    said: Path
    result: Path

    @classmethod
    def of(cls, journal: Path) -> Paths:
        """Of the process that writes ``journal``."""
        folder, name = journal.parent.parent / FOLDER, journal.stem
        return cls(folder / f"{name}.ask", folder / f"{name}.said", folder / f"{name}.result")

    def remove(self) -> None:
        """Remove all that is there."""
        for path in (self.ask, self.said, self.result):
            with contextlib.suppress(OSError):
                path.unlink()


def write(path: Path, value: Ask | Said) -> None:
    """Replace ``path``. Raises OSError; then no draft is left behind."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(json.dumps({"schema": _SCHEMA, **asdict(value)}).encode())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def read_ask(path: Path, now_ns: int | None = None) -> Ask | None:
    """The ask at ``path``; None if there is none, or it is torn, too old, or not what an agent writes."""
    data = _read(path, Ask)
    if data is None:
        return None
    ask = Ask(**data)
    now_ns = time.monotonic_ns() if now_ns is None else now_ns
    sound = (
        isinstance(ask.id, str)
        and _ID.fullmatch(ask.id)
        and ask.tool in TOOLS
        and _number(ask.seconds)
        and 0 < ask.seconds <= LONGEST_SECONDS
        and (ask.steps is None or (_whole(ask.steps) and 1 <= ask.steps <= MOST_STEPS))
        and isinstance(ask.cpu, bool)
        and isinstance(ask.stacks, bool)
        and isinstance(ask.end, bool)
        and _whole(ask.asked_ns)
        and 0 <= now_ns - ask.asked_ns <= GOOD_FOR_NS
    )
    return ask if sound else None


def read_said(path: Path) -> Said | None:
    """The answer at ``path``; None if there is none, or it is torn or foreign."""
    data = _read(path, Said)
    if data is None:
        return None
    try:
        said = Said(
            id=data["id"],
            state=data["state"],
            reason=str(data["reason"])[:400],
            steps=int(data["steps"]),
            begin_ns=int(data["begin_ns"]),
            end_ns=int(data["end_ns"]),
            clocks=tuple((int(real), int(monotonic)) for real, monotonic in data["clocks"]),
            notes=tuple(str(note)[:400] for note in data["notes"])[:_MOST_NOTES],
            updated_ns=int(data["updated_ns"]),
        )
    except (TypeError, ValueError):
        return None
    return said if isinstance(said.id, str) and said.state in _STATES else None


def open_plain(path: Path, most_bytes: int) -> int:
    """A descriptor of ``path``, a plain file of ours that is not larger; follows no link. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size > most_bytes:
        os.close(fd)
        raise OSError(1, "not a plain file of ours, or too large", str(path))
    return fd


def _read(path: Path, kind: type[Ask] | type[Said]) -> dict[str, Any] | None:
    try:
        with os.fdopen(open_plain(path, _MOST_BYTES), "rb") as file:
            data = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.pop("schema", None) != _SCHEMA:
        return None
    return data if data.keys() == {field.name for field in fields(kind)} else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
