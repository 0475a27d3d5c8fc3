"""Who waits for whom in a step, by an nsys recording: the engine's thread for the GPU, or the GPU for it.

Asks for no range of llmprobe, so it serves a server whose probe is off too.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.nsys_truth import cuda_calls, device_busy

#: A step with more launches than so many times the median's is no decode step of one CUDA graph.
_MANY = 2.0
_FEWEST = 8
_RARE = 0.1  # what so many do at most is no pattern's


@dataclass(frozen=True)
class HostSteps:
    """Steps, each from the end of one wait for the GPU to the end of the next; in order, nanoseconds.

    Attributes:
        took: (N,).
        waited: (N,) of it the engine's thread was in calls that do nothing but wait for the GPU.
        idle: (N,) of it nothing ran on the GPU.
        launched_often: (N,) whether the step is one of many launches, such as those with prompts.
        calls: name of a CUDA call of that thread → how many a step, and nanoseconds a step.
        lost: share of the launches that nsys did not record: they look like idle time.
    """

    took: np.ndarray
    waited: np.ndarray
    idle: np.ndarray
    launched_often: np.ndarray
    calls: dict[str, tuple[float, float]]
    lost: float


def host_steps(path: Path) -> HostSteps:
    """Read an export. Raises ValueError if the thread that launches waits for the GPU in too few calls."""
    busy, lost = device_busy(path)
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as data:
        calls = cuda_calls(data)
    launches = defaultdict[int, int](int)
    for _, _, thread, _, name in calls:
        launches[thread] += "Launch" in name
    engine = max(launches, key=lambda thread: launches[thread])
    mine = [(begin, end, name) for begin, end, thread, _, name in calls if thread == engine]
    ends = np.array(sorted(row[1] for row in mine if "EventSynchronize" in row[2]), dtype=np.int64)
    if len(ends) < _FEWEST + 1:
        raise ValueError(f"{path} has {len(ends)} waits of the engine's thread for the GPU: too few steps")
    launched = np.array(sorted(row[0] for row in mine if "Launch" in row[2]), dtype=np.int64)
    ends = _once_a_step(ends, launched)
    begin, end = ends[:-1], ends[1:]
    number = _within(launched, begin, end)
    waits = np.array(sorted(row[:2] for row in mine if "Synchronize" in row[2]), dtype=np.int64)
    inside = [row for row in mine if begin[0] <= row[0] < end[-1]]
    sums = defaultdict[str, list[float]](lambda: [0.0, 0.0])
    for first, last, name in inside:
        sums[name][0] += 1 / len(begin)
        sums[name][1] += (last - first) / len(begin)
    return HostSteps(
        took=end - begin,
        waited=_covered(waits, begin, end),
        idle=(end - begin) - _covered(busy, begin, end),
        launched_often=number > _MANY * np.median(number),
        calls={name: (count, nanoseconds) for name, (count, nanoseconds) in sums.items()},
        lost=lost,
    )


def _once_a_step(ends: np.ndarray, launched: np.ndarray) -> np.ndarray:
    """Every second, if the thread waits twice a step: few launches follow the one wait, many the other."""
    number = _within(launched, ends[:-1], ends[1:])
    for first in (0, 1):
        few, many = number[first::2], number[1 - first :: 2]
        if np.quantile(few, 1 - _RARE) < np.quantile(many, _RARE):
            return ends[first::2]
    return ends


def _within(times: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N,) how many of ``times``, in order, lie in each [begin, end)."""
    return np.asarray(np.searchsorted(times, end) - np.searchsorted(times, begin))


def _covered(busy: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N,) nanoseconds of each [begin, end) that lie in ``busy``, disjoint intervals in order."""
    before = np.concatenate(([0], np.cumsum(busy[:, 1] - busy[:, 0])))

    def until(times: np.ndarray) -> np.ndarray:
        row = np.searchsorted(busy[:, 0], times, side="right")
        last = np.maximum(row - 1, 0)
        over = np.where(row > 0, np.maximum(busy[last, 1] - times, 0), 0)
        return before[row] - over

    return until(end) - until(begin)
