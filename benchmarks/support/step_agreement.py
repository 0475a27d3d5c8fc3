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
#: Steps so many seconds before a recorded one show what they take without: a recording takes time to start.
_BEFORE_SECONDS = (4.0, 1.0)
_FEWEST_BEFORE = 20
#: So many times the median distance from the median span, and it is not of the trend.
_OUTLIER = 8.0


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
    slower: float | None  # by how much the recording made spans longer, by the step clock; see `_slower`

    @property
    def gap_between(self) -> float:
        """Outside the steps' spans, the launch call counted as span: what a step clock can see."""
        return self.gap_truth_between - self.launch

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
        _slower(steps, mine),
    )


def _slower(steps: np.ndarray, recorded: np.ndarray) -> float | None:
    """How much longer recorded spans are than those before led on to expect; None if too few were before.

    Contexts grow, and steps with them: a line through the spans before the recording is drawn on to it.
    """
    begin, (longest, shortest) = recorded["time"][0], _BEFORE_SECONDS
    before = steps[
        (steps["time"] > begin - longest * 1e9)
        & (steps["time"] < begin - shortest * 1e9)
        & (steps["phase"] == recorded["phase"][0])
        & (steps["requests"] == recorded["requests"][0])
    ]
    alike = (recorded["phase"] == recorded["phase"][0]) & (recorded["requests"] == recorded["requests"][0])
    if len(before) < _FEWEST_BEFORE or alike.sum() < _FEWEST:
        return None
    expected = np.polyval(_line(before, begin), _seconds(recorded[alike], begin))
    return float(np.median((recorded["e3"] - recorded["e0"])[alike] / expected)) - 1


def _line(steps: np.ndarray, since: np.integer) -> np.ndarray:
    """Through their spans, in nanoseconds over seconds; without the few that something else held up.

    One step of 50 ms among six hundred of 6 ms, if it is the first, would turn the line by 8 %.
    """
    at, span = _seconds(steps, since), (steps["e3"] - steps["e0"]).astype(np.float64)
    off = np.abs(span - np.median(span))
    usual = off <= _OUTLIER * max(float(np.median(off)), 1.0)
    return np.polyfit(at[usual], span[usual], 1)


def _seconds(steps: np.ndarray, since: np.integer) -> np.ndarray:
    return (steps["time"].astype(np.int64) - np.int64(since)) / 1e9


def _longest(complete: np.ndarray) -> tuple[int, int]:
    """Begin and end of the longest row of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], complete, [False])).astype(np.int8)))
    if not len(edges):
        return 0, 0
    longest = int(np.argmax(edges[1::2] - edges[::2]))
    return int(edges[2 * longest]), int(edges[2 * longest + 1])
