"""When a request reached the server, and when its first token left it.

vLLM takes a request for arrived once its HTTP layer has read, parsed and validated it, and a token for there
once the engine has said it; whoever waits for a token waits for the rest too. Here a request arrives when the
application is called with its headers, and the first token of a streaming response is there when the piece
that holds it has been handed to the connection. Of any other response, and without HTTP, it is there when it
is detokenized and with its stream.

The HTTP request travels in a context variable, which the tasks that serve it inherit.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from llmprobe.hooks.guard import Guard
from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe

_now = time.monotonic_ns
_AT_MOST = 8192  # first tokens, should vLLM not tell of their iterations; engines take on fewer in one
_QUEUED, _SCHEDULED = 1, 2  # vLLM's EngineCoreEventType, in every version so far


def queued_ns(events: Any) -> int | None:
    """How long a request was queued, by what the engine says with its first output; None if it does not.

    Both times are of the engine's clock.
    """
    queued: float | None = None
    for event in events or ():
        if event.type == _QUEUED and queued is None:
            queued = event.timestamp
        elif event.type == _SCHEDULED and queued is not None:  # the first time: later ones are preemptions
            seconds: float = event.timestamp - queued
            return max(round(seconds * 1e9), 0)
    return None


class FirstToken:
    """The first token of one engine request: noted on the event loop, counted when iterations are."""

    __slots__ = ("arrived_ns", "events", "held", "there_ns")

    def __init__(self, arrived_ns: int, there_ns: int, events: Any = None) -> None:
        """
        Args:
            events: what the engine said with it, see `queued_ns`.
        """
        self.arrived_ns = arrived_ns
        self.there_ns = there_ns
        self.events = events
        #: It waits for the piece of a response that will hold it; `there_ns` is not its last word then.
        self.held = False

    def seconds_ns(self) -> int:
        """Nanoseconds from arrival to what is known so far."""
        return self.there_ns - self.arrived_ns

    def queue_ns(self) -> int | None:
        """How long the request was queued; None if that is not known."""
        return queued_ns(self.events)


class HttpRequest:
    """One HTTP request; it may bring several requests for the engine, at once or one after another."""

    __slots__ = (
        "_handing",
        "_held",
        "_plain",
        "_streaming",
        "_watched",
        "_watching",
        "answered",
        "arrived_ns",
        "scope",
    )

    def __init__(self, arrived_ns: int, scope: Any = None) -> None:
        self.arrived_ns = arrived_ns
        self.scope = scope
        #: It has had a token: what the engine is asked from now on did not arrive with it.
        self.answered = False
        #: Its response began before a token was there: tokens are sent as they come.
        self._streaming = False
        self._held: list[FirstToken] = []
        #: What the application calls to send; what that calls until the response has begun and while a first
        #: token is held, and else; and whether it is the former.
        self._handing: functools.partial[Any] | None = None
        self._watching: Callable[[Any], Any] | None = None
        self._plain: Callable[[Any], Any] | None = None
        self._watched = False

    def hold(self, token: FirstToken) -> None:
        """A first token for this request, which the next piece of a streaming response holds."""
        self.answered = True
        if self._streaming:
            token.held = True
            self._held.append(token)
            if not self._watched:
                self._watched = True
                self._hand(self._watching)

    def watched(self, send: Callable[[Any], Any], guard: Guard) -> Callable[[Any], Any]:
        """``send`` that lets first tokens go. Any other piece passes through no code of ours.

        One event loop sends every piece of every stream, thousands a second: a function around each took it
        1 to 2 µs. So this is a `functools.partial`: of ``send`` itself, except at the start and while a first
        token waits.
        """

        async def sending(message: Any) -> None:
            await send(message)
            try:  # also inert: else every piece to come would pass through here
                self.let_go(_now())
            except Exception as error:  # noqa: BLE001 - at each request: inline, and not by `Guard.call`
                guard.failed("vllm.first_token", error)

        def watching(message: Any) -> Any:
            if self._held:
                if message["type"] == "http.response.body" and message.get("body"):
                    return sending(message)
            elif message["type"] == "http.response.start":
                self._streaming, self._watched = True, False
                self._hand(send)
            return send(message)

        self._watching, self._plain, self._watched = watching, send, True
        self._handing = functools.partial(send)
        self._hand(watching)
        return self._handing

    def let_go(self, there_ns: int | None = None) -> None:
        """What was held has been sent, or (None) will not be."""
        held = self._held
        if not held:
            return
        self._held, self._watched = [], False
        self._hand(self._plain)
        for token in held:
            if there_ns is not None:
                token.there_ns = there_ns
            token.held = False  # last: another thread reads it from here on

    def end(self) -> None:
        """The application is done with it: no piece follows."""
        self._streaming = False
        # Functions that know this request: a ring, which would keep the connection until memory is swept.
        self._handing = self._watching = self._plain = None
        self.let_go()

    def _hand(self, target: Callable[[Any], Any] | None) -> None:
        if self._handing is not None:
            # A partial that is being called does not hold what it calls: both stay referenced here. One
            # without a ``__dict__`` would be melted into a partial that middleware makes of it.
            self._handing.__setstate__((target, (), {}, {}))  # type: ignore[attr-defined]


_http_request: ContextVar[HttpRequest | None] = ContextVar("llmprobe_http_request", default=None)


class FirstTokens:
    """First tokens of one front end. Not for several threads."""

    def __init__(self) -> None:
        #: Engine request without a token yet → when it arrived, and with what.
        self._waiting: dict[str, tuple[int, HttpRequest | None]] = {}
        self._there: deque[FirstToken] = deque(maxlen=_AT_MOST)

    def __len__(self) -> int:
        """How many requests had no token yet."""
        return len(self._waiting)

    def arrived(self, request_id: str, arrived_ns: int) -> None:
        """The engine was asked; without an HTTP request it arrived at ``arrived_ns`` (CLOCK_MONOTONIC)."""
        http = _http_request.get()
        if http is not None and not http.answered:
            arrived_ns = http.arrived_ns
        self._waiting[request_id] = arrived_ns, http

    def outputs(self, outputs: Any, most: int | None = None) -> None:
        """Outputs of the engine are with their streams. Costs nothing while nobody waits for a first one.

        Args:
            most: how many of them are first ones, at most.
        """
        waiting = self._waiting
        if not waiting:
            return
        now = _now()
        left = len(waiting) if most is None else most
        for output in reversed(outputs):  # the engine takes new requests on behind the others
            if output.request_id in waiting:
                known = waiting.pop(output.request_id, None)
                if known is None:  # the housekeeping thread has forgotten them all meanwhile
                    return
                arrived_ns, http = known
                token = FirstToken(arrived_ns, now, getattr(output, "events", None))
                self._there.append(token)
                if http is not None:
                    http.hold(token)
                left -= 1
                if left <= 0:
                    break

    def take(self) -> tuple[FirstToken, ...]:
        """Every first token since the last call; some are still held."""
        taken = tuple(self._there)
        self._there.clear()
        return taken

    def forget(self, request_ids: list[str]) -> None:
        """These were aborted."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def forget_all(self) -> None:
        """Nothing is unfinished."""
        self._waiting.clear()


