"""llmprobe's own host time inside the steps of an engine, as its journal counts it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OwnTime:
    """Microseconds a step. The mean also has what only some steps pay: writes for a group of them."""

    steps: int
    median: float
    mean: float
    p99: float

    @classmethod
    def of(cls, own_ns: np.ndarray) -> OwnTime:
        """Sum up one value a step, in nanoseconds."""
        own = own_ns.astype(np.float64) / 1e3
        return cls(len(own), float(np.median(own)), float(own.mean()), float(np.percentile(own, 99)))
