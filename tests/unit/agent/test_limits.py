"""What one caller may ask of the agent, and how often: nobody else must notice."""

from __future__ import annotations

import asyncio
import functools
import http.client
import logging
import socket
import threading
from collections import Counter
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from llmprobe.agent import door, limits
from llmprobe.agent.bucket import Bucket
from llmprobe.agent.connections import Connection
from llmprobe.agent.door import Door, DoorKeeper, door_for
from llmprobe.agent.files import Token
from llmprobe.agent.limits import Limits
from llmprobe.agent.service import State, create_app
from llmprobe.capture.manager import Manager

from .served import HERE, problem, serving


def test_a_large_body_is_413(client: TestClient) -> None:
    problem(client.post("/api/captures", content=b"x" * 70_000), 413)
    problem(client.post("/api/captures", content=(b"x" * 1000 for _ in range(70))), 413)


def limit(monkeypatch: pytest.MonkeyPatch, **defaults: Any) -> None:
    """Other limits than the agent's own."""
    monkeypatch.setattr(Limits.__init__, "__kwdefaults__", {**Limits.__init__.__kwdefaults__, **defaults})


@pytest.fixture
def standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes for those who count calls: a slow machine must not be let through. Nor is it waited."""
    for module in (limits, door):
        monkeypatch.setattr(module, "Bucket", functools.partial(Bucket, clock=lambda: 0.0))
    limit(monkeypatch, hold_seconds=0.01)
    monkeypatch.setattr(DoorKeeper.__init__, "__defaults__", (0.01,))


def test_too_many_calls_are_429_and_scrapes_go_on(standing_still: None, client: TestClient) -> None:
    codes = [client.get("/api/captures").status_code for _ in range(110)]
    assert codes == [200] * 100 + [429] * 10
    refused = client.get("/api/captures")
    assert refused.headers["retry-after"]
    assert client.get("/metrics").status_code == 200
    assert client.get("/api/status").status_code == 200


def test_callers_without_the_token_do_not_use_up_the_calls(
    standing_still: None, bare: TestClient, token: Token
) -> None:
    for _ in range(300):
        assert bare.get("/api/captures").status_code == 401
    answer = bare.get("/api/captures", headers={"Authorization": f"Bearer {token.value()}"})
    assert answer.status_code == 200


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the agent's thread has worked, as the test says."""
    seconds = [0.0]
    limit(monkeypatch, work=lambda: seconds[0])
    return seconds


def loopback(state: State, token: Token) -> TestClient:
    """Over loopback, without the token."""
    return TestClient(create_app(state, door_for("127.0.0.1", token, token_file_given=False)), HERE)


def working(state: State, worked: list[float], seconds: float) -> None:
    """Each look at the servers takes so long, of applications that are made from now on."""
    views = state.reader.views

    def slow() -> list[Any]:
        worked[0] += seconds
        return views()

    state.reader.views = slow  # type: ignore[method-assign]


def test_who_reads_without_a_token_gets_a_share_of_a_core(
    standing_still: None, worked: list[float], state: State, token: Token
) -> None:
    working(state, worked, 0.5)
    bare = loopback(state, token)
    assert [bare.get("/api/status").status_code for _ in range(6)] == [200] * 4 + [429] * 2
    refused = problem(bare.get("/api/status"), 429)
    assert "less often" in refused["next"]
    assert int(bare.get("/api/steps").headers["retry-after"]) >= 1
    assert bare.get("/metrics").status_code == 200  # scrapes have a share of their own
    assert worked[0] == 0.5 * 4 + 0.5  # nothing was done for those that were refused


def test_of_many_who_ask_at_once_none_gets_more_than_that(
    standing_still: None, worked: list[float], state: State, token: Token
) -> None:
    """All have asked before the first is answered."""
    working(state, worked, 0.5)
    app = create_app(state, door_for("127.0.0.1", token, token_file_given=False))

    async def ask_at_once() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=HERE) as bare:
            answers = await asyncio.gather(*(bare.get("/api/status") for _ in range(20)))
            return [one.status_code for one in answers]

    assert Counter(asyncio.run(ask_at_once())) == {200: 4, 429: 16}


