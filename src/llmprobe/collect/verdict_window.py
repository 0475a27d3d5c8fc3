"""The steps that a verdict is about: those of the last seconds, or the one that a running one may be like."""

from __future__ import annotations

import dataclasses

from llmprobe.collect.process import Rank
from llmprobe.compute.figures import PhaseFigures, figures_of
from llmprobe.compute.steps import PHASES
from llmprobe.compute.sums import INDEX, PhaseSums


class VerdictWindow:
    """The steps of one rank that ended in the last ``window_ns``; of time in which nobody looked it has none.

    Long steps would leave it empty: while one runs that may be like the one of its phase before it, the
    window of that phase reaches back to that one's end. Steps of less than half of it leave it none too soon.
    """

    def __init__(self, rank: Rank, now_ns: int, window_ns: int) -> None:
        """
        Args:
            rank: whose steps; it holds them until the next `Rank.fold`, and so does this.
            now_ns: where the window ends, CLOCK_MONOTONIC nanoseconds.
            window_ns: its length.
        """
        self._rank, self._now_ns = rank, now_ns
        self._since = min(max(now_ns - window_ns, rank.first_ns or 0), now_ns - 1)
        self.steps = rank.steps(self._since, now_ns)
        self._seconds = max((now_ns - self._since) / 1e9, self._covered())
        self._reached: tuple[str, int, float] | None = None
        index, last = rank.like_the_last(now_ns) or (None, None)
        if index is None or last is None or index in self.steps or last.span_seconds < window_ns / 2e9:
            return
        since, running = last.end_ns - 1, rank.running_since() or now_ns
        steps = rank.steps(since, now_ns).get(index)
        if steps is None:  # a device's clock that runs ahead
            return
        self.steps[index] = steps
        # From the begin of the one to that of the other: nothing of the one that runs is in any figure.
        self._reached = PHASES[index], since, _taken(steps) + max(running - last.end_ns, 0) / 1e9

    def _covered(self) -> float:
        """Seconds of its steps, all of the first included, of which it has only the end; and idle since."""
        ended = sum(map(_taken, self.steps.values()))
        newest = self._rank.newest()
        if newest is None or self._rank.running_since() is not None:
            return ended
        return ended + max(self._now_ns - int(newest["e3"]), 0) / 1e9

    def since(self, phase: str) -> int:
        """Where it begins, CLOCK_MONOTONIC nanoseconds."""
        return self._reached[1] if self._reached and self._reached[0] == phase else self._since

    def seconds(self, phase: str) -> float:
        """How long it is."""
        return self._reached[2] if self._reached and self._reached[0] == phase else self._seconds

    def figures(self, phase: str, known_gaps: bool, operators: bool = False) -> PhaseFigures | None:
        """Of one phase; None without a step."""
        steps = self.steps.get(PHASES.index(phase))
        if steps is None:
            return None
        found = figures_of(
            {PHASES.index(phase): steps},
            window_seconds=self.seconds(phase),
            peaks=self._rank.peaks,
            operators=operators,
        ).get(phase)
        return found if known_gaps or found is None else dataclasses.replace(found, sync_gap_ratio=None)


def _taken(steps: PhaseSums) -> float:
    """Seconds of steps and of the gaps before them."""
    return float(steps.sums[INDEX["span"]] + steps.sums[INDEX["gap"]])
