"""Is one set of runs worse than another, by more than is allowed and by more than noise explains?

Runs of one configuration differ: restarts move vLLM's TPOT by about 2 %. With repeats on at least one side
that noise is known, and a change counts only if noise does not explain it. The interval is Student's, on
logarithms (so that a change is a ratio), with the variance of both sides pooled: it holds for the two to five
repeats that people make, where percentiles of a bootstrap are far too narrow and a permutation test cannot
reach 5 % at all (three against three have 20 orders). The median of the runs would throw away half of so few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist, fmean

CONFIDENCE = 0.95  #: one-sided: of twenty harmless changes, one is taken for a regression at most


class Outcome(Enum):
    """What a comparison came to."""

    OK = "ok"
    REGRESSION = "regression"
    #: Worse than allowed, but the noise between repeats could be all of it.
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Limit:
    """How much worse a metric may get."""

    amount: float  # of the base where relative (0.05: five per cent), else in the metric's own unit
    relative: bool


@dataclass(frozen=True)
class Comparison:
    """One metric of two sets of runs. Values are in the metric's unit, changes as `Limit.amount`.

    ``worse`` is positive where the new runs are worse, whichever direction is better.
    """

    base: float
    new: float
    worse: float
    #: In which ``worse`` lies, two-sided 90 %; None where no side has repeats: noise is unknown.
    interval: tuple[float, float] | None
    limit: Limit
    base_runs: int
    new_runs: int
    outcome: Outcome

    @property
    def noise_hides_limit(self) -> bool:
        """Whether repeats differ so much that a regression as large as the limit would not be seen."""
        return self.interval is not None and (self.interval[1] - self.interval[0]) / 2 > self.limit.amount


def compare(
    base: Sequence[float], new: Sequence[float], limit: Limit, *, lower_is_better: bool
) -> Comparison:
    """Judge one metric.

    A regression is a change for the worse that is larger than the limit and, where noise is known, that
    noise does not explain (the interval lies above 0).

    Args:
        base: the metric of each run of the base, one value a run.
        new: likewise of the new runs.
        limit: how much worse is allowed.
        lower_is_better: whether small values are good.

    Raises:
        ValueError: no run on one side, a value that is not finite, or a relative limit on values that are not
            all above 0.
    """
    if not base or not new:
        raise ValueError("no run to compare")
    if not all(map(math.isfinite, [*base, *new])):
        raise ValueError("a value is not finite")
    if limit.relative and min(*base, *new) <= 0:
        raise ValueError("a relative limit needs values above 0")
    old_values = [math.log(value) for value in base] if limit.relative else list(base)
    new_values = [math.log(value) for value in new] if limit.relative else list(new)
    change = fmean(new_values) - fmean(old_values)
    half = _half_width(old_values, new_values)
    ends = [change - (half or 0.0), change + (half or 0.0)]
    if limit.relative:
        change, *ends = (math.expm1(min(value, 700.0)) for value in (change, *ends))
    sign = 1 if lower_is_better else -1
    worse = sign * change
    low, high = sorted(sign * end for end in ends)
    interval = None if half is None else (low, high)
    outcome = Outcome.OK
    if worse > limit.amount:
        explained = interval is not None and interval[0] <= 0
        outcome = Outcome.INCONCLUSIVE if explained else Outcome.REGRESSION
    mean = _geometric if limit.relative else fmean
    return Comparison(mean(base), mean(new), worse, interval, limit, len(base), len(new), outcome)


def _half_width(base: Sequence[float], new: Sequence[float]) -> float | None:
    """Half of the 90 % interval of the difference of means; None without repeats."""
    freedom = len(base) + len(new) - 2
    if freedom < 1:
        return None
    squares = sum((value - fmean(side)) ** 2 for side in (base, new) for value in side)
    return t_quantile(freedom) * math.sqrt(squares / freedom * (1 / len(base) + 1 / len(new)))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def t_quantile(freedom: int) -> float:
    """The 95 % quantile of Student's distribution with ``freedom`` degrees of freedom.

    Tabulated up to ten degrees; above, the expansion about the normal quantile (Abramowitz and Stegun,
    26.7.5), good to four digits there.
    """
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    x = _NORMAL_95
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
    )
    return float(x + sum(term / freedom**power for power, term in enumerate(terms, 1)))


_NORMAL_95 = NormalDist().inv_cdf(CONFIDENCE)
_T_95 = (6.313752, 2.919986, 2.353363, 2.131847, 2.015048, 1.943180, 1.894579, 1.859548, 1.833113, 1.812461)
