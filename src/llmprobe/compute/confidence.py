"""How sure a verdict is, from how much independent evidence agrees.

Each kind of evidence is a witness with a weight ``w``, the chance that it alone would settle the class::

    confidence = (1 - Π over witnesses that agree of (1 - w))
                 · Π over witnesses that object of (1 - w) · (1 + margin) / 2

that is a noisy-or (Pearl 1988) of witnesses for, discounted by witnesses against, and halved where the
deciding figure lies right at its threshold, or short of it where hysteresis lets a class stand all the same.
``margin`` is 1 from half the threshold's value away. A device
clock on the host cannot tell kernels from the framework between them, so there confidence ends at
`HOST_CLOCK_LIMIT`. The weights are a judgement, not a calibration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Witness = Literal["step clock", "model of the work", "kernel windows", "hardware counters", "host signals"]

WEIGHTS: dict[Witness, float] = {
    "step clock": 0.65,
    "model of the work": 0.60,
    "kernel windows": 0.70,
    "hardware counters": 0.60,
    "host signals": 0.35,
}
#: A peak that was measured by ourselves and not published makes a weaker roof.
CALIBRATED_FACTOR = 0.8
HOST_CLOCK_LIMIT = 0.6
_FULL_MARGIN = 0.5


@dataclass(frozen=True)
class Vote:
    """What one witness says of a class. ``factor`` weakens it."""

    witness: Witness
    agrees: bool
    factor: float = 1.0

    @property
    def weight(self) -> float:
        """As the formula uses it."""
        return WEIGHTS[self.witness] * self.factor


def confidence(votes: Iterable[Vote], margin: float, limit: float = 1.0) -> float:
    """The formula above. 0 without a witness that agrees.

    Args:
        votes: at most one a witness.
        margin: from `margin`.
        limit: an upper bound.
    """
    votes = list(votes)
    unsettled = math.prod(1 - vote.weight for vote in votes if vote.agrees)
    doubt = math.prod(1 - vote.weight for vote in votes if not vote.agrees)
    return min((1 - unsettled) * doubt * (1 + margin) / 2, limit)


def margin(value: float, threshold: float, *, below: bool = False) -> float:
    """How far ``value`` lies above ``threshold`` (or ``below``): 0 at it, 1 from half of it away."""
    if threshold <= 0:
        return 1.0
    far = value / threshold - 1
    return min(max(-far if below else far, 0.0) / _FULL_MARGIN, 1.0)
