"""The agent's small files in the shared directory."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmprobe.record.agent_launch import CONTROL_NAME, TOKEN_NAME

CONTROL_SCHEMA = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` so that readers see the old file or the new one, never a part. Mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of ``value`` as JSON."""
    write_atomically(path, json.dumps(value, separators=(",", ":")).encode() + b"\n")


def switch(
    directory: Path,
    armed: bool,
    servers: Sequence[str] | None = None,
    journals: Iterable[Path] | None = None,
) -> dict[str, Any]:
    """Tell engines to switch their probes on or off; they look every quarter second.

    Args:
        servers: the ``server`` labels it is meant for; None: all.
        journals: those that the servers' processes write, and know themselves by. A label may be that of two,
            and a group id inherited: by both servers of a script, by every rank that torchrun starts.

    Returns:
        What was written to ``control.json``.
    """
    control = {
        "schema": CONTROL_SCHEMA,
        "armed": armed,
        "servers": None if servers is None else sorted(set(servers)),
        "journals": None if journals is None else sorted({path.name for path in journals}),
        "changed": time.time(),
    }
    write_json(directory / CONTROL_NAME, control)
    return control


def read_switch(directory: Path) -> dict[str, Any] | None:
    """What `switch` wrote last; None if nothing, or nothing readable."""
    try:
        control = json.loads((directory / CONTROL_NAME).read_text())
    except (OSError, ValueError):
        return None
    return control if isinstance(control, dict) else None


class Token:
    """The secret that guards switches; read anew each time, so that it can be exchanged while we run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, directory: Path) -> Token:
        """The token in ``directory``, made if there is none."""
        path = directory / TOKEN_NAME
        token = cls(path)
        if not token.value():
            write_atomically(path, secrets.token_urlsafe(32).encode() + b"\n")
        return token

    def value(self) -> str:
        """The token; empty if the file is missing, unreadable or empty."""
        try:
            return self.path.read_text().strip()
        except (OSError, ValueError):
            return ""

    def matches(self, given: str) -> bool:
        """Whether ``given`` is the token, in constant time; never true without a token."""
        value = self.value()
        return bool(value) and secrets.compare_digest(value.encode(), given.encode())
