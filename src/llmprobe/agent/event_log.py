"""The newest events, numbered for good, and who listens to them.

Whoever adds an event waits for nobody: listeners are woken and read the ring at their own pace. One that the
ring overtook is told how far.

An event's number is the Unix millisecond at which it was added, or one more than the number before where that
is not higher. The numbers go through the file that outlives this agent, so they do not fall with a new agent:
not below what is in the file, and, where events were lost because an agent was killed before it wrote them
(a second at most), not below the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprobe.collect import checkpoint

log = logging.getLogger("llmprobe.agent")

#: Events that are kept for those who come back.
MOST_EVENTS = 512
#: Who may listen at once.
MOST_LISTENERS = 16
_MOST_NUMBER = 2**53  # what every reader of JSON holds exactly


class TooManyListeners(Exception):
    """`MOST_LISTENERS` are there already."""


@dataclass(frozen=True)
class Event:
    """One event; ``text`` is its JSON, in one line."""

    id: int
    text: str


class Listener:
    """Waits for events on its own event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """From any thread; never waits."""
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._woken.set)

    async def wait(self, seconds: float) -> bool:
        """Whether something may have come since the last call, or within ``seconds``."""
        try:
            await asyncio.wait_for(self._woken.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        self._woken.clear()
        return True


class EventLog:
    """The ring. `add`, `after` and `save` may be called from any thread.

    Args:
        path: file that carries the events over a restart; None: nothing does.
        most: how many events are kept.
        most_listeners: at once.
        wall: Unix seconds.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        most: int = MOST_EVENTS,
        most_listeners: int = MOST_LISTENERS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._most_listeners = most_listeners
        self._wall = wall
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=most)
        self._newest = 0
        self._dropped = 0  # the newest that the ring no longer has
        self._unsaved = False
        self._listeners: set[Listener] = set()
        self.closed = False
        #: What belongs to the events and was saved with them.
        self.state: dict[str, Any] = {}
        self._restore()

    @property
    def newest(self) -> int:
        """The number of the newest event; 0 before the first."""
        return self._newest

    def add(self, kind: str, server: str, data: dict[str, Any]) -> int:
        """Number an event and wake everybody; returns its number."""
        with self._lock:
            now = self._wall()
            number = max(self._newest + 1, int(now * 1000))
            event = {"id": number, "time": round(now, 3), "server": server, "kind": kind, **data}
            if len(self._events) == self._events.maxlen:
                self._dropped = self._events[0].id
            self._events.append(Event(number, json.dumps(event, separators=(",", ":"), allow_nan=False)))
            self._newest = number
            self._unsaved = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener.wake()
        return number

    def after(self, number: int) -> tuple[list[Event], int]:
        """The events after ``number``, oldest first.

        Returns:
            Them, and the newest lost one after ``number``; 0 if none was.
        """
        with self._lock:
            events = [event for event in self._events if event.id > number]
            return events, self._dropped if self._dropped > number else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        """A listener for as long as the block lasts, in which an event loop runs.

        Raises:
            TooManyListeners: no room for one more.
        """
        listener = Listener()
        with self._lock:
            if len(self._listeners) >= self._most_listeners:
                raise TooManyListeners
            self._listeners.add(listener)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def close(self) -> None:
        """No more events come: let everybody go."""
        self.closed = True
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.wake()

    def save(self, state: dict[str, Any]) -> None:
        """Write the file, if anything was added since. Raises OSError.

        Args:
            state: JSON that belongs to the events.
        """
        with self._lock:
            if self._path is None or not self._unsaved:
                return
            self._unsaved = False
            text = checkpoint.dump(
                newest=self._newest,
                dropped=self._dropped,
                state=state,
                events=[[event.id, event.text] for event in self._events],
            )
        try:
            checkpoint.write(self._path, text)
        except OSError:
            self._unsaved = True
            raise

    def _restore(self) -> None:
        try:
            saved = checkpoint.load(self._path)
            events = [_event(number, text) for number, text in saved.get("events", ())]
            newest, dropped = _number(saved.get("newest", 0)), _number(saved.get("dropped", 0))
            numbers = [dropped, *(event.id for event in events)]
            if sorted(set(numbers)) != numbers or numbers[-1] > newest:
                raise ValueError("numbers do not rise")
            state = saved.get("state", {})
            if not isinstance(state, dict):
                raise ValueError("what stood is no object")
        except (TypeError, ValueError, RecursionError) as error:
            log.error("%s is not read: %s", self._path, error)
            return
        if len(events) > (self._events.maxlen or 0):  # an agent of another version kept more
            dropped = events[-(self._events.maxlen or 0) - 1].id
        self._events.extend(events)
        self._newest, self._dropped, self.state = newest, dropped, state


def _number(saved: Any) -> int:
    if type(saved) is not int or not 0 <= saved < _MOST_NUMBER:
        raise ValueError(f"{saved!r} is no number of an event")
    return saved


def _event(number: Any, text: Any) -> Event:
    """One that was saved, if what goes out to listeners can be made of it. Raises ValueError."""
    if not isinstance(text, str) or not text.isascii() or {"\n", "\r"} & set(text):
        raise ValueError("an event is no line of JSON")
    event = json.loads(text)
    if not isinstance(event, dict) or event.get("id") != number:
        raise ValueError("an event has not its number")
    return Event(_number(number), text)
