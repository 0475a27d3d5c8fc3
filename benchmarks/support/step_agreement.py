"""Our steps beside those of an nsys recording: matched by their pattern, then compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmprobe.record.layout import PHASES
from support.nsys_truth import Truth

#: Steps at either end of a recording, in which starting and stopping it may show.
_CUT = 2
_FEWEST = 8
#: How far the host's own times of the same step may lie apart, by the middle of them.
_MATCH_NS = 200_000


class NoMatch(Exception):
    """The steps of the journal are not those of the recording."""


@dataclass(frozen=True)
class Agreement:
    """One recording. Seconds; ratios of the steps' whole time.

    ``launch`` is time in which the device was idle and the host in the call that launches a step's first
    kernel, which the tool prolongs; what is said to be without it counts it as part of the span.
    """

    steps: int
    phases: dict[str, int]
    span_truth_seconds: float  # median
    span_error_seconds: float  # median of |ours - truth|
    span_error_without_launch_seconds: float
    gap_ours: float
    gap_truth: float
    gap_truth_between: float  # of it, outside the steps' spans
    launch: float  # of it, see above
    activities: int

    @property
    def span_most_seconds(self) -> float:
        """The bar: 1 % or 20 us."""
        return max(0.01 * self.span_truth_seconds, 20e-6)


def match(steps: np.ndarray, truth: Truth) -> np.ndarray:
    """The journal's records of the recording's steps, row by row.

    The two clocks differ by a constant, so of all ways to lay one sequence beside the other the right one
    makes the difference of the host's entry times constant.

    Raises:
        NoMatch: none does.
    """
    count = len(truth.entered)
    names = np.array(PHASES)[np.minimum(steps["phase"], len(PHASES) - 1)]
    tokens = steps["prompt_tokens"].astype(np.int64) + steps["decode_tokens"]
    best: tuple[float, int] | None = None
    for shift in range(len(steps) - count + 1):
        rows = slice(shift, shift + count)
        if (names[rows] != truth.phase).any() or (tokens[rows] != truth.tokens).any():
            continue
        apart = truth.entered - steps["time"][rows]
        spread = float(np.median(np.abs(apart - np.median(apart))))
        if best is None or spread < best[0]:
            best = spread, shift
    if best is None or best[0] > _MATCH_NS:
        raise NoMatch(f"{count} recorded steps, {len(steps)} in the journal, {best}")
    return steps[best[1] : best[1] + count]


def agreement(steps: np.ndarray, truth: Truth) -> Agreement:
    """Compare the longest row of steps of which nsys lost nothing. Raises NoMatch."""
    ours = match(steps, truth)
    first, last = _longest(truth.complete[_CUT : len(ours) - _CUT])
    if last - first < _FEWEST:
        lost = int((~truth.complete).sum())
        raise NoMatch(f"nsys lost launches in {lost} of {len(ours)} steps; {last - first} in a row are left")
    rows = slice(first + _CUT, last + _CUT)
    mine, begin, end, called = ours[rows], truth.begin[rows], truth.end[rows], truth.called[rows]
    span, known = mine["e3"] - mine["e0"], end - begin
    gaps = (mine["e0"][1:] - mine["e3"][:-1]).clip(0).sum() + (mine["e2"] - mine["e1"])[1:].sum()
    elapsed = int(end[-1] - end[0])
    names, counts = np.unique(truth.phase[rows], return_counts=True)
    return Agreement(
        len(mine),
        dict(zip(names.tolist(), counts.tolist(), strict=True)),
        float(np.median(known)) / 1e9,
        float(np.median(np.abs(span - known))) / 1e9,
        float(np.median(np.abs(span - (end - called)))) / 1e9,
        float(gaps / (mine["e3"][-1] - mine["e3"][0])),
        1 - truth.busy_between(int(end[0]), int(end[-1])) / elapsed,
        1 - float(known[1:].sum()) / elapsed,
        float((begin - called)[1:].sum()) / elapsed,
        truth.activities,
    )


def _longest(complete: np.ndarray) -> tuple[int, int]:
    """Begin and end of the longest row of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], complete, [False])).astype(np.int8)))
    if not len(edges):
        return 0, 0
    longest = int(np.argmax(edges[1::2] - edges[::2]))
    return int(edges[2 * longest]), int(edges[2 * longest + 1])
