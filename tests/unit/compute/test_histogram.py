from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.histogram import quantile, rebucket
from llmprobe.record.layout import BUCKETS, bucket_bounds_seconds, bucket_of

BOUNDS = bucket_bounds_seconds()
durations = st.lists(st.integers(11_000, 500 * 10**9), min_size=1, max_size=60)


def count(nanoseconds: list[int]) -> np.ndarray:
    counts = np.zeros(BUCKETS, dtype=np.uint64)
    for duration in nanoseconds:
        counts[bucket_of(duration)] += 1
    return counts


@given(durations, st.floats(0, 1))
def test_a_quantile_is_within_a_bucket_of_the_true_one(values: list[int], q: float) -> None:
    found = quantile(count(values), BOUNDS, q)
    assert found is not None
    # Between two values any answer is a quantile: compare with the neighbours.
    low = np.quantile(values, q, method="lower") / 1e9
    high = np.quantile(values, q, method="higher") / 1e9
    rank_below = np.quantile(values, max(0.0, q - 1 / len(values)), method="lower") / 1e9
    assert min(low, rank_below) / 1.0101 <= found <= high * 1.0101


@given(durations)
def test_quantiles_never_fall_as_q_grows(values: list[int]) -> None:
    counts = count(values)
    found = [quantile(counts, BOUNDS, q) for q in np.linspace(0, 1, 21)]
    assert found == sorted(found)


def test_a_quantile_is_interpolated_by_logarithm() -> None:
    assert quantile(np.array([0, 2, 0]), np.array([1.0, 4.0, np.inf]), 0.5) == pytest.approx(2.0)
    assert quantile(np.array([4, 0, 0]), np.array([1.0, 4.0, np.inf]), 0.5) == pytest.approx(0.5)


def test_beyond_the_last_bound_only_the_bound_is_known() -> None:
    assert quantile(np.array([0, 0, 3]), np.array([1.0, 4.0, np.inf]), 0.5) == 4.0


def test_an_empty_histogram_has_no_quantile() -> None:
    assert quantile(np.zeros(BUCKETS, dtype=np.uint64), BOUNDS, 0.5) is None


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_a_quantile_outside_0_to_1_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="0 to 1 is allowed"):
        quantile(np.array([1]), np.array([1.0]), q)


@given(durations)
def test_coarser_buckets_lose_no_value_and_never_claim_too_much(values: list[int]) -> None:
    coarse = np.append(0.001 * 1.25 ** np.arange(40), np.inf)
    cumulative = rebucket(count(values), BOUNDS, coarse)
    assert cumulative[-1] == len(values)
    assert (np.diff(cumulative) >= 0).all()
    true = np.array([np.sum(np.array(values) / 1e9 <= bound) for bound in coarse])
    almost = np.array([np.sum(np.array(values) / 1e9 <= bound / 1.0101) for bound in coarse])
    assert (cumulative <= true).all()
    assert (cumulative >= almost).all()


def test_a_bucket_goes_to_the_first_bound_not_below_it() -> None:
    fine = np.array([1.0, 2.0, 3.0, np.inf])
    assert rebucket(np.array([1, 10, 100, 1000]), fine, np.array([2.0, 2.5])).tolist() == [11, 11]
    assert rebucket(np.array([1, 10, 100, 1000]), fine, np.array([3.0, np.inf])).tolist() == [111, 1111]
