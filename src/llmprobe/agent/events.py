"""Events over HTTP: what changed, as it changes, in the form that browsers' ``EventSource`` reads."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from llmprobe.agent.event_log import EventLog, Listener, TooManyListeners
from llmprobe.agent.limits import abort
from llmprobe.agent.problems import Problem
from llmprobe.capture.session import Capture
from llmprobe.collect.views import ServerView
from llmprobe.export.changes import Changes

#: A comment goes out after so long without an event: it shows both sides that the other is there.
HEARTBEAT_SECONDS = 15.0
#: Who takes nothing for so long, once all buffers are full, is let go.
_SEND_SECONDS = 30.0
_RETRY_MILLISECONDS = 2000
_BATCH = 64
_MOST_NUMBER = 2**53  # what every reader of JSON holds exactly


class Watch:
    """Puts into the log what changes.

    Args:
        log: gets it; what it has of an agent before this one says what was told already.
        wall: Unix seconds.
    """

    def __init__(self, log: EventLog, wall: Callable[[], float] = time.time) -> None:
        self._log = log
        self._wall = wall
        self._changes = Changes()
        try:
            self._changes.restore(log.state)
        except ValueError as error:
            logging.getLogger("llmprobe.agent").error("%s in events.json is not read: begun anew", error)

    def look(self, views: list[ServerView]) -> None:
        """Compare the servers with the last look, and save what is new. Raises OSError."""
        for change in self._changes.look(views, self._wall()):
            self._log.add(change.kind, change.server, change.data)
        self.save()

    def save(self) -> None:
        """Save what is new. Raises OSError."""
        self._log.save(self._changes.save())

    def capture(self, capture: Capture) -> None:
        """A capture entered a state; from any thread.

        Labels and reasons stay with the captures: those need the token, events do not.
        """
        data = {"capture": capture.id, "tool": capture.request.tool, "state": capture.state}
        self._log.add("capture", capture.server, data)


def add_routes(app: FastAPI, log: EventLog, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
    """Add ``GET /api/events`` to the agent's service."""

    @app.get(
        "/api/events",
        summary="What changes, as it changes (server-sent events)",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def events(
        after: Annotated[
            int | None,
            Query(ge=0, le=_MOST_NUMBER, description="Begin after this event; 0: with the oldest kept."),
        ] = None,
        last_event_id: Annotated[
            int | None, Header(ge=0, le=_MOST_NUMBER, description="The same, and outranks it.")
        ] = None,
    ) -> Response:
        position = after if last_event_id is None else last_event_id
        return _Stream(log, position, heartbeat_seconds)


class _Stream(StreamingResponse):
    """One listener's response. Takes its place when it begins, and gives it back however it ends."""

    def __init__(self, log: EventLog, position: int | None, heartbeat_seconds: float) -> None:
        super().__init__(
            iter(()),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._log = log
        # A number from another life of the directory, beyond all of this one, would wait for ever.
        self._position = log.newest if position is None else min(position, log.newest)
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the listener or the agent leaves, or the door no longer lets the listener in."""
        stuck = False
        admitted: Callable[[], bool] = scope.get("state", {}).get("admitted", lambda: True)

        async def in_time(message: Message) -> None:
            nonlocal stuck
            try:
                await asyncio.wait_for(send(message), _SEND_SECONDS)
            except asyncio.TimeoutError:
                stuck = True
                raise

        try:
            with self._log.listening() as listener:
                self.body_iterator = self._pieces(listener, admitted)
                await super().__call__(scope, receive, in_time)
        except TooManyListeners:
            full = Problem(
                503,
                "As many programs listen to events as may at once.",
                "End one of them, or ask GET /api/status instead.",
                {"Retry-After": "30"},
            )
            await full.response()(scope, receive, send)
        except Exception:  # a timeout, which Starlette may have wrapped in a group
            if not stuck:
                raise
            await abort(scope, receive)

    async def _pieces(self, listener: Listener, admitted: Callable[[], bool]) -> AsyncIterator[str]:
        yield f": llmprobe events\nretry: {_RETRY_MILLISECONDS}\n\n"
        while not self._log.closed and admitted():
            events, lost = self._log.after(self._position)
            if lost:
                self._position = lost
                yield _piece(lost, json.dumps(_missed(lost)))
            for event in events[:_BATCH]:
                self._position = event.id
            if events:
                yield "".join(_piece(event.id, event.text) for event in events[:_BATCH])
            elif not lost and not await listener.wait(self._heartbeat_seconds):
                yield ": alive\n\n"


def _missed(newest: int) -> dict[str, Any]:
    """Events up to this number are gone; what stands now is in ``/api/status``."""
    return {"id": newest, "time": round(time.time(), 3), "server": None, "kind": "missed"}


def _piece(number: int, text: str) -> str:
    return f"id: {number}\ndata: {text}\n\n"
