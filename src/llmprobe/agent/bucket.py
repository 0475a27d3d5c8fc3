"""How much is let through at a time, and what is done with a caller who wants more: he is kept waiting.

To refuse costs as much as a small answer, and who asks again at once could have thousands a second of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from starlette.types import Receive, Scope

HOLD_SECONDS = 1.0


class Bucket:
    """So much a second, and a burst of so much at once: calls, or seconds of work."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def take(self) -> bool:
        """Whether one more call fits."""
        self._fill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def pay(self, amount: float) -> None:
        """Take what was used, and go into debt for what is not there."""
        self._fill()
        self._left -= amount

    def empty_seconds(self) -> float:
        """How long until there is something in it again; 0 if there is now."""
        self._fill()
        return max(0.0, -self._left / self._rate)

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now


async def hold(scope: Scope, receive: Receive, seconds: float) -> None:
    """Let time pass before a refusal, unless the caller leaves, or its connection has to make room."""
    scope.setdefault("state", {})["refused"] = True  # for `llmprobe.agent.connections`
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(gone(receive), seconds)


async def gone(receive: Receive) -> None:
    """Return once the caller has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
