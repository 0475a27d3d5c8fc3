"""When a request reached the server, and when its first token was with its stream.

vLLM takes a request for arrived once its HTTP layer has read, parsed and validated it; whoever waits for a
token waits for that too. Here a request arrives when the application is called with its headers. The time
travels in a context variable, which the tasks that serve a request inherit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe

_now = time.monotonic_ns


class HttpRequest:
    """One HTTP request; it may bring several requests for the engine, at once or one after another."""

    __slots__ = ("answered", "arrived_ns", "scope")

    def __init__(self, arrived_ns: int, scope: Any = None) -> None:
        self.arrived_ns = arrived_ns
        self.scope = scope
        #: It has had a token: what the engine is asked from now on did not arrive with it.
        self.answered = False


_http_request: ContextVar[HttpRequest | None] = ContextVar("llmprobe_http_request", default=None)


class FirstTokens:
    """Times to first token of one front end. Not for several threads."""

    def __init__(self) -> None:
        #: Engine request without a token yet → when it arrived, and with what.
        self._waiting: dict[str, tuple[int, HttpRequest | None]] = {}
        self._seconds_ns: list[int] = []

    def arrived(self, request_id: str, arrived_ns: int) -> None:
        """The engine was asked; without an HTTP request it arrived at ``arrived_ns`` (CLOCK_MONOTONIC)."""
        http = _http_request.get()
        if http is not None and not http.answered:
            arrived_ns = http.arrived_ns
        self._waiting[request_id] = arrived_ns, http

    def outputs(self, outputs: Any) -> None:
        """Outputs of the engine are with their streams. Costs nothing while nobody waits for a first one."""
        waiting = self._waiting
        if not waiting:
            return
        now = _now()
        for output in outputs:
            if output.request_id in waiting:
                arrived_ns, http = waiting.pop(output.request_id)
                self._seconds_ns.append(now - arrived_ns)
                if http is not None:
                    http.answered = True

    def take(self) -> tuple[int, ...]:
        """Nanoseconds of every first token since the last call."""
        taken = tuple(self._seconds_ns)
        self._seconds_ns.clear()
        return taken

    def forget(self, request_ids: list[str]) -> None:
        """These were aborted."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def forget_all(self) -> None:
        """Nothing is unfinished."""
        self._waiting.clear()


def _take_note(scope: Any) -> None:
    """An application is called. What it serves runs in this context, or in one that inherits it."""
    kind = scope.get("type") if isinstance(scope, dict) else None
    if kind == "http":
        known = _http_request.get()
        if known is None or known.scope is not scope:  # else an application inside another
            _http_request.set(HttpRequest(_now(), scope))
    elif kind == "websocket":  # requests come long after the connection
        _http_request.set(None)


def install(probe: Probe, module: ModuleType) -> None:
    """Note when Starlette, which serves vLLM's HTTP, is handed a request.

    Its own method, not FastAPI's that calls it: servers look at the outermost one to tell how to call it.
    """

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        async def __call__(self: Any, scope: Any, receive: Any, send: Any) -> None:
            if patch.active and probe.active:
                _take_note(scope)
            await original(self, scope, receive, send)

        return __call__

    probe.patch(module.Starlette, "__call__", make)
