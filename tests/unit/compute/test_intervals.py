from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.intervals import OPEN, Intervals, contains, empty, overlap_ns, subtract, union

END = 60
raw = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=8)


def as_intervals(rows: list[tuple[int, int]]) -> Intervals:
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def moments(intervals: Intervals) -> set[int]:
    return {time for begin, end in intervals.tolist() for time in range(begin, min(end, END))}


@given(raw, raw)
def test_union_and_difference_hold_the_same_moments_as_sets(
    left: list[tuple[int, int]], right: list[tuple[int, int]]
) -> None:
    one, two = union(as_intervals(left)), union(as_intervals(right))
    assert moments(one) == moments(as_intervals(left))
    assert moments(union(one, two)) == moments(one) | moments(two)
    assert moments(subtract(one, two)) == moments(one) - moments(two)
    for result in (one, union(one, two), subtract(one, two)):
        assert (np.diff(result.ravel()) > 0).all(), "sorted, disjoint and not touching"


@given(raw, st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), min_size=1, max_size=5))
def test_overlap_counts_the_moments_that_both_hold(
    rows: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    intervals = union(as_intervals(rows))
    pairs = np.sort(as_intervals(asked), axis=1)
    found = overlap_ns(intervals, pairs[:, 0], pairs[:, 1])
    assert found.tolist() == [
        len(moments(intervals) & set(range(begin, end))) for begin, end in pairs.tolist()
    ]


def test_an_open_end_does_not_overflow() -> None:
    now = np.array([2**62], dtype=np.int64)
    intervals = as_intervals([(5, 10), (20, OPEN)])
    assert overlap_ns(intervals, np.array([0]), now) == [5 + 2**62 - 20]
    assert contains(intervals, np.array([4, 5, 9, 10, 2**62])).tolist() == [False, True, True, False, True]
    assert subtract(intervals, as_intervals([(7, OPEN)])).tolist() == [[5, 7]]


def test_nothing_overlaps_nothing() -> None:
    assert overlap_ns(empty(), np.array([0]), np.array([9])) == [0]
    assert len(union()) == 0
    assert len(subtract(empty(), as_intervals([(1, 2)]))) == 0
