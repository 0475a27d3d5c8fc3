"""How long a device had nothing to do, as an nsys recording has it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from support.nsys_truth import Truth

#: nsys loses kernels at times, which would look like idle time: so many of the steps have to be whole.
_WHOLE = 0.9
_FEWEST = 3


@dataclass(frozen=True)
class Idle:
    """Shares of the time from the first recorded step's begin to the last one's end, with requests pending.

    Attributes:
        ratio: nothing ran: no kernel, no copy.
        inside: that part of ``ratio`` which lies between a step's first and last activity.
        steps: that were recorded.
    """

    ratio: float
    inside: float
    steps: int


def idle(truth: Truth) -> Idle | None:
    """None where nsys recorded too few steps, or lost too much of them."""
    whole = np.flatnonzero(truth.complete)
    if len(whole) < _FEWEST or len(whole) < _WHOLE * len(truth.complete):
        return None
    begin, end = int(truth.begin[whole[0]]), int(truth.end[whole[-1]])
    total = end - begin
    inside = sum(
        int(truth.end[step] - truth.begin[step]) - truth.busy_between(truth.begin[step], truth.end[step])
        for step in whole
    )
    return Idle(1 - truth.busy_between(begin, end) / total, inside / total, len(whole))
