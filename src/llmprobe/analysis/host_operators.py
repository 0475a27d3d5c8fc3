"""Operators of a framework on the host, and the calls into CUDA that they make.

How often, how long, and how long without what they call.
"""

from __future__ import annotations

from array import array

import numpy as np

from llmprobe.analysis.events import HostOperator, Ints
from llmprobe.analysis.names import NameTable


class HostOperators:
    """Nested operators of several threads; of one thread they lie inside or beside each other."""

    def __init__(self) -> None:
        self._names = NameTable()
        self._rows = array("q")  # thread, begin, end, name

    def add(self, thread: int, begin_ns: int, end_ns: int, name: str) -> None:
        """One call of an operator or into CUDA, in any order."""
        self._rows.extend((thread, begin_ns, end_ns, self._names.add(name)))

    def result(self, until_ns: int | None = None) -> list[HostOperator]:
        """By name, the largest time of its own first.

        An operator whose one call is of the same name again (another overload of it) counts once with it, as
        in PyTorch's ``key_averages``.

        Args:
            until_ns: when the recording was told to end, if that is known. What goes on then is cut, and what
                begins later is left out: torch gives an operator that is still open as its end when the trace
                was put together, which may be half a second later.
        """
        if not self._rows:
            return []
        rows = np.frombuffer(self._rows, dtype=np.int64).reshape(-1, 4)
        if until_ns is not None:
            rows = rows[rows[:, 1] < until_ns]
        thread, begin, end, name = rows.T
        if until_ns is not None:
            end = np.minimum(end, until_ns)
        caller = _callers(thread, begin, end)
        calls = caller >= 0
        length = end - begin
        called = np.bincount(caller[calls], weights=length[calls], minlength=len(length))
        callees = np.bincount(caller[calls], minlength=len(length))
        again = calls & (name[caller] == name) & (callees[caller] == 1)
        size = len(self._names.names)
        count = np.bincount(name[~again], minlength=size)
        total = np.bincount(name[~again], weights=length[~again], minlength=size)
        own = np.bincount(name, weights=np.maximum(length - called, 0), minlength=size)
        return [
            HostOperator(
                name=self._names.names[index],
                count=int(count[index]),
                seconds=float(total[index]) / 1e9,
                self_seconds=float(own[index]) / 1e9,
            )
            for index in np.argsort(-own, kind="stable").tolist()
            if count[index]
        ]


def _callers(thread: Ints, begin: Ints, end: Ints) -> Ints:
    """For each call the row of the innermost one of its thread in which it begins, or -1."""
    order = np.lexsort((-end, begin, thread)).tolist()
    threads, begins, ends = thread.tolist(), begin.tolist(), end.tolist()
    caller = np.full(len(begins), -1, dtype=np.int64)
    open_calls: list[int] = []
    for row in order:
        while open_calls:
            last = open_calls[-1]
            if threads[last] == threads[row] and begins[row] < ends[last]:
                caller[row] = last
                break
            open_calls.pop()
        open_calls.append(row)
    return caller