def test_scrapes_have_an_end_too_and_do_not_use_up_the_rest(
    standing_still: None, worked: list[float], state: State, token: Token
) -> None:
    working(state, worked, 0.5)
    bare = loopback(state, token)
    assert [bare.get("/metrics").status_code for _ in range(6)] == [200] * 4 + [429] * 2
    assert bare.get("/api/status").status_code == 200
    auth = {"Authorization": f"Bearer {token.value()}"}
    assert bare.get("/api/captures", headers=auth).status_code == 200


def test_a_scrape_every_second_of_many_servers_is_let_through(
    worked: list[float], state: State, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(limits, "Bucket", functools.partial(Bucket, clock=lambda: now))
    working(state, worked, 0.09)
    client = loopback(state, token)
    for _ in range(100):
        now += 1.0
        assert client.get("/metrics").status_code == 200


def test_the_servers_own_user_is_not_bounded(standing_still: None, worked: list[float], state: State) -> None:
    working(state, worked, 60.0)
    client = TestClient(create_app(state, Door("unix", None)))
    assert {client.get("/api/status").status_code for _ in range(5)} == {200}


def test_who_is_refused_again_and_again_is_kept_waiting_and_makes_room(
    state: State, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next one comes: else those who wait would keep everybody out."""
    monkeypatch.setattr(limits, "Bucket", functools.partial(Bucket, clock=lambda: 0.0))
    limit(monkeypatch, work=lambda: 0.0, hold_seconds=3600.0)
    monkeypatch.setattr(Connection, "most", 4)
    monkeypatch.setattr(limits, "_CALL_SECONDS", 2.0)
    request = b"GET /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(create_app(state, door_for("127.0.0.1", token, token_file_given=False))) as address:
        with socket.create_connection(address) as first:
            first.sendall(request)
            assert first.makefile("rb").readline().startswith(b"HTTP/1.1 200")
        held = [socket.create_connection(address) for _ in range(4)]
        for one in held:
            one.sendall(request)
        scraper = socket.create_connection(address)
        scraper.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert scraper.makefile("rb").readline().startswith(b"HTTP/1.1 200")
        for one in (*held, scraper):
            one.close()


def test_a_bucket_fills_again() -> None:
    now = 0.0
    bucket = Bucket(rate=2, burst=3, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now = 60.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_a_debt_is_paid_first() -> None:
    now = 0.0
    bucket = Bucket(rate=0.5, burst=2, clock=lambda: now)
    assert bucket.empty_seconds() == 0
    bucket.pay(3)
    assert bucket.empty_seconds() == 2
    now = 1.0
    assert bucket.empty_seconds() == 1
    now = 2.0
    assert bucket.empty_seconds() == 0


def test_a_slow_body_is_408_and_holds_nobody_up(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, body_seconds=0.3)
    with serving(create_app(state, Door("unix", None))) as address:
        slow = socket.create_connection(address)
        slow.sendall(
            b"POST /api/captures HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
        quick = socket.create_connection(address)
        quick.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert quick.makefile("rb").readline().startswith(b"HTTP/1.1 200")
        assert slow.makefile("rb").readline().startswith(b"HTTP/1.1 408")
        quick.close()
        slow.close()


def test_a_flood_of_calls_begins_nothing_and_breaks_nothing(
    standing_still: None, state: State, token: Token, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    """How it looks from the server that is watched is measured: benchmarks/capture_cost.py --flood."""
    caplog.set_level(logging.INFO)
    seen: list[tuple[bool, int]] = []
    app = create_app(state, door_for("127.0.0.1", token, token_file_given=False))

    def call(address: tuple[str, int], known: bool) -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        headers = {"Authorization": f"Bearer {token.value() if known else 'wrong'}"}
        headers["Content-Type"] = "application/json"
        for _ in range(100):
            connection.request("POST", "/api/captures", b'{"tool": "nsys"}', headers)
            answer = connection.getresponse()
            answer.read()
            seen.append((known, answer.status))
        connection.close()

    with serving(app) as address:
        threads = [threading.Thread(target=call, args=(address, number % 2 == 0)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        connection.close()
    # There is no nsys here, so what the limit lets through is refused for that.
    assert Counter(seen) == {(True, 409): 100, (True, 429): 100, (False, 401): 200}
    assert manager.all() == []
    said = [record for record in caplog.records if record.name == "llmprobe.audit"]
    assert len(said) <= 100  # the log is not flooded either
