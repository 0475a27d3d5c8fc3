"""The agent's application over a real journal, with a server that the scripted nsys can capture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from capture.scripted_nsys import ScriptedNsys
from starlette.testclient import TestClient

from llmprobe.agent.captures import Watched
from llmprobe.agent.door import door_for
from llmprobe.agent.files import Token
from llmprobe.agent.service import State, create_app
from llmprobe.capture.manager import Manager
from llmprobe.capture.store import Store

from .served import HERE, collected


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    """The agent's state over a real journal, with a server that the scripted nsys can capture."""
    with collected(tmp_path) as collector:
        store = Store(tmp_path / "captures", 1 << 20, least_free_bytes=0)
        manager = Manager(store, tmp_path, Watched(collector), max_seconds=60.0)
        yield State(collector, tmp_path, since_read=lambda: 0.1, captures=manager)
        manager.close()


@pytest.fixture
def manager(state: State) -> Manager:
    assert state.captures is not None
    return state.captures


@pytest.fixture
def nsys(tmp_path: Path) -> ScriptedNsys:
    return ScriptedNsys(tmp_path / "scripted", tmp_path)


@pytest.fixture
def token(tmp_path: Path) -> Token:
    return Token.make(tmp_path)


@pytest.fixture
def bare(state: State, token: Token) -> TestClient:
    """Over loopback, without the token."""
    door = door_for("127.0.0.1", token, token_file_given=False)
    return TestClient(create_app(state, door), base_url=HERE, raise_server_exceptions=True)


@pytest.fixture
def client(bare: TestClient, token: Token) -> TestClient:
    """Over loopback, with the token."""
    bare.headers["Authorization"] = f"Bearer {token.value()}"
    return bare
