"""Busy, idle and exposed time against plain counting, nanosecond by nanosecond."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.analysis.busy import length_ns, occupations
from llmprobe.analysis.events import COPY, GRAPH, KERNEL, SET, Activities, Source, Trace, by_begin, no_spans

NAMES = ["nvjet_tst", "ncclDevKernel_AllReduce", "memcpy HtoD", "memset"]
#: (begin, length, what, GPU): what is a row of NAMES
ROW = st.tuples(st.integers(0, 60), st.integers(0, 15), st.integers(0, 3), st.integers(0, 1))


def trace_of(rows: list[tuple[int, int, int, int]], launched: list[int] | None = None) -> Trace:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    begin, length, what, device = columns
    kind = np.array([KERNEL, KERNEL, COPY, SET])[what]
    times = np.array(launched, dtype=np.int64) if launched else np.full(len(rows), -1)
    activities = by_begin(
        Activities(
            begin, begin + length, kind, device, what, times, np.zeros_like(begin), np.zeros_like(begin)
        )
    )
    source = Source("x", "nsys", "nsys-sqlite")
    return Trace(source, NAMES, ["GPU 0", "GPU 1"], activities, no_spans(), no_spans())


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=25))
def test_busy_and_exposed_time_are_what_counting_gives(rows: list[tuple[int, int, int, int]]) -> None:
    begin, end = min(row[0] for row in rows), max(row[0] + row[1] for row in rows)
    for one in occupations(trace_of(rows)):
        running: dict[int, set[int]] = {
            time: {
                what
                for start, length, what, gpu in rows
                if gpu == one.device and start <= time < start + length
            }
            for time in range(begin, end)
        }
        assert one.window_ns == (begin, end)
        assert one.busy_ns == sum(bool(now) for now in running.values())
        assert length_ns(one.exposed_communication) == sum(
            1 in now and 0 not in now for now in running.values()
        )
        assert length_ns(one.exposed_transfer) == sum(
            bool(now) and not now & {0, 1} for now in running.values()
        )


@settings(deadline=None)
@given(st.lists(ROW, min_size=1, max_size=25))
def test_gaps_are_the_idle_time_between_activities(rows: list[tuple[int, int, int, int]]) -> None:
    for one in occupations(trace_of(rows)):
        gaps, ran = one.gaps, one.activities
        real = ran.end_ns > ran.begin_ns
        if not real.any():
            assert not len(gaps.begin_ns)
            continue
        envelope = ran.end_ns[real].max() - ran.begin_ns[real].min()
        assert gaps.length_ns.sum() == envelope - one.busy_ns
        assert (gaps.length_ns > 0).all()
        assert (ran.end_ns[gaps.before] == gaps.begin_ns).all()
        assert (ran.begin_ns[gaps.after] == gaps.end_ns).all()
        assert real[gaps.before].all()
        assert real[gaps.after].all()


def test_idle_time_is_split_by_when_the_next_work_was_launched() -> None:
    rows = [(0, 10, 0, 0), (110, 10, 0, 0), (220, 10, 0, 0), (330, 10, 0, 0)]
    (one, _) = occupations(trace_of(rows, [0, 60, 100, 500]))
    # launched 50 in, before the gap began, and (by another clock, or so it seems) after it ended
    assert one.gaps.launched_late.tolist() == [50, 0, 100]


def test_the_window_begins_behind_graphs_that_were_launched_before_the_recording() -> None:
    trace = trace_of([(-30, 10, 0, 0), (-15, 20, 0, 0), (10, 10, 0, 0), (25, 5, 0, 0)], [-1, -1, 2, 22])
    trace.activities.kind[:2] = GRAPH
    (one, other) = occupations(trace)
    assert one.window_ns == other.window_ns == (10, 30)
    assert one.busy.tolist() == [[10, 20], [25, 30]]
    assert one.gaps.length_ns.tolist() == [5]
    trace.activities.begin_ns[1], trace.activities.end_ns[1] = -15, 12  # still runs then
    (one, _) = occupations(trace)
    assert one.busy.tolist() == [[10, 20], [25, 30]]
    trace.activities.kind[:] = GRAPH
    trace.activities.launched_ns[:] = -1  # where no calls were recorded, nothing tells
    assert occupations(trace)[0].window_ns == (-30, 30)


def test_no_gpu_gives_nothing() -> None:
    empty = np.empty(0, dtype=np.int64)
    trace = Trace(Source("x", "nsys", "f"), [], [], Activities(*[empty] * 8), no_spans(), no_spans())
    assert occupations(trace) == []
