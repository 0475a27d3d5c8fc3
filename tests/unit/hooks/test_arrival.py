"""Times to first token, from the HTTP request that brought each engine request."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.vllm import arrival
from llmprobe.hooks.vllm.arrival import FirstTokens

HELD_NS = 20_000_000


def outputs(*ids: str) -> list[Any]:
    return [SimpleNamespace(request_id=request_id) for request_id in ids]


class SmallProbe:
    """What `arrival.install` needs of a probe."""

    active = True

    def __init__(self) -> None:
        self.patches: list[Patch] = []

    def patch(self, owner: Any, name: str, make: Any) -> None:
        patch = Patch(owner, name, make)
        patch.apply()
        self.patches.append(patch)


def serve_once(engine: Any) -> None:
    """Hand one real HTTP request to ``engine`` (a coroutine function), below the hook."""

    async def endpoint(request: Request) -> PlainTextResponse:
        # A task of its own, as streams are served in: it must inherit the arrival.
        await asyncio.ensure_future(engine())
        return PlainTextResponse("done")

    probe = SmallProbe()
    import starlette.applications

    arrival.install(probe, starlette.applications)  # type: ignore[arg-type]
    try:
        app = Starlette(routes=[Route("/", endpoint)])
        assert TestClient(app).get("/").text == "done"
    finally:
        for patch in probe.patches:
            assert patch.remove()


def test_without_http_a_request_arrives_when_the_engine_says() -> None:
    tokens = FirstTokens()
    tokens.arrived("a", time.monotonic_ns() - HELD_NS)
    tokens.outputs(outputs("a"))
    (seconds_ns,) = tokens.take()
    assert seconds_ns >= HELD_NS
    assert tokens.take() == ()


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
    (seconds_ns,) = tokens.take()
    assert seconds_ns >= HELD_NS


def test_requests_that_one_http_request_brings_at_once_all_arrive_with_it() -> None:
    tokens = FirstTokens()

    async def engine() -> None:
        await asyncio.sleep(HELD_NS / 1e9)
        for name in "ab":
            tokens.arrived(name, time.monotonic_ns())
        tokens.outputs(outputs("a", "b"))

    serve_once(engine)
    assert all(seconds_ns >= HELD_NS for seconds_ns in tokens.take())


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
        _, second = tokens.take()
        assert second <= heard - asked

    serve_once(engine)


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
    import inspect

    import starlette.applications
    from fastapi import FastAPI

    probe = SmallProbe()
    arrival.install(probe, starlette.applications)  # type: ignore[arg-type]
    try:
        for kind in (Starlette, FastAPI):
            assert inspect.iscoroutinefunction(kind().__call__)
    finally:
        for patch in probe.patches:
            patch.remove()
