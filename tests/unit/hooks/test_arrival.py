"""Times to first token, from the HTTP request that brought each engine request."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib.util
import inspect
import re
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import starlette.applications
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from llmprobe.hooks.guard import Guard
from llmprobe.hooks.patch import Patch
from llmprobe.hooks.vllm import arrival
from llmprobe.hooks.vllm.arrival import FirstToken, FirstTokens, HttpRequest, queued_ns

HELD_NS = 20_000_000


def outputs(*ids: str) -> list[Any]:
    return [SimpleNamespace(request_id=request_id) for request_id in ids]


class SmallProbe:
    """What `arrival.install` needs of a probe."""

    active = True

    def __init__(self) -> None:
        self.guard = Guard()
        self.patches: list[Patch] = []

    def patch(self, owner: Any, name: str, make: Any) -> None:
        patch = Patch(owner, name, make)
        patch.apply()
        self.patches.append(patch)


@contextlib.contextmanager
def hooked() -> Iterator[None]:
    probe = SmallProbe()
    arrival.install(probe, starlette.applications)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for patch in probe.patches:
            assert patch.remove()


def taken(tokens: FirstTokens) -> list[int]:
    """What is known of the first tokens since the last call, in nanoseconds."""
    return [token.seconds_ns() for token in tokens.take()]


def serve_once(engine: Any) -> None:
    """Hand one real HTTP request to ``engine`` (a coroutine function), below the hook."""

    async def endpoint(request: Request) -> PlainTextResponse:
        # A task of its own, as streams are served in: it must inherit the arrival.
        await asyncio.ensure_future(engine())
        return PlainTextResponse("done")

    with hooked():
        app = Starlette(routes=[Route("/", endpoint)])
        assert TestClient(app).get("/").text == "done"


def test_without_http_a_request_arrives_when_the_engine_says() -> None:
    tokens = FirstTokens()
    tokens.arrived("a", time.monotonic_ns() - HELD_NS)
    tokens.outputs(outputs("a"))
    (seconds_ns,) = taken(tokens)
    assert seconds_ns >= HELD_NS
    assert tokens.take() == ()


def happened(*events: tuple[int, float]) -> list[Any]:
    """What an engine says with an output: QUEUED is 1, SCHEDULED 2, PREEMPTED 3; at these of its seconds."""
    return [SimpleNamespace(type=kind, timestamp=seconds) for kind, seconds in events]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (happened((1, 5000.0), (2, 5000.25)), 250_000_000),
        (happened((1, 5000.0), (2, 5000.25), (3, 5001.0), (2, 5002.0)), 250_000_000),
        (happened((1, 5000.0)), None),  # aborted while it waited
        (happened((2, 5000.0)), None),
        ([], None),
        (None, None),
    ],
)
def test_a_request_is_queued_until_it_is_first_scheduled(events: Any, expected: int | None) -> None:
    assert queued_ns(events) == expected


def test_events_are_those_of_vllm() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(vllm.origin).parent / "v1/engine/__init__.py").read_text()
    assert re.search(r"class EngineCoreEventType\(.*?QUEUED = 1\s+SCHEDULED = 2\s", source, re.DOTALL)


def test_a_first_token_tells_how_long_its_request_was_queued() -> None:
    tokens = FirstTokens()
    for name in "ab":
        tokens.arrived(name, time.monotonic_ns())
    (a, b) = outputs("a", "b")
    a.events = happened((1, 1.0), (2, 1.5))
    tokens.outputs([a, b])
    assert {token.queue_ns() for token in tokens.take()} == {500_000_000, None}


def test_only_the_first_output_of_a_request_counts() -> None:
    tokens = FirstTokens()
    tokens.arrived("a", time.monotonic_ns())
    tokens.outputs(outputs("b", "a"))
    tokens.outputs(outputs("a", "b"))
    assert len(tokens.take()) == 1


def test_time_spent_in_the_http_layer_is_part_of_it() -> None:
    tokens = FirstTokens()

    async def engine() -> None:
        await asyncio.sleep(HELD_NS / 1e9)  # parsing, validation
        tokens.arrived("a", time.monotonic_ns())
        tokens.outputs(outputs("a"))

    serve_once(engine)
    (seconds_ns,) = taken(tokens)
    assert seconds_ns >= HELD_NS


def test_requests_that_one_http_request_brings_at_once_all_arrive_with_it() -> None:
    tokens = FirstTokens()

    async def engine() -> None:
        await asyncio.sleep(HELD_NS / 1e9)
        for name in "ab":
            tokens.arrived(name, time.monotonic_ns())
        tokens.outputs(outputs("a", "b"))

    serve_once(engine)
    both = taken(tokens)
    assert len(both) == 2
    assert min(both) >= HELD_NS


def test_a_request_made_after_the_first_answer_arrives_by_itself() -> None:
    """A conversation with tools asks the engine several times for one HTTP request."""
    tokens = FirstTokens()

    async def engine() -> None:
        tokens.arrived("a", time.monotonic_ns())
        tokens.outputs(outputs("a"))
        await asyncio.sleep(HELD_NS / 1e9)
        asked = time.monotonic_ns()
        tokens.arrived("b", asked)
        tokens.outputs(outputs("b"))
        heard = time.monotonic_ns()
        _, second = taken(tokens)
        assert second <= heard - asked

    serve_once(engine)


def test_requests_of_a_websocket_arrive_by_themselves() -> None:
    """They come long after their connection."""
    tokens = FirstTokens()

    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        await socket.receive_text()
        asked = time.monotonic_ns()
        tokens.arrived("a", asked)
        tokens.outputs(outputs("a"))
        (seconds_ns,) = taken(tokens)
        await socket.send_text(str(seconds_ns <= time.monotonic_ns() - asked))
        await socket.close()

    with hooked():
        app = Starlette(routes=[WebSocketRoute("/", endpoint)])
        with TestClient(app).websocket_connect("/") as socket:
            time.sleep(HELD_NS / 1e9)
            socket.send_text("go")
            assert socket.receive_text() == "True"


def test_an_application_inside_another_does_not_arrive_later() -> None:
    tokens = FirstTokens()

    async def endpoint(request: Request) -> PlainTextResponse:
        tokens.arrived("a", time.monotonic_ns())
        tokens.outputs(outputs("a"))
        return PlainTextResponse("done")

    class Slow:
        """Middleware of the outer application."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(HELD_NS / 1e9)
            await self.app(scope, receive, send)

    with hooked():
        inner = Starlette(routes=[Route("/", endpoint)])
        app = Starlette(routes=[Mount("/inner", app=inner)], middleware=[Middleware(Slow)])
        client = TestClient(app)
        for _ in range(2):  # and one request after another arrives anew
            assert client.get("/inner/").text == "done"
    first, second = taken(tokens)
    assert first >= HELD_NS
    assert second >= HELD_NS


