"""A clock, a server and death, for tests of the collector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprobe.record.journal_reader import JournalReader

from .judged import World
from .pretended import (
    Clock,
    Server,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Journals whose processes are dead to every reader; a writer of this very process cannot die alone."""
    paths: set[Path] = set()
    monkeypatch.setattr(JournalReader, "alive", lambda reader: reader.path not in paths)
    return paths


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.server.close()
