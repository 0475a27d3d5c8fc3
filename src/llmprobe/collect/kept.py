"""The accounts of a rank's latest steps, by phase, without copying what is already there."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmprobe.compute.accounting import StepAccounts

_COLUMNS = tuple(
    field.name for field in dataclasses.fields(StepAccounts) if field.name not in ("cursor_ns", "last_step")
)
_LEAST_ROWS = 256


class KeptAccounts:
    """Rows in the order of their ends, in arrays with room for as many again."""

    def __init__(self) -> None:
        none = StepAccounts.none()
        self._arrays: dict[str, np.ndarray] = {name: getattr(none, name) for name in _COLUMNS}
        self._first = self._last = 0

    def add(self, rows: StepAccounts) -> None:
        """Append rows, none of which ended before those that are here."""
        if self._last + len(rows) > len(self._arrays["end_ns"]):
            self._make_room(len(rows))
        end = self._last + len(rows)
        for name, array in self._arrays.items():
            array[self._last : end] = getattr(rows, name)
        self._last = end

    def forget_before(self, time_ns: int) -> None:
        """Drop the steps that ended at ``time_ns`` or before."""
        ends = self._arrays["end_ns"][self._first : self._last]
        self._first += int(np.searchsorted(ends, time_ns, side="right"))

    def between(self, since_ns: int, until_ns: int) -> StepAccounts:
        """Steps that ended after ``since_ns`` and not after ``until_ns``; good until the next `add`."""
        ends = self._arrays["end_ns"][self._first : self._last]
        first, last = (self._first + np.searchsorted(ends, (since_ns, until_ns), side="right")).tolist()
        rows = {name: array[first:last] for name, array in self._arrays.items()}
        return StepAccounts(**rows, cursor_ns=None, last_step=None)

    def _make_room(self, more: int) -> None:
        kept = self._last - self._first
        rows = max(2 * (kept + more), _LEAST_ROWS)
        for name, old in self._arrays.items():
            new = np.empty((rows, *old.shape[1:]), old.dtype)
            new[:kept] = old[self._first : self._last]
            self._arrays[name] = new
        self._first, self._last = 0, kept
