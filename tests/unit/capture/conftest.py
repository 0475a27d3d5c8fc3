"""A manager of captures over a scripted nsys, a pretended server and a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmprobe.capture.manager import Manager
from llmprobe.capture.store import Store

from .scripted_nsys import PretendedServer, ScriptedNsys


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture
def nsys(tmp_path: Path, directory: Path) -> ScriptedNsys:
    return ScriptedNsys(tmp_path / "nsys", directory)


@pytest.fixture
def server() -> PretendedServer:
    return PretendedServer()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "captures", 1 << 20, least_free_bytes=0)


@pytest.fixture
def make(
    store: Store, directory: Path, nsys: ScriptedNsys, server: PretendedServer
) -> Iterator[Callable[[], Manager]]:
    """Makes managers over the same disk; all are closed at the end."""
    made: list[Manager] = []

    def manager() -> Manager:
        made.append(Manager(store, directory, server, max_seconds=60.0))
        return made[-1]

    yield manager
    for one in made:
        one.close()


@pytest.fixture
def manager(make: Callable[[], Manager]) -> Manager:
    return make()
