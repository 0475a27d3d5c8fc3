"""``GET /api/events`` through the agent's real application, driven as a server drives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from llmprobe.agent import events as served
from llmprobe.agent.door import Door, DoorKeeper, door_for
from llmprobe.agent.event_log import EventLog
from llmprobe.agent.events import Watch
from llmprobe.agent.files import Token, write_atomically
from llmprobe.agent.listen import bind_unix
from llmprobe.agent.server import _Server
from llmprobe.agent.service import State, create_app
from llmprobe.capture.session import Capture, Request
from llmprobe.collect.collector import Collector

SECONDS = 30.0  # for a test that hangs


@pytest.fixture
def log() -> EventLog:
    return EventLog(most=200, most_listeners=2)


@pytest.fixture
def app(log: EventLog, tmp_path: Path) -> Iterator[Any]:
    collector = Collector(tmp_path)
    door = door_for("127.0.0.1", Token.make(tmp_path), token_file_given=False)
    yield create_app(State(collector, tmp_path, events=log), door)
    collector.close()


class Listening:
    """One request to the application, and what it has sent so far."""

    def __init__(self, app: Any, query: str = "", **headers: str) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.text = ""
        self._more = asyncio.Event()
        self._gone = asyncio.Event()
        self._asked = False
        names = {"host": "127.0.0.1:9480", **headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/api/events",
            "raw_path": b"/api/events",
            "query_string": query.encode(),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in names.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 9480),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self.send))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.text += message.get("body", b"").decode()
        self._more.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), SECONDS)

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in self.text.splitlines() if line.startswith("data: ")]

    def ids(self) -> list[int]:
        return [int(line[4:]) for line in self.text.splitlines() if line.startswith("id: ")]

    async def leave(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, SECONDS)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * SECONDS))  # type: ignore[arg-type]


def test_events_come_as_they_happen_and_none_from_before(app: Any, log: EventLog) -> None:
    async def test() -> None:
        log.add("verdict", "s", {"phase": "before"})
        listening = Listening(app)
        await listening.until(lambda: "retry: 2000" in listening.text)
        assert listening.status == 200
        assert listening.headers["content-type"].startswith("text/event-stream")
        assert listening.headers["cache-control"] == "no-store"
        for at in range(3):
            number = log.add("verdict", "s", {"at": at})
            await listening.until(lambda at=at: len(listening.events()) > at)  # type: ignore[misc]
            assert listening.ids()[-1] == listening.events()[-1]["id"] == number
        assert [event["at"] for event in listening.events()] == [0, 1, 2]
        await listening.leave()

    run(test)


@pytest.mark.parametrize("how", ["header", "query", "header over query"])
def test_whoever_comes_back_gets_what_it_missed(app: Any, log: EventLog, how: str) -> None:
    numbers = [log.add("verdict", "s", {"at": at}) for at in range(100)]
    last = str(numbers[9])

    async def test() -> None:
        if how == "header":
            listening = Listening(app, last_event_id=last)
        elif how == "query":
            listening = Listening(app, f"after={last}")
        else:
            listening = Listening(app, "after=0", last_event_id=last)
        await listening.until(lambda: len(listening.ids()) >= 90)
        assert listening.ids() == numbers[10:]
        await listening.leave()

    run(test)


def test_what_the_ring_lost_is_said_and_then_it_goes_on(app: Any, log: EventLog) -> None:
    numbers = [log.add("verdict", "s", {"at": at}) for at in range(250)]

    async def test() -> None:
        listening = Listening(app, "after=0")
        await listening.until(lambda: len(listening.ids()) >= 201)
        first = listening.events()[0]
        assert (first["kind"], first["id"]) == ("missed", numbers[49])
        assert listening.ids()[1:] == numbers[50:]
        await listening.leave()
        again = Listening(app, f"after={first['id']}")
        await again.until(lambda: len(again.ids()) >= 200)
        assert again.ids() == numbers[50:]
        await again.leave()

    run(test)


def test_a_number_of_another_life_waits_for_what_comes(app: Any, log: EventLog) -> None:
    async def test() -> None:
        log.add("verdict", "s", {})
        listening = Listening(app, last_event_id=str(2**53))
        await listening.until(lambda: "retry" in listening.text)
        number = log.add("verdict", "s", {})
        await listening.until(lambda: bool(listening.ids()))
        assert listening.ids() == [number]
        await listening.leave()

    run(test)


@pytest.mark.parametrize("given", ["x", "-1", "1.5", str(2**60)])
def test_a_wrong_number_is_a_problem_that_names_it(app: Any, given: str) -> None:
    client = TestClient(app, base_url="http://127.0.0.1:9480")
    for answer in (
        client.get("/api/events", headers={"Last-Event-ID": given}),
        client.get(f"/api/events?after={given}"),
    ):
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
    assert "after" in answer.json()["detail"]


def test_one_more_listener_than_allowed_is_refused_until_one_leaves(app: Any, log: EventLog) -> None:
    async def test() -> None:
        both = [Listening(app), Listening(app)]
        for listening in both:
            await listening.until(lambda listening=listening: bool(listening.text))  # type: ignore[misc]
        refused = Listening(app)
        await asyncio.wait_for(refused.task, SECONDS)
        assert refused.status == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["retry-after"] == "30"
        assert json.loads(refused.text)["next"].endswith(".")
        await both[0].leave()
        third = Listening(app)
        await third.until(lambda: bool(third.text))
        assert third.status == 200
        await third.leave()
        await both[1].leave()

    run(test)


def test_one_that_takes_nothing_holds_up_nobody_and_loses_its_place(
    app: Any, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_SEND_SECONDS", 0.05)

    class Stuck(Listening):
        async def send(self, message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()
            await super().send(message)

    async def test() -> None:
        stuck, other = Stuck(app), Listening(app)
        await other.until(lambda: bool(other.text))
        number = log.add("verdict", "s", {})
        await other.until(lambda: other.ids() == [number])
        await asyncio.wait_for(stuck.task, SECONDS)
        third = Listening(app)
        await third.until(lambda: bool(third.text))
        for listening in (other, third):
            await listening.leave()

    run(test)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_one_that_takes_nothing_loses_its_connection_too(
    app: Any, log: EventLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path, kind: str,
) -> None:  # fmt: skip
    """Behind the server of the agent itself, which would wait until its buffer is taken."""
    monkeypatch.setattr(served, "_SEND_SECONDS", 0.1)
    for _ in range(200):
        log.add("verdict", "s", {"reason": "x" * 100_000})
    listener = bind_unix(tmp_path) if kind == "unix" else socket.create_server(("127.0.0.1", 0))
    client = socket.socket(listener.family)

    async def test() -> None:
        server = _Server(app, listener)
        serving = asyncio.ensure_future(server.serve([listener]))
        await asyncio.to_thread(client.connect, listener.getsockname())
        client.sendall(b"GET /api/events?after=0 HTTP/1.1\r\nHost: 127.0.0.1:9480\r\n\r\n")
        seen = False
        while not seen or server.server_state.connections or server.server_state.tasks:
            seen = seen or bool(server.server_state.connections)
            await asyncio.sleep(0.01)
        both = [Listening(app), Listening(app)]
        for listening in both:
            await listening.until(lambda listening=listening: bool(listening.text))  # type: ignore[misc]
            assert listening.status == 200
            await listening.leave()
        server.leave()
        await serving
        taken = 0
        client.settimeout(SECONDS)
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(1 << 20):
                taken += len(piece)
        assert taken < 200 * 100_000  # what it did not take was thrown away

    try:
        run(test)
    finally:
        client.close()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_stream_ends_once_the_door_would_no_longer_let_it_in(tmp_path: Path, log: EventLog) -> None:
    door = door_for("0.0.0.0", Token.make(tmp_path), token_file_given=True)
    assert door.token is not None
    assert door.sessions is not None
    app = FastAPI()
    served.add_routes(app, log, heartbeat_seconds=0.01)
    app.add_middleware(DoorKeeper, door=door)
    bearer = {"authorization": f"Bearer {door.token.value()}"}
    cookie, other = (
        {"cookie": f"llmprobe_session_9480={door.sessions.begin()}", "host": "127.0.0.1:9480"}
        for _ in range(2)
    )

    async def alive(listening: Listening) -> None:
        count = listening.text.count("alive")
        await listening.until(lambda: listening.text.count("alive") >= count + 2)

    async def test() -> None:
        left, stays = Listening(app, **cookie), Listening(app, **other)
        for listening in (left, stays):
            await alive(listening)
            assert listening.status == 200
        assert door.sessions is not None
        assert door.sessions.end(cookie)
        told = left.ids()
        log.add("verdict", "s", {})  # before it is let go, but after its session
        await asyncio.wait_for(left.task, SECONDS)
        assert left.ids() == told
        await alive(stays)
        program = Listening(app, **bearer)
        await alive(program)
        assert door.token is not None
        write_atomically(door.token.path, b"another\n")
        for listening in (stays, program):
            await asyncio.wait_for(listening.task, SECONDS)

    run(test)


def test_a_quiet_stream_shows_that_it_lives(log: EventLog) -> None:
    app = FastAPI()
    served.add_routes(app, log, heartbeat_seconds=0.01)

    async def test() -> None:
        listening = Listening(app)
        await listening.until(lambda: listening.text.count(": alive\n\n") >= 3)
        assert listening.events() == []
        await listening.leave()

    run(test)


def test_streams_end_with_the_agent(app: Any, log: EventLog) -> None:
    async def test() -> None:
        listening = Listening(app)
        await listening.until(lambda: bool(listening.text))
        log.close()
        await asyncio.wait_for(listening.task, SECONDS)

    run(test)


def test_other_hosts_and_sites_are_refused(app: Any) -> None:
    client = TestClient(app, base_url="http://127.0.0.1:9480")
    assert client.get("/api/events", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/api/events", headers={"Origin": "http://evil.example"}).status_code == 403
    image = client.get("/api/events", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"})
    assert image.status_code == 403
    assert image.headers["content-type"] == "application/problem+json"


def test_beyond_loopback_it_needs_the_token(tmp_path: Path, log: EventLog) -> None:
    token = Token.make(tmp_path)
    for door, status in ((Door("open", None), 403), (Door("open", token), 401)):
        app = create_app(State(Collector(tmp_path), tmp_path, events=log), door)
        assert TestClient(app, base_url="http://127.0.0.1:9480").get("/api/events").status_code == status


@pytest.mark.parametrize(
    "state", [{"s": {}}, {"s": None}, {"s": {"engines": 3}}, {"s": {"stalls": {"0/0": {}}}}]
)
def test_what_stood_in_another_shape_keeps_no_agent_from_starting(
    tmp_path: Path, state: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.json"
    before = EventLog(path)
    number = before.add("verdict", "s", {})
    before.save(state)
    after = EventLog(path)
    watch = Watch(after)
    watch.look([])
    assert after.newest == number
    assert ("not read" in caplog.text) is (state != {"s": {}})


def test_a_captures_states_are_events_without_what_needs_the_token(log: EventLog) -> None:
    request = Request("torch", 5.0, None, label="a secret label")
    capture = Capture("20260101-000000-abcdef", "/dev/shm/x", "s", "g", request)
    watch = Watch(log)
    watch.capture(capture)
    watch.capture(capture.enter("failed", 1.0, reason="/a/secret/path"))
    told = [json.loads(event.text) for event in log.after(0)[0]]
    assert [event["state"] for event in told] == ["pending", "failed"]
    assert {event["kind"] for event in told} == {"capture"}
    assert "secret" not in json.dumps(told)
