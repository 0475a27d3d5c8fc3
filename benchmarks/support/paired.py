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
