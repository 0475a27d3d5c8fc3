"""Sets of time: int64 arrays (M, 2) of [begin, end) in nanoseconds, sorted and disjoint.

An end that is not known yet is `OPEN`.
"""

from __future__ import annotations

import numpy as np

from llmprobe.compute.steps import Bools, Ints

Intervals = Ints
OPEN = int(np.iinfo(np.int64).max)


def empty() -> Intervals:
    """No time at all."""
    return np.empty((0, 2), dtype=np.int64)


def union(*parts: Intervals) -> Intervals:
    """Everything in any of ``parts``, whose rows may be in any order and overlap; empty rows vanish."""
    rows = np.concatenate([np.asarray(part, dtype=np.int64).reshape(-1, 2) for part in (empty(), *parts)])
    rows = rows[rows[:, 1] > rows[:, 0]]
    if not len(rows):
        return rows
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    reach = np.maximum.accumulate(rows[:, 1])
    first = np.concatenate(([True], rows[1:, 0] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.stack((rows[first, 0], reach[last]), axis=1)


def bridge(intervals: Intervals, longest_ns: int) -> Intervals:
    """``intervals``, sorted and disjoint, with every gap of at most ``longest_ns`` between them filled."""
    if len(intervals) < 2:
        return intervals
    apart = intervals[1:, 0] - intervals[:-1, 1] > longest_ns
    begins = intervals[np.concatenate(([True], apart)), 0]
    ends = intervals[np.concatenate((apart, [True])), 1]
    return np.stack((begins, ends), axis=1)


def subtract(whole: Intervals, part: Intervals) -> Intervals:
    """What is in ``whole`` and not in ``part``."""
    if not len(whole) or not len(part):
        return whole
    points = np.unique(np.concatenate((whole.ravel(), part.ravel())))
    begins = points[:-1]
    keep = contains(whole, begins) & ~contains(part, begins)
    return union(np.stack((begins[keep], points[1:][keep]), axis=1))


def contains(intervals: Intervals, times: Ints) -> Bools:
    """Whether each of ``times`` (K,) lies in ``intervals``."""
    if not len(intervals):
        return np.zeros(len(times), dtype=np.bool_)
    index = np.searchsorted(intervals[:, 0], times, side="right") - 1
    return np.asarray((index >= 0) & (times < intervals[np.maximum(index, 0), 1]))


def overlap_ns(intervals: Intervals, begins: Ints, ends: Ints) -> Ints:
    """Nanoseconds of each [begins, ends) (K,) that lie in ``intervals``; no begin may exceed its end."""
    if not len(intervals) or not len(begins):
        return np.zeros(len(begins), dtype=np.int64)
    # Clipped to the times asked for, so that an open end cannot overflow the sums below.
    rows = np.clip(intervals, begins.min(), ends.max())
    covered = np.concatenate(([0], np.cumsum(rows[:, 1] - rows[:, 0])))
    return _before(rows, covered, ends) - _before(rows, covered, begins)


def _before(rows: Intervals, covered: Ints, times: Ints) -> Ints:
    """Nanoseconds in ``rows`` before each of ``times``; ``covered`` are the cumulative lengths of rows."""
    index = np.searchsorted(rows[:, 0], times, side="right")
    last_end = rows[np.maximum(index - 1, 0), 1]
    return np.asarray(covered[index] - np.where(index > 0, np.maximum(last_end - times, 0), 0))
