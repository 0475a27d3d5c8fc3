"""Callers that keep the agent waiting: they end by themselves, and nobody else is kept out by them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from llmprobe.agent.connections import Connection
from llmprobe.agent.door import Door
from llmprobe.agent.service import State, create_app

from .served import serving

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
BODY = b"POST /api/probe HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
SECONDS = 60.0  # for a test that hangs


class Callers:
    """Connections to one agent."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.made: list[socket.socket] = []

    def connect(self, sent: bytes = b"") -> socket.socket:
        """One more, which has sent this."""
        self.made.append(socket.create_connection(self._address, SECONDS))
        self.made[-1].sendall(sent)
        return self.made[-1]

    def status(self) -> bytes:
        """What a new one is answered."""
        answer = self.connect(HEALTH + b"Connection: close\r\n\r\n").makefile("rb").read()
        return answer[9:12]


def healthy(one: socket.socket) -> bool:
    """Whether it is answered with the agent's health; all of it is read."""
    said = b""
    while not said.endswith(b"}"):
        said += one.recv(1 << 16)
    return said.startswith(b"HTTP/1.1 200")


def ended(one: socket.socket) -> bool:
    """Wait until the agent ends it; False if it answers instead."""
    try:
        return one.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture
def callers(state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callers]:
    monkeypatch.setattr(Connection, "most", 8)
    with serving(create_app(state, Door("unix", None))) as address:
        found = Callers(address)
        yield found
        for one in found.made:
            one.close()


@pytest.mark.parametrize("sent", [b"", HEALTH, BODY], ids=["nothing", "half a head", "half a body"])
def test_those_that_say_nothing_keep_nobody_out(callers: Callers, sent: bytes) -> None:
    waiting = [callers.connect(sent) for _ in range(20)]
    assert [callers.status() for _ in range(20)] == [b"200"] * 20
    assert all(ended(one) for one in waiting[:12])


def test_the_one_that_waits_longest_makes_room(callers: Callers) -> None:
    kept = callers.connect(HEALTH + b"\r\n")
    assert healthy(kept)
    silent = [callers.connect() for _ in range(7)]
    kept.sendall(HEALTH + b"\r\n")  # asks again, and so waits less long than they
    assert healthy(kept)
    assert callers.status() == b"200"
    assert ended(silent[0])
    kept.sendall(HEALTH + b"\r\n")
    assert healthy(kept)


@pytest.mark.parametrize("sent", [b"", HEALTH], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come_ends_the_connection(
    callers: Callers, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.1)
    assert ended(callers.connect(sent))


def test_nor_does_one_that_comes_bit_by_bit_go_on_for_ever(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.1)
    one = callers.connect(HEALTH + b"\r\n")
    assert healthy(one)
    one.settimeout(0.01)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):  # once it is ended
        while True:
            one.sendall(b"X")
            try:
                if not one.recv(1):
                    raise ConnectionResetError
            except TimeoutError:
                continue


def test_an_answer_that_nobody_takes_is_not_kept(
    callers: Callers, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is ended, not only closed: that waits until all is taken, and the answer with it."""
    lost, losing = threading.Event(), Connection.connection_lost

    def connection_lost(self: Connection, exc: Exception | None) -> None:
        losing(self, exc)
        lost.set()

    monkeypatch.setattr(Connection, "take_seconds", 0.1)
    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    monkeypatch.setattr(state.reader, "recent_steps", lambda last: ["x" * (32 << 20)])  # than any buffer
    callers.connect(b"GET /api/steps HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert lost.wait(SECONDS)


def test_an_answer_may_take_longer_than_a_head(
    callers: Callers, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.1)
    listening = callers.connect(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert listening.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert ended(callers.connect())  # so long ago it began
    state.events.add("verdict", "s", {"reason": "still here"})
    said = b""
    while b"still here" not in said:
        said += listening.recv(1 << 16)