def test_aborted_requests_are_forgotten() -> None:
    tokens = FirstTokens()
    for name in "abc":
        tokens.arrived(name, time.monotonic_ns())
    tokens.forget(["a", "unknown"])
    tokens.outputs(outputs("a"))
    assert tokens.take() == ()
    tokens.forget_all()
    tokens.outputs(outputs("b", "c"))
    assert tokens.take() == ()


def test_servers_still_take_a_hooked_application_for_asgi3() -> None:
    """uvicorn looks at the application's own ``__call__``; a plain function there means ASGI 2."""
    with hooked():
        for kind in (Starlette, FastAPI):
            assert inspect.iscoroutinefunction(kind().__call__)


async def streamed(pieces: list[tuple[bytes, float]], chunk: Any = None, broken: bool = False) -> list[bytes]:
    """Serve one request with a streaming response, without a network.

    Args:
        pieces: of the body, and for how long its connection takes each.
        chunk: called with a piece's number before it is made.
        broken: the connection fails at the first piece.

    Returns:
        The pieces that arrived.
    """
    got: list[bytes] = []
    slow = dict(pieces)

    async def endpoint(request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            for number, (piece, _) in enumerate(pieces):
                if chunk is not None:
                    chunk(number)
                yield piece

        return StreamingResponse(body())

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        if piece := message.get("body"):
            if broken:
                raise OSError("gone")
            await asyncio.sleep(slow[piece])
            got.append(piece)

    app = Starlette(routes=[Route("/", endpoint)])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    with contextlib.suppress(OSError):
        await app(scope, receive, send)
    return got


def test_the_first_token_of_a_stream_is_there_when_its_piece_was_sent() -> None:
    tokens = FirstTokens()
    first: list[FirstToken] = []
    there: list[int] = []

    def chunk(number: int) -> None:
        if number == 0:
            tokens.arrived("a", time.monotonic_ns())
            tokens.outputs(outputs("a"))
            first.extend(tokens.take())
            assert first[0].held
        else:
            assert not first[0].held  # before the next piece
            there.append(first[0].there_ns)

    with hooked():
        got = asyncio.run(streamed([(b"first", HELD_NS / 1e9), (b"second", 0.0), (b"third", 0.0)], chunk))
    assert got == [b"first", b"second", b"third"]
    (token,) = first
    assert token.seconds_ns() >= HELD_NS
    assert there == [token.there_ns] * 2  # once


def test_a_piece_before_the_first_token_holds_none() -> None:
    """A chat's stream may begin with the role alone."""
    tokens = FirstTokens()
    first: list[FirstToken] = []

    def chunk(number: int) -> None:
        if number == 0:
            tokens.arrived("a", time.monotonic_ns())
        elif number == 1:
            tokens.outputs(outputs("a"))
            first.extend(tokens.take())
        assert [token.held for token in first] == [[], [True], [False]][number]

    with hooked():
        pieces = [(b"role", 0.0), (b"first", HELD_NS / 1e9), (b"second", 0.0)]
        assert len(asyncio.run(streamed(pieces, chunk))) == 3
    assert first[0].seconds_ns() >= HELD_NS


def test_a_first_token_that_is_never_sent_counts_from_the_engine() -> None:
    tokens = FirstTokens()
    first: list[tuple[FirstToken, int]] = []

    def chunk(number: int) -> None:
        tokens.arrived("a", time.monotonic_ns())
        tokens.outputs(outputs("a"))
        (token,) = tokens.take()
        assert token.held
        first.append((token, token.seconds_ns()))

    with hooked():
        got = asyncio.run(streamed([(b"first", 0.0)], chunk, broken=True))
    assert got == []
    ((token, known),) = first
    assert not token.held
    assert token.seconds_ns() == known


def test_a_token_nobody_asks_about_is_sent_all_the_same() -> None:
    """Such as one whose numbers did not match vLLM's."""
    tokens = FirstTokens()

    def chunk(number: int) -> None:
        tokens.arrived("a", time.monotonic_ns())
        tokens.outputs(outputs("a"))
        tokens.take()

    with hooked():
        assert asyncio.run(streamed([(b"first", 0.0)], chunk)) == [b"first"]


def messages(kind: str) -> Any:
    """One that an application sends."""
    if kind == "start":
        return {"type": "http.response.start", "status": 200, "headers": []}
    return {"type": "http.response.body", "body": b"piece" if kind == "piece" else b"", "more_body": True}


@given(st.lists(st.sampled_from(["token", "piece", "empty"]), max_size=12), st.booleans())
def test_each_token_leaves_with_the_next_piece_and_no_other_piece_passes_through_our_code(
    events: list[str], before: bool
) -> None:
    got: list[Any] = []

    async def send(message: Any) -> None:
        got.append(message)

    async def serve() -> None:
        http = HttpRequest(0)
        handed = http.watched(send, Guard())
        made = []
        if before:  # a token that is there before the response begins is held by no piece
            http.hold(FirstToken(0, 1))
        sent = [messages("start")]
        await handed(sent[0])
        waiting: list[FirstToken] = []
        for event in events:
            if event == "token":
                token = FirstToken(0, 1)
                http.hold(token)
                waiting.append(token)
                made.append(token)
                continue
            message = messages(event)
            sent.append(message)
            await handed(message)
            if event == "piece":
                waiting.clear()
            assert [token for token in made if token.held] == waiting
            assert (handed.func is send) is (not waiting)  # type: ignore[attr-defined]
        http.let_go()
        assert not any(token.held for token in made)
        assert handed.func is send  # type: ignore[attr-defined]
        assert got == sent

    asyncio.run(serve())


def test_a_request_that_is_over_keeps_nothing_of_its_connection_and_holds_no_token() -> None:
    class Connection:
        async def send(self, message: Any) -> None:
            pass

    connection, http = Connection(), HttpRequest(0)
    kept = weakref.ref(connection)
    handed = http.watched(connection.send, Guard())
    gc.disable()  # which would find rings
    try:
        for kind in ("start", "piece"):
            asyncio.run(handed(messages(kind)))
            http.hold(FirstToken(0, 1))
        http.end()
        late = FirstToken(0, 1)
        http.hold(late)  # its client has left, and the engine did not know yet
        assert not late.held
        del handed, connection
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.swallows
def test_an_error_of_ours_while_a_piece_is_sent_does_not_reach_the_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = FirstTokens()
    calls = []

    def fails(self: HttpRequest, there_ns: int | None = None) -> None:
        calls.append(there_ns)
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(HttpRequest, "let_go", fails)

    def chunk(number: int) -> None:
        if number == 0:
            tokens.arrived("a", time.monotonic_ns())
            tokens.outputs(outputs("a"))

    with hooked():
        assert asyncio.run(streamed([(b"first", 0.0), (b"second", 0.0)], chunk)) == [b"first", b"second"]
    assert any(there_ns is not None for there_ns in calls)  # while it was sent, not at the end


@pytest.mark.swallows
def test_an_error_of_ours_as_a_request_arrives_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: HttpRequest, send: Any, guard: Guard) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(HttpRequest, "watched", fails)
    with hooked():
        assert asyncio.run(streamed([(b"first", 0.0)])) == [b"first"]


