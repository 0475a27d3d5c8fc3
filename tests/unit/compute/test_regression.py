from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.compute.regression import Comparison, Limit, Outcome, compare, t_quantile

FIVE_PERCENT = Limit(0.05, relative=True)
values = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


def judge(base: list[float], new: list[float], limit: Limit = FIVE_PERCENT, lower: bool = True) -> Comparison:
    return compare(base, new, limit, lower_is_better=lower)


def test_one_run_a_side_is_judged_by_its_difference_and_the_noise_is_unknown() -> None:
    assert judge([10.0], [10.4]).outcome is Outcome.OK
    found = judge([10.0], [10.6])
    assert found.outcome is Outcome.REGRESSION
    assert found.worse == pytest.approx(0.06)
    assert found.interval is None


def test_higher_may_be_better() -> None:
    assert judge([0.5], [0.4], lower=False).outcome is Outcome.REGRESSION
    assert judge([0.5], [0.4], lower=False).worse == pytest.approx(0.2)
    assert judge([0.5], [0.6], lower=False).outcome is Outcome.OK


def test_a_change_that_noise_explains_is_not_called_a_regression() -> None:
    noisy = judge([10.0, 12.0, 9.0], [11.0, 12.5, 10.0])
    assert noisy.worse > 0.05
    assert noisy.outcome is Outcome.INCONCLUSIVE
    quiet = judge([10.0, 10.1, 9.9], [10.8, 10.9, 10.7])
    assert quiet.outcome is Outcome.REGRESSION
    assert quiet.interval is not None
    assert 0 < quiet.interval[0] < quiet.worse < quiet.interval[1]


def test_repeats_on_one_side_tell_the_noise_of_both() -> None:
    assert judge([10.0, 10.1, 9.9, 10.0], [10.9]).outcome is Outcome.REGRESSION
    assert judge([10.0, 12.0, 9.0, 11.0], [12.0]).outcome is Outcome.INCONCLUSIVE


def test_the_interval_is_students() -> None:
    # By hand: means 10 and 12, pooled variance 1 with 4 degrees of freedom, 2.131847 * sqrt(2/3).
    found = judge([9.0, 10.0, 11.0], [11.0, 12.0, 13.0], Limit(0.1, relative=False))
    assert found.worse == pytest.approx(2.0)
    assert found.interval == pytest.approx((2 - 1.740646, 2 + 1.740646), abs=1e-5)


def test_it_says_when_noise_is_too_large_to_see_the_limit() -> None:
    assert judge([10.0, 12.0, 9.0], [10.0, 9.5, 11.0]).noise_hides_limit
    assert not judge([10.0, 10.1, 9.9], [10.0, 10.1, 9.9]).noise_hides_limit


def test_an_absolute_limit_may_be_set_on_what_can_be_zero() -> None:
    limit = Limit(0.02, relative=False)
    assert judge([0.0], [0.01], limit).outcome is Outcome.OK
    assert judge([0.0], [0.03], limit).outcome is Outcome.REGRESSION
    with pytest.raises(ValueError, match="above 0"):
        judge([0.0], [0.03])


@pytest.mark.parametrize(("base", "new"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
def test_what_cannot_be_compared_is_refused(base: list[float], new: list[float]) -> None:
    with pytest.raises(ValueError):
        judge(base, new)


# Student's quantiles as printed in any table of statistics.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 6.3138),
        (2, 2.9200),
        (4, 2.1318),
        (10, 1.8125),
        (12, 1.7823),
        (20, 1.7247),
        (60, 1.6706),
        (120, 1.6577),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-5)


def test_quantiles_fall_with_the_number_of_runs() -> None:
    quantiles = [t_quantile(freedom) for freedom in range(1, 300)]
    assert quantiles == sorted(quantiles, reverse=True)


@settings(deadline=None)
@given(values, values)
def test_the_same_runs_are_no_regression_and_swapping_the_sides_turns_the_change_round(
    base: list[float], new: list[float]
) -> None:
    assert judge(base, base).outcome is Outcome.OK
    there, back = judge(base, new), judge(new, base)
    assert (1 + there.worse) * (1 + back.worse) == pytest.approx(1, rel=1e-4)
    if there.interval is not None:
        assert there.interval[0] <= there.worse <= there.interval[1]


@settings(deadline=None)
@given(values, values, st.floats(1e-3, 1e3))
def test_the_unit_does_not_matter_to_a_relative_limit(
    base: list[float], new: list[float], scale: float
) -> None:
    scaled = judge([value * scale for value in base], [value * scale for value in new])
    assert scaled.worse == pytest.approx(judge(base, new).worse, rel=1e-6, abs=1e-9)


def test_harmless_changes_rarely_fail_and_real_ones_are_found() -> None:
    """Restarts that differ by 2 %, three runs a side, a limit of 5 %: 2 % worse passes, 12 % does not."""
    draw = random.Random(20261123)

    def failures(factor: float) -> int:
        return sum(
            judge(
                [draw.gauss(10, 0.2) for _ in range(3)], [draw.gauss(10 * factor, 0.2) for _ in range(3)]
            ).outcome
            is Outcome.REGRESSION
            for _ in range(500)
        )

    assert failures(1.0) <= 5
    assert failures(1.02) <= 50
    assert failures(1.12) >= 490
