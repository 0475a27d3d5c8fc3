"""What the device did in each step, as an nsys recording has it.

Reads nsys's SQLite export by itself: what is compared with llmprobe must not come from llmprobe's code. Only
the ranges that say which launches belong to a step are ours.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PUSH_POP, _DOMAIN_CREATE = 59, 75
_PROCESS_BITS = 24  # a serialized thread id without its lowest bits names the process
_PHASES = ("prefill", "decode", "mixed", "draft", "dummy", "encode")
_ACTIVITIES = tuple(f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE"))


@dataclass(frozen=True)
class Truth:
    """Steps in order; nanoseconds of nsys's clock."""

    phase: np.ndarray  # (N,) names
    tokens: np.ndarray  # (N,) the ranges' payload
    entered: np.ndarray  # (N,) when the host entered the step
    begin: np.ndarray  # (N,) first activity launched from the step's forward on; -1 if there is none
    end: np.ndarray  # (N,) last such activity's end
    #: (N,) from when the device had nothing to do and the host was in the call that launched the first
    #: activity; ``begin`` where the device was still busy then. Tracing graphs node by node makes this call
    #: more than ten times as long.
    called: np.ndarray
    complete: np.ndarray  # (N,) whether each launch of the step has its activity: nsys loses some at times
    busy: np.ndarray  # (M, 2) when anything ran: the union of kernels, copies and sets on all streams
    activities: int

    def busy_between(self, begin: int, end: int) -> int:
        """Nanoseconds between two times in which anything ran."""
        clipped = np.clip(self.busy, begin, end)
        return int((clipped[:, 1] - clipped[:, 0]).sum())


def read_truth(path: Path) -> Truth:
    """Read an export. Raises ValueError if it holds no step of llmprobe, or nothing that ran."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as data:
        ranges = _ranges(data)
        steps = [row for row in ranges if row[2] in _PHASES and row[1] > 0]
        if not steps:
            raise ValueError(f"{path} holds no range of llmprobe")
        forwards = np.array(sorted(row[0] for row in ranges if row[2] == "forward"), dtype=np.int64)
        (process,) = {row[3] >> _PROCESS_BITS for row in steps}
        threads = {row[3] for row in steps}
        calls = [row for row in cuda_calls(data) if row[2] in threads]
        rows = [
            row
            for table in _ACTIVITIES
            for row in _activities(data, table)
            if row[4] >> _PROCESS_BITS == process
        ]
    if not rows:
        raise ValueError(f"{path} holds nothing that ran on a device")
    begin, end, stream, correlation = (
        np.array(column, dtype=np.int64) for column in list(zip(*rows, strict=True))[:4]
    )
    launches = {row[3]: row[0] for row in reversed(calls)}
    launched = np.array([launches.get(number, -1) for number in correlation.tolist()], dtype=np.int64)
    main = np.bincount(stream).argmax()
    since = np.array([row[0] for row in steps], dtype=np.int64)
    until = np.array([row[1] for row in steps], dtype=np.int64)
    starts = since.copy()
    if len(forwards):
        first = np.searchsorted(forwards, since)
        inside = first < len(forwards)
        inside[inside] &= forwards[first[inside]] < until[inside]
        starts[inside] = forwards[first[inside]]
    first_begin = np.full(len(steps), -1, dtype=np.int64)
    last_end, called = first_begin.copy(), first_begin.copy()
    busy = _union(begin, end)
    used = (launched >= 0) & (stream == main)
    step = np.searchsorted(since, launched, side="right") - 1
    used &= (step >= 0) & (launched >= starts[step]) & (launched <= until[step])
    for number in np.unique(step[used]):
        mine = used & (step == number)
        row = int(np.flatnonzero(mine)[begin[mine].argmin()])
        first_begin[number], last_end[number] = begin[row], end[mine].max()
        idle_since = int(busy[max(int(np.searchsorted(busy[:, 0], begin[row])) - 1, 0), 1])
        called[number] = min(int(begin[row]), max(int(launched[row]), idle_since))
    complete = first_begin >= 0
    ran = set(correlation.tolist())
    lost = np.array([row[0] for row in calls if "Launch" in row[4] and row[3] not in ran], dtype=np.int64)
    of = np.searchsorted(since, lost, side="right") - 1
    complete[of[(of >= 0) & (lost <= until[of])]] = False
    return Truth(
        np.array([row[2] for row in steps]),
        np.array([row[4] for row in steps], dtype=np.int64),
        since,
        first_begin,
        last_end,
        called,
        complete,
        busy,
        len(rows),
    )


def device_busy(path: Path) -> tuple[np.ndarray, float]:
    """When anything ran on a device, of every process in an export, and what nsys lost of it.

    Asks for no range of llmprobe, so it serves a server whose probe is off too. Raises ValueError if nothing
    ran.

    Returns:
        (M, 2) nanoseconds of nsys's clock; the share of launches whose kernel or graph is not there, which
        look like idle time.
    """
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as data:
        activities = [row for table in _ACTIVITIES for row in _activities(data, table)]
        launches = [row[3] for row in cuda_calls(data) if "Launch" in row[4]]
    rows = [row[:2] for row in activities]
    if not rows:
        raise ValueError(f"{path} holds nothing that ran on a device")
    begin, end = np.array(rows, dtype=np.int64).T
    lost = len(set(launches) - {row[3] for row in activities}) / max(len(launches), 1)
    return _union(begin, end), lost


def _ranges(data: sqlite3.Connection) -> list[tuple[int, int, str, int, int]]:
    """(Begin, end, name, thread, payload) of llmprobe's ranges, by begin."""
    columns = {row[1] for row in data.execute("PRAGMA table_info(NVTX_EVENTS)")}
    domains = {
        (thread >> _PROCESS_BITS, domain)
        for thread, domain in data.execute(
            "SELECT globalTid, domainId FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId "
            "WHERE eventType = ? AND coalesce(text, value) = 'llmprobe'",
            (_DOMAIN_CREATE,),
        )
    }
    payloads = [
        name for name in ("int64Value", "uint64Value", "int32Value", "uint32Value") if name in columns
    ]
    payload = f"coalesce({', '.join([*payloads, '-1'])})" if payloads else "-1"
    rows = data.execute(
        f"SELECT start, coalesce(end, -1), coalesce(text, value), globalTid, {payload}, domainId "
        "FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId WHERE eventType = ? ORDER BY start",
        (_PUSH_POP,),
    )
    return [row[:5] for row in rows if (row[3] >> _PROCESS_BITS, row[5]) in domains]


def cuda_calls(data: sqlite3.Connection) -> list[tuple[int, int, int, int, str]]:
    """(Begin, end, thread, correlation, name) of CUDA calls."""
    return data.execute(
        "SELECT start, end, globalTid, correlationId, value FROM CUPTI_ACTIVITY_KIND_RUNTIME "
        "JOIN StringIds ON id = nameId"
    ).fetchall()


def _activities(data: sqlite3.Connection, table: str) -> list[tuple[int, int, int, int, int]]:
    known = data.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    if known is None:
        return []
    return data.execute(f"SELECT start, end, streamId, correlationId, globalPid FROM {table}").fetchall()


def _union(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    order = np.argsort(begin, kind="stable")
    begin, reach = begin[order], np.maximum.accumulate(end[order])
    fresh = np.ones(len(begin), dtype=bool)
    fresh[1:] = begin[1:] > reach[:-1]
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], len(begin)) - 1
    return np.stack((begin[first], reach[last]), axis=1)
