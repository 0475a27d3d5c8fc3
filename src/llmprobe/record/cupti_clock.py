"""CUPTI's times as nanoseconds of CLOCK_MONOTONIC, whatever it counts.

By itself CUPTI counts nanoseconds of a clock of the system. torch's profiler makes it count the processor's
ticks and leaves it so; and once that was asked for a second time, kernels may be stamped by the first clock
all the same, while CUPTI says that it counts ticks (docs/decisions/kernel-windows.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_TRIES = 8
#: Over less than this the slope between two readings is not known; nothing of interest runs in it.
_SHORTEST_NS = 1_000_000
#: How far from both readings of a clock a time of that clock may lie: records come late, not for ever.
_NEAR_NS = 60 * 10**9
_FARTHEST_NS = 1 << 61  # what is of no clock may be anything


class Reading(NamedTuple):
    """Three clocks at one moment, to within ``uncertainty`` nanoseconds: CLOCK_MONOTONIC, CUPTI's own, and
    CLOCK_REALTIME."""

    uncertainty: int
    monotonic: int
    cupti: int
    real: int


def read(cupti: Callable[[], int]) -> Reading:
    """The clocks now, the best of a few readings; ``cupti`` reads CUPTI's."""
    readings = []
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        stamp, real = cupti(), time.time_ns()
        after = time.monotonic_ns()
        readings.append(Reading(after - before, (before + after) // 2, stamp, real))
    return min(readings)


def monotonic_ns(times: np.ndarray, first: Reading, last: Reading) -> np.ndarray:
    """CUPTI's times (N,), recorded between two readings or not long before, on the line through these.

    A time that is none of CUPTI's own clock is taken for one of CLOCK_REALTIME or CLOCK_MONOTONIC if it is
    near what that read. What is of no clock at all comes out as a time far from both readings.
    """
    found = _on_line(times, first, last, first.cupti, last.cupti)
    own = _near(times, first.cupti, last.cupti)
    for begin, end in ((first.real, last.real), (first.monotonic, last.monotonic)):
        other = _near(times, begin, end) & ~own
        if other.any():
            found[other] = _on_line(times[other], first, last, begin, end)
    return found


def _near(times: np.ndarray, begin: int, end: int) -> np.ndarray:
    return np.asarray((times > begin - _NEAR_NS) & (times < end + _NEAR_NS))


def _on_line(times: np.ndarray, first: Reading, last: Reading, begin: int, end: int) -> np.ndarray:
    counted, passed = end - begin, last.monotonic - first.monotonic
    slope = passed / counted if counted > 0 and passed > _SHORTEST_NS else 1.0
    # Differences first: the times themselves have more digits than a float.
    since = np.clip(np.rint((times - begin) * slope), -_FARTHEST_NS, _FARTHEST_NS)
    return np.asarray(first.monotonic + since.astype(np.int64))