def test_requests_that_another_thread_forgets_meanwhile_have_no_token() -> None:
    tokens = FirstTokens()
    tokens.arrived("a", time.monotonic_ns())

    class Output:
        reads = 0

        @property
        def request_id(self) -> str:
            self.reads += 1
            if self.reads == 2:
                tokens.forget_all()
            return "a"

    tokens.outputs([Output()])
    assert tokens.take() == ()


def test_a_partial_that_middleware_makes_of_send_sees_the_exchange_too() -> None:
    """Python melts a partial of a partial into one, of what that calls at the moment."""
    got: list[Any] = []

    async def send(message: Any) -> None:
        got.append(message)

    http = HttpRequest(0)
    handed = http.watched(send, Guard())
    wrapped = functools.partial(handed)
    assert wrapped.func is handed
    asyncio.run(wrapped(messages("start")))
    token = FirstToken(0, 1)
    http.hold(token)
    assert token.held
    asyncio.run(wrapped(messages("piece")))
    assert not token.held
    assert handed.func is send  # type: ignore[attr-defined]
    assert len(got) == 2


def test_a_token_that_waits_when_the_probe_gives_up_still_leaves_and_takes_our_code_along() -> None:
    async def send(message: Any) -> None:
        pass

    http, guard = HttpRequest(0), Guard()
    handed = http.watched(send, guard)
    asyncio.run(handed(messages("start")))
    http.hold(FirstToken(0, 1))
    guard.inert = True
    asyncio.run(handed(messages("piece")))
    assert handed.func is send  # type: ignore[attr-defined]


def test_a_response_under_way_when_the_probe_gives_up_is_ended_all_the_same() -> None:
    """Else its functions would keep the connection until memory is swept."""
    kept: list[Any] = []

    class Connection:
        async def send(self, message: Any) -> None:
            pass

    async def application(scope: Any, receive: Any, send: Any) -> None:
        probe.guard.inert = True

    async def serve() -> None:
        connection = Connection()
        kept.append(weakref.ref(connection))
        await module.Starlette()({"type": "http"}, None, connection.send)

    web = type("Starlette", (), {"__call__": lambda self, *given: application(*given)})
    probe, module = SmallProbe(), SimpleNamespace(Starlette=web)
    arrival.install(probe, module)  # type: ignore[arg-type]
    gc.disable()
    try:
        asyncio.run(serve())
        assert kept[0]() is None
    finally:
        gc.enable()
