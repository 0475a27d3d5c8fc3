"""Waiting for what a busy machine may take any time over; how fast things are is for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from llmprobe.agent.client import AgentError

#: Reached only by what never happens: both cores may be full of other engines' spinning threads.
PATIENCE_SECONDS = 300.0

_T = TypeVar("_T")


def until(
    ready: Callable[[], _T | None], what: str, seen: Callable[[], str] = lambda: "", pause: float = 0.1
) -> _T:
    """The first true value of ``ready``; what does not answer meanwhile is asked again.

    Args:
        ready: asked again and again.
        what: for the failure's message.
        seen: told in that message too.
        pause: seconds between two looks.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if value := ready():
                return value
            last = None
        except (AgentError, OSError) as error:
            last = error
        time.sleep(pause)
    raise AssertionError(f"no {what} in {PATIENCE_SECONDS:.0f} s {seen()}") from last
