"""The kernel windows of one process: read from its file, worked out, and kept for a while as evidence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.kernel_windows import PhaseWindow, TopKernel, phase_windows, together
from llmprobe.record.demangle import demangled
from llmprobe.record.window_file import Seen, WindowFileError, read_window, window_path

#: Step records reach the journal a moment after their step: a window is worked out this long after its end.
_SETTLE_NS = 600_000_000
#: Evidence of a phase is the newest windows with so many of its steps ...
_ENOUGH_STEPS = 16
#: ... and none with fewer than this: one or two mixed steps say little of all the others.
_FEWEST_STEPS = 3
#: ... no older than this, which is as old as evidence may be (`kernel_age_seconds`); the newest in any case.
_TOGETHER_NS = 60 * 10**9
_KEPT_NS = 120 * 10**9


@dataclass(frozen=True)
class KernelTotals:
    """Cumulative over all windows of a process: seconds of device time in the steps that windows saw."""

    seconds: dict[str, dict[str, float]]  # phase → class of kernel
    span_seconds: float
    busy_seconds: float
    windows: int


class Windows:
    """Follows one process's window file. Methods do not raise."""

    def __init__(self, journal: Path) -> None:
        self._path = window_path(journal)
        self._stat: tuple[int, int] | None = None
        self._number = 0
        self._waiting: Seen | None = None
        self._kept: dict[str, deque[tuple[int, PhaseWindow]]] = {}
        self._seconds: dict[str, dict[str, float]] = {}
        self._span_ns = self._busy_ns = self._windows = 0

    def look(
        self,
        now_ns: int,
        recent_steps: Callable[[], np.ndarray],
        floors: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """Take in a new window, once the records of its steps are there.

        Args:
            recent_steps: gives step records, oldest first.
            floors: gives their modelled floors in seconds, 0 where one is not known.
        """
        if self._waiting is None:
            self._waiting = self._read()
        seen = self._waiting
        if seen is None or now_ns < seen.window.end_ns + _SETTLE_NS:
            return
        self._waiting = None
        window = seen.window
        if window.dropped:
            return
        names = [demangled(name) for name in window.names]
        rows = window.activities
        if len(rows):  # a process drives one device, as a rule; else the one that does most of its work
            rows = rows[rows["device"] == np.bincount(rows["device"]).argmax()]
        steps = recent_steps()
        floor_s = None if floors is None else floors(steps)
        found = phase_windows(rows, names, steps, window.begin_ns, window.end_ns, floor_s)
        for phase, of_phase in found.items():
            self._kept.setdefault(phase, deque()).append((window.end_ns, of_phase))
            sums = self._seconds.setdefault(phase, {})
            for label, nanoseconds in of_phase.class_ns.items():
                sums[label] = sums.get(label, 0.0) + nanoseconds / 1e9
            self._span_ns += of_phase.span_ns
            self._busy_ns += of_phase.busy_ns
        self._windows += bool(found)

    def evidence(self, now_ns: int) -> dict[str, KernelEvidence]:
        """By phase: what the newest windows saw."""
        return {
            phase: window.evidence((now_ns - end_ns) / 1e9)
            for phase, (end_ns, window) in self._newest(now_ns).items()
        }

    def top(self, now_ns: int) -> dict[str, tuple[TopKernel, ...]]:
        """By phase: the kernels that took most in the newest windows."""
        return {phase: window.top for phase, (_, window) in self._newest(now_ns).items()}

    def totals(self) -> KernelTotals | None:
        """None before the first window."""
        if not self._windows:
            return None
        seconds = {phase: dict(sums) for phase, sums in self._seconds.items()}
        return KernelTotals(seconds, self._span_ns / 1e9, self._busy_ns / 1e9, self._windows)

    def save(self) -> dict[str, Any]:
        """What an agent that starts anew needs in order to go on counting."""
        return {
            "number": self._number,
            "seconds": self._seconds,
            "span_ns": self._span_ns,
            "busy_ns": self._busy_ns,
            "windows": self._windows,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`."""
        self._number = int(saved["number"])
        self._seconds = {phase: dict(sums) for phase, sums in saved["seconds"].items()}
        self._span_ns, self._busy_ns = int(saved["span_ns"]), int(saved["busy_ns"])
        self._windows = int(saved["windows"])

    def _newest(self, now_ns: int) -> dict[str, tuple[int, PhaseWindow]]:
        found = {}
        for phase, kept in self._kept.items():
            while kept and now_ns - kept[0][0] > _KEPT_NS:
                kept.popleft()
            if not kept:
                continue
            newest = kept[-1][0]
            chosen: list[PhaseWindow] = []
            for end_ns, window in reversed(kept):
                old = end_ns < newest and now_ns - end_ns > _TOGETHER_NS
                if old or sum(one.steps for one in chosen) >= _ENOUGH_STEPS:
                    break
                chosen.append(window)
            if sum(one.steps for one in chosen) >= _FEWEST_STEPS:
                found[phase] = newest, together(chosen)
        return found

    def _read(self) -> Seen | None:
        try:
            stat = self._path.stat()
            state = stat.st_mtime_ns, stat.st_ino
            if state == self._stat:
                return None
            self._stat = state
            seen = read_window(self._path)
        except (OSError, WindowFileError):
            return None
        if seen.number <= self._number:
            return None
        self._number = seen.number
        return seen