def _take_note(scope: Any) -> HttpRequest | None:
    """An application is called. What it serves runs in this context, or in one that inherits it.

    Returns:
        The HTTP request, if this is where one arrives.
    """
    kind = scope.get("type") if isinstance(scope, dict) else None
    if kind == "http":
        known = _http_request.get()
        if known is None or known.scope is not scope:  # else an application inside another
            http = HttpRequest(_now(), scope)
            _http_request.set(http)
            return http
    elif kind == "websocket":  # requests come long after the connection
        _http_request.set(None)
    return None


def install(probe: Probe, module: ModuleType) -> None:
    """Note when Starlette, which serves vLLM's HTTP, is handed a request, and when it answers.

    Its own method, not FastAPI's that calls it: servers look at the outermost one to tell how to call it.
    """
    guard = probe.guard

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> None:
            http: HttpRequest | None = None
            handed = send
            if patch.active and probe.active:
                try:
                    http = _take_note(scope)
                    if http is not None:
                        handed = http.watched(send, guard)
                except Exception as error:  # noqa: BLE001 - at each request: inline, and not by `Guard.call`
                    guard.failed("vllm.arrival", error)
            try:
                await original(self, scope, receive, handed)
            finally:
                if http is not None:
                    guard.call_even_inert("vllm.first_token", http.end)

        return __call__

    probe.patch(module.Starlette, "__call__", make)
