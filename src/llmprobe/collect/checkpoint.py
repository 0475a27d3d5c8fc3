"""The file that carries derived counters over a restart of the agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SCHEMA = 1


def load(path: Path | None) -> dict[str, Any]:
    """What was saved; empty where nothing was, or nothing that can be read."""
    if path is None:
        return {}
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) and saved.get("schema") == _SCHEMA else {}


def dump(**parts: Any) -> str:
    """``parts`` as the file's text."""
    return json.dumps({"schema": _SCHEMA, **parts})


def write(path: Path, text: str) -> None:
    """Replace the file. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
