"""What a measured difference says of a bar, and when more of it must be measured."""

from __future__ import annotations

import pytest
from support.paired import Difference, paired


@pytest.mark.parametrize(
    ("low", "median", "high", "decided", "said"),
    [
        (6, 7, 9, True, "≤ 0.5 %: held, interval too"),
        (-3, 7, 26, False, "≤ 0.5 %: held, interval not"),
        (10, 30, 60, False, "≤ 0.5 %: MISSED"),
        (26, 30, 60, True, "≤ 0.5 %: MISSED"),
        (None, 7, None, False, "≤ 0.5 %: held"),
    ],
)
def test_a_bar_is_decided_once_the_interval_lies_on_one_side_of_it(
    low: float | None, median: float, high: float | None, decided: bool, said: str
) -> None:
    found = Difference(5000, 5000 + median, median, low, high).bar(0.5, "%", 1, 100 / 5000)
    assert (found.decided, str(found)) == (decided, said)


def test_a_loss_is_held_against_its_bar_by_the_other_end_of_the_interval() -> None:
    off, on = [100.0] * 8, [99.9, 99.0, 98.0, 101.0, 100.0, 99.0, 99.7, 99.8]
    found = paired(off, on).bar(0.5, "% less", 1, -100 / 100)
    assert found.low is not None
    assert found.high is not None
    assert (round(found.value, 2), round(found.low, 2), round(found.high, 2)) == (0.25, 0.0, 1.0)
    assert str(found) == "≤ 0.5 % less: held, interval not"
