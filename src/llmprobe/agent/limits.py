"""What one caller may ask of the agent: how large, how slow, how often. And who asked for what.

The agent shares its machine with the server that it watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import struct
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprobe.agent.bucket import HOLD_SECONDS, Bucket, gone, hold
from llmprobe.agent.door import PUBLIC_PATHS, is_guarded
from llmprobe.agent.problems import Problem

log = logging.getLogger("llmprobe.audit")

MOST_BODY_BYTES = 64 << 10
_BODY_SECONDS = 10.0
#: For scrapes, and again for all else that is read without a token.
_SHARE_OF_CORE = 0.1
_BURST_SECONDS = 2.0
#: What a call takes beside its handler, about: to parse it, and to write the answer.
_CALL_SECONDS = 0.001


class Limits:
    """ASGI middleware: bodies of at most 64 KiB within 10 s, guarded calls at a bounded rate, a bounded share
    of a core for the others.

    What those take is paid for when it is known: a scrape may take a hundred times as long as a look at the
    agent's health, and with many servers a hundred times as long as with one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        bounded: bool = True,
        body_seconds: float = _BODY_SECONDS,
        hold_seconds: float = HOLD_SECONDS,
        work: Callable[[], float] = time.thread_time,
    ) -> None:
        """
        Args:
            bounded: whether calls that need no token are bounded too.
            hold_seconds: how long those wait for their 429.
            work: seconds that the event loop's thread has worked.
        """
        self._app = app
        self._bounded = bounded
        self._body_seconds = body_seconds
        self._hold_seconds = hold_seconds
        self._work = work
        self._calls = Bucket(rate=50, burst=100)
        self._scrapes = Bucket(rate=_SHARE_OF_CORE, burst=_BURST_SECONDS)
        self._reads = Bucket(rate=_SHARE_OF_CORE, burst=_BURST_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body within the limits and pass it on, or answer with the problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        budget = None
        try:
            if is_guarded(scope["method"], scope["path"]):
                if not self._calls.take():
                    raise _too_many(1.0)
            elif self._bounded:
                budget = self._scrapes if scope["path"] in PUBLIC_PATHS else self._reads
            body = await asyncio.wait_for(_body(receive), self._body_seconds)
            # Nothing waits between this and the handler: of many who ask at once each finds what is left.
            if budget is not None and body is not None and (empty := budget.empty_seconds()):
                await hold(scope, receive, self._hold_seconds)
                raise _too_many(empty)
        except asyncio.TimeoutError:
            late = Problem(408, f"The body took over {self._body_seconds:g} s.", "Send it at once.")
            await late.response()(scope, receive, send)
            return
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        if body is None:
            return  # the caller has left
        scope.setdefault("state", {})["abort"] = _abort_of(receive)
        if budget is not None:
            send = self._paying(budget, send)
        await self._app(scope, _replay(body, receive), send)

    def _paying(self, budget: Bucket, send: Send) -> Send:
        """``send`` that pays for what was done before the answer begins: later, streams wait for events.

        Handlers work on the event loop and without a pause, so that it is theirs alone.
        """
        begun = self._work()

        async def paying(message: Message) -> None:
            if message["type"] == "http.response.start":
                budget.pay(self._work() - begun + _CALL_SECONDS)
            await send(message)

        return paying


def _too_many(seconds: float) -> Problem:
    after = str(max(1, math.ceil(seconds)))
    return Problem(429, "Too many calls.", "Ask less often; once a second shows all.", {"Retry-After": after})


async def abort(scope: Scope, receive: Receive) -> None:
    """End a request's connection now, with all that waits to be taken, and return once that is so.

    To return from an application, or to raise, makes uvicorn close it only when what it has written is taken.
    """
    end = scope.get("state", {}).get("abort")
    if end is None:
        return
    end()
    await gone(receive)


def _abort_of(receive: Receive) -> Callable[[], None] | None:
    """What ends the connection that uvicorn receives from; None where no uvicorn does.

    ASGI has nothing for it: of its connection uvicorn gives the application this one method.
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if not isinstance(transport, asyncio.WriteTransport):
        return None

    def end() -> None:
        with contextlib.suppress(OSError, AttributeError):  # closed already, or no socket
            # Without lingering: else the kernel keeps what it holds until it is taken.
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        transport.abort()

    return end


async def _body(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    taken = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        taken += len(parts[-1])
        if taken > MOST_BODY_BYTES:
            raise Problem(
                413,
                f"The body is larger than {MOST_BODY_BYTES >> 10} KiB.",
                "See GET /openapi.json for what is allowed.",
                {"Connection": "close"},
            )
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Audit:
    """ASGI middleware: one line in the log for each guarded call, whether it was let in or not."""

    def __init__(self, app: ASGIApp, kind: str, bucket: Bucket | None = None) -> None:
        self._app = app
        self._kind = kind
        self._bucket = bucket or Bucket(rate=10, burst=100)
        self._unsaid = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on and say how it was answered."""
        if scope["type"] != "http" or not is_guarded(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._say(scope, status)

    def _say(self, scope: Scope, status: int) -> None:
        # Following a capture's progress asks twice a second and shows nothing.
        polling = status == 200 and scope["method"] == "GET" and scope["path"].count("/") <= 3
        if polling:
            return
        if not self._bucket.take():
            self._unsaid += 1
            return
        unsaid, self._unsaid = self._unsaid, 0
        client = scope.get("client")
        caller = f"{client[0]}:{client[1]}" if client and client[0] else "-"
        log.info(
            "%s %r from %s (%s): %s%s",
            scope["method"],
            scope["path"][:120],  # in quotes: a path may hold line ends
            caller,
            self._kind,
            status or "no answer",
            f"; {unsaid} calls before it not said" if unsaid else "",
        )
