"""One caller's connection, and how many there may be. Those that keep the agent waiting make room for others.

uvicorn itself waits for a request's head for ever, and answers 503 to everybody once too many do so.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

#: So many of one listening socket.
MOST_CONNECTIONS = 256


class Connection(H11Protocol):
    """uvicorn's, with an end to its patience."""

    #: How long a request's head may take, from the connection or from its first byte.
    head_seconds: ClassVar[float] = 10.0
    #: How long nothing of an answer may be taken, once all buffers are full.
    take_seconds: ClassVar[float] = 30.0
    most: ClassVar[int] = MOST_CONNECTIONS

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._waiting_since = self.loop.time()
        self._head_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room for it, and wait for its first request, for a while."""
        if len(self.connections) >= self.most:
            self._end_longest_waiting()
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._stop_head_timer()
        self._stop_take_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take it; if it is a part of a head, the rest has to come in time."""
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the caller to take what is written, for a while: uvicorn keeps it for ever."""
        super().pause_writing()
        self._stop_take_timer()
        self._take_timer = self.loop.call_later(self.take_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It was taken."""
        self._stop_take_timer()
        super().resume_writing()

    def _end_longest_waiting(self) -> None:
        """Where there is none, as all have a request that is being answered, uvicorn answers 503."""
        waiting = [one for one in self.connections if isinstance(one, Connection) and one._waits_for_caller()]
        if waiting:
            longest = min(waiting, key=lambda one: one._waiting_since)
            longest.transport.abort()
            self.connections.discard(longest)  # now, and not a turn of the loop later

    def _waits_for_caller(self) -> bool:
        """For a head, a body or, having asked too much, for time to pass."""
        return (
            self._waits_for_head() or self.cycle.more_body or bool(self.scope.get("state", {}).get("refused"))
        )

    def _waits_for_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _time_head(self) -> None:
        if not self._waits_for_head():
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._end_without_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_take_timer(self) -> None:
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None

    def _end_without_head(self) -> None:
        self._head_timer = None
        if self._waits_for_head() and not self.transport.is_closing():
            self.transport.close()
