"""The latest steps of one phase, kept as running totals: a window costs the difference of two of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmprobe.compute.steps import Floats, Ints
from llmprobe.compute.sums import COLUMNS, INDEX, PhaseSums, prefill_share

_LEAST_ROWS = 256
_NO_SHARE = np.zeros(len(COLUMNS))


class LastStep(NamedTuple):
    """The newest of them; ``end_ns`` is CLOCK_MONOTONIC, ``tokens`` are query tokens."""

    end_ns: int
    span_seconds: float
    tokens: float


class KeptSteps:
    """Steps in the order of their ends, in arrays with room for as many again."""

    def __init__(self, shared: bool = False) -> None:
        """
        Args:
            shared: keep totals weighted by `prefill_share` too.
        """
        self._ends = np.empty(0, np.int64)
        self._spans = np.empty(0)
        #: Row i is the sum over the steps before i, so that there is one row more than steps.
        self._totals = np.zeros((1, len(COLUMNS)))
        self._shared = np.zeros((1, len(COLUMNS))) if shared else None
        self._first = self._last = 0

    def add(self, ends: Ints, rows: Floats) -> None:
        """Append steps, none of which is empty or ended before those that are here.

        Args:
            ends: (N,) CLOCK_MONOTONIC nanoseconds.
            rows: (N, `COLUMNS`).
        """
        if self._last + len(ends) > len(self._ends):
            self._make_room(len(ends))
        at = slice(self._last, self._last + len(ends))
        self._ends[at] = ends
        self._spans[at] = rows[:, INDEX["span"]]
        _continue(self._totals, at, rows)
        if self._shared is not None:
            _continue(self._shared, at, rows * prefill_share(rows)[:, np.newaxis])
        self._last = at.stop

    def forget_before(self, time_ns: int) -> None:
        """Drop the steps that ended at ``time_ns`` or before."""
        self._first += int(self._ends[self._first : self._last].searchsorted(time_ns, side="right"))

    def between(self, since_ns: int, until_ns: int) -> PhaseSums | None:
        """Steps that ended after ``since_ns`` and not after ``until_ns``; None if there is none.

        Good until the next `add`.
        """
        first, last = self._range(since_ns, until_ns)
        if first == last:
            return None
        totals, shared = self._totals, self._shared
        return PhaseSums(
            totals[last] - totals[first],
            _NO_SHARE if shared is None else shared[last] - shared[first],
            self._spans[first:last],
            lambda: np.diff(totals[first : last + 1], axis=0),
        )

    def tokens(self, since_ns: int, until_ns: int) -> Floats:
        """(N,) query tokens of each step in that time."""
        first, last = self._range(since_ns, until_ns)
        of = self._totals[first : last + 1, [INDEX["prompt_tokens"], INDEX["decode_tokens"]]].sum(axis=1)
        return np.diff(of)

    def last(self) -> LastStep | None:
        """The newest step; None if none is kept."""
        if self._first == self._last:
            return None
        at = self._last - 1
        end_ns = int(self._ends[at])
        return LastStep(end_ns, float(self._spans[at]), float(self.tokens(end_ns - 1, end_ns)[-1]))

    def _range(self, since_ns: int, until_ns: int) -> tuple[int, int]:
        ends = self._ends[self._first : self._last]
        first, last = (self._first + ends.searchsorted((since_ns, until_ns), side="right")).tolist()
        return first, last

    def _make_room(self, more: int) -> None:
        kept = slice(self._first, self._last)
        room = max(2 * (self._last - self._first + more), _LEAST_ROWS)
        self._ends, self._spans = _moved(self._ends[kept], room), _moved(self._spans[kept], room)
        # Totals begin anew at 0, so that they stay small and exact.
        totals = slice(self._first, self._last + 1)
        self._totals = _moved(self._totals[totals] - self._totals[self._first], room + 1)
        if self._shared is not None:
            self._shared = _moved(self._shared[totals] - self._shared[self._first], room + 1)
        self._first, self._last = 0, self._last - self._first


def _continue(totals: Floats, at: slice, rows: Floats) -> None:
    """Go on adding up from the total before the first of ``rows``."""
    new = totals[at.start + 1 : at.stop + 1]
    np.cumsum(rows, axis=0, out=new)
    new += totals[at.start]


def _moved(rows: np.ndarray, room: int) -> np.ndarray:
    made = np.empty((room, *rows.shape[1:]), rows.dtype)
    made[: len(rows)] = rows
    return made
