"""Whether a server stopped getting on when it was recorded, and how to say so.

A tool that records a process can hang it. Then the capture fails for a reason of its own, such as a file that
was not written, or even succeeds with what was recorded before; that nothing is served any more matters more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llmprobe.capture.condition import Live
from llmprobe.compute.stall import LEAST_SECONDS, Stall

#: Until then a rank inside a step is known to be stalled, if its steps are of the usual length.
_WAIT_SECONDS = LEAST_SECONDS + 5.0
_LOOK_SECONDS = 0.2
_SLACK_SECONDS = 1.0


def wait_for_signs(
    look: Callable[[], Live | None], pause: Callable[[float], bool], seconds: float = _WAIT_SECONDS
) -> None:
    """Return once it can be told whether the server gets on, or after ``seconds``.

    At once where nothing runs, and as soon as each rank has ended a step.

    Args:
        look: the server now; None if it is gone.
        pause: waits for so many seconds; true: do not wait any longer.
    """
    first, until = look(), time.monotonic() + seconds
    now = first
    while first is not None and now is not None and now.working and not now.stalls:
        if all(
            sum(steps.values()) > sum(first.steps.get(rank, steps).values())
            for rank, steps in now.steps.items()
        ):
            return
        if time.monotonic() > until or pause(_LOOK_SECONDS):
            return
        now = look()


def stopped(live: Live | None, begun_ns: int, hint: str) -> str | None:
    """What to say of the ranks that have not got on since about then; None if there is none.

    Args:
        live: the server now; None if it is gone.
        begun_ns: when the recording began, CLOCK_MONOTONIC. Who had stopped before is left out.
        hint: what is known of servers that the tool hangs; may be empty.
    """
    found = [(rank, stall) for rank, stall in (live.stalls if live else ()) if _since(stall, begun_ns)]
    if not found:
        return None
    ranks = "; ".join(_words(rank, stall) for rank, stall in found)
    said = f"Since it was recorded the server has not got on: {ranks}"
    return f"{said}. {hint}" if hint else said


def _since(stall: Stall, begun_ns: int) -> bool:
    """Whether it began with the recording or after; the step that hangs may have begun just before."""
    usual = max([_SLACK_SECONDS, *(step.seconds for step in stall.last_steps)])
    return stall.since_ns >= begun_ns - round(usual * 1e9)


def _words(rank: int, stall: Stall) -> str:
    who = f"rank {rank}" if stall.engine is None else f"engine {stall.engine}, rank {rank}"
    if stall.where == "step":
        inside = f" ({stall.phase}, {stall.tokens} tokens)" if stall.phase is not None else ""
        return f"{who} has been in step {stall.step}{inside} for {stall.seconds:.0f} s"
    return f"{who} has begun no step for {stall.seconds:.0f} s, with requests waiting"
