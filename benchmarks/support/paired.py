"""How far two conditions differ that were measured in turns: off and on, in neighbouring blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
#: That so many differences all have one sign is chance in less than 5 % of cases (2 / 2^6); with four it is
#: in 12 %, and an interval of 95 % from them would leave out 0 as often.
_FEWEST = 6


@dataclass(frozen=True)
class Difference:
    """``on`` − ``off``: medians of both over their blocks, and of the differences within pairs.

    ``low`` and ``high`` bound the median difference: the middle 95 % of its bootstrap distribution, None
    for fewer than six pairs.
    """

    off: float
    on: float
    median: float
    low: float | None
    high: float | None

    @property
    def relative(self) -> float:
        """The median difference as a part of the median without llmprobe."""
        return self.median / self.off

    def bar(self, most: float, unit: str, digits: int, scale: float) -> Bar:
        """It times ``scale`` against what it may be at most; a scale below 0 turns a loss into a gain."""
        bounds = sorted(bound * scale for bound in (self.low, self.high) if bound is not None)
        low, high = bounds if bounds else (None, None)
        return Bar(self.median * scale, low, high, most, unit, digits)


@dataclass(frozen=True)
class Bar:
    """What a difference may be at most, in a unit of its own; ``low`` and ``high`` bound it, if known."""

    value: float
    low: float | None
    high: float | None
    most: float
    unit: str
    digits: int

    @property
    def decided(self) -> bool:
        """Whether the whole interval lies on one side of the bar."""
        return self.low is not None and self.high is not None and not self.low <= self.most < self.high

    def __str__(self) -> str:
        """For a table: of the median, and of the interval."""
        said = f"≤ {self.most:.{self.digits}f} {self.unit}: {'held' if self.value <= self.most else 'MISSED'}"
        if self.high is None or self.value > self.most:
            return said
        return f"{said}, interval {'too' if self.high <= self.most else 'not'}"


def paired(off: Sequence[float], on: Sequence[float]) -> Difference:
    """Compare the blocks of a pair with each other: what both share, such as a slow minute, cancels.

    Args:
        off: one figure for each block without llmprobe, pair by pair.
        on: the same for the blocks with it.
    """
    without, with_ = np.asarray(off, dtype=float), np.asarray(on, dtype=float)
    differences = with_ - without
    low = high = None
    if len(differences) >= _FEWEST:
        draw = np.random.default_rng(0).integers(len(differences), size=(_RESAMPLES, len(differences)))
        low, high = (
            float(bound) for bound in np.percentile(np.median(differences[draw], axis=1), (2.5, 97.5))
        )
    return Difference(
        float(np.median(without)), float(np.median(with_)), float(np.median(differences)), low, high
    )
