"""Prefill and decode on the device: what was launched inside a marked range belongs to it.

A range is marked on the host, and the host runs ahead of the device. So a range is led to the device by what
was launched in it: from the begin of its first activity to the end of its last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmprobe.analysis.busy import Occupation, length_ns
from llmprobe.analysis.events import LATEST_NS, LONGEST_NS, UNKNOWN, Activities, Ints, Spans, Trace
from llmprobe.analysis.launches import Launches
from llmprobe.compute.intervals import Intervals, bridge, overlap_ns, union
from llmprobe.compute.kernel_windows import BACK_TO_BACK_NS
from llmprobe.compute.steps import Bools

#: More threads than these mark no ranges.
MOST_THREADS = 4096
#: The ranges that are steps; any other range of ours is a part of one.
PHASES = ("prefill", "decode", "mixed", "draft", "dummy", "encode")
#: Ranges of the device's clock begin up to 50 µs before their steps, and that clock may be as much off.
_SLACK_NS = 100_000
#: The part of a step in which the model's kernels are launched.
FORWARD = "forward"


@dataclass(frozen=True)
class PhaseTimes:
    """All steps of one phase on one GPU; with ``part``, that part of each of them.

    Where nothing that ran can be led back to a range, ``device`` is `UNKNOWN` and only the host's times are
    known.
    """

    device: int
    phase: str
    part: str  #: "" for the whole step
    steps: int
    tokens: int  #: the steps' query tokens; `UNKNOWN` if the ranges do not tell
    span_ns: int  #: the union of the steps' device spans
    busy_ns: int  #: of it, time in which anything ran
    stall_ns: int  #: of it, idle, or with communication or transfers that nothing hides
    gap_ns: int  #: idle time before the steps, since the end of the step before; 0 for parts
    host_ns: int  #: how long the ranges lasted, together: on the host, or where the journal marked them
    cut: int  #: of the steps, those that the recording has in part only: it began or ended in them
    #: The sync-gap ratio to hold against a live one: of the steps that are not cut, without the gaps that no
    #: host could shorten (`BACK_TO_BACK_NS`). None without any such step, and for parts.
    comparable: float | None


def phase_times(trace: Trace, occupations: list[Occupation], launches: Launches) -> list[PhaseTimes]:
    """Every phase of every GPU, the longest first; empty if nothing is marked or can be led to a launch."""
    ranges = _ranges(trace)
    if not len(ranges):
        return []
    names = _phase_names(trace)
    steps = ranges.where(names[ranges.name])
    parts = ranges.where(~names[ranges.name])
    step_of_part = owner(steps, parts.begin_ns, parts.thread)
    found: list[PhaseTimes] = []
    for occupation in occupations:
        step = _owners(trace, steps, occupation.activities)
        cut = _cut(trace, steps, occupation, launches)
        found += _times(trace, occupation, step, steps, steps.name, "", cut)
        for name in np.unique(parts.name):
            chosen = np.flatnonzero((parts.name == name) & (step_of_part != UNKNOWN))
            some = parts.where(chosen)
            part = _owners(trace, some, occupation.activities)
            label = trace.names[int(name)]
            phase_of = steps.name[step_of_part[chosen]]
            found += _times(
                trace, occupation, part, some, phase_of, label, np.zeros(len(some), dtype=np.bool_)
            )
    if not found:
        found = _host_times(trace, steps, steps.name, "")
        for name in np.unique(parts.name):
            chosen = np.flatnonzero((parts.name == name) & (step_of_part != UNKNOWN))
            phase_of = steps.name[step_of_part[chosen]]
            found += _host_times(trace, parts.where(chosen), phase_of, trace.names[int(name)])
    return sorted(found, key=lambda times: (times.device, times.part, -times.span_ns, -times.host_ns))


def steps_of(trace: Trace, activities: Activities) -> tuple[Ints, list[str | None]]:
    """The step to which each activity belongs, a number of its own or `UNKNOWN`, and that step's phase."""
    ranges = _ranges(trace)
    steps = ranges.where(_phase_names(trace)[ranges.name])
    rows = _owners(trace, steps, activities)
    return rows, [None if row == UNKNOWN else trace.names[int(steps.name[row])] for row in rows.tolist()]


def in_one_forward(trace: Trace, before: Activities, after: Activities) -> Bools:
    """Whether row ``i`` of both belongs to the same forward pass.

    Where no part is marked ``forward``, steps are taken for it: vLLM's own ranges cover no more.
    """
    ranges = _ranges(trace)
    forward = np.array([name == FORWARD for name in trace.names] or [False])[ranges.name]
    chosen = ranges.where(forward if forward.any() else _phase_names(trace)[ranges.name])
    rows = _owners(trace, chosen, before)
    return np.asarray((rows != UNKNOWN) & (rows == _owners(trace, chosen, after)))


def _ranges(trace: Trace) -> Spans:
    """Those of the device's clock where there are any: they do not depend on what was launched when."""
    if len(trace.device_ranges):
        return trace.device_ranges
    return trace.ranges.where(trace.ranges.end_ns != UNKNOWN)


def _phase_names(trace: Trace) -> Bools:
    return np.array([name in PHASES for name in trace.names] or [False])


def _owners(trace: Trace, ranges: Spans, activities: Activities) -> Ints:
    """For each activity the range that it belongs to, or `UNKNOWN`."""
    if len(trace.device_ranges):
        return owner(ranges, activities.begin_ns, activities.device)
    found = np.full(len(activities), UNKNOWN, dtype=np.int64)
    known = activities.launched_ns != UNKNOWN
    found[known] = owner(ranges, activities.launched_ns[known], activities.thread[known])
    return found


def owner(ranges: Spans, times: Ints, threads: Ints) -> Ints:
    """For each (time, thread) the innermost range of that thread that holds it, or `UNKNOWN`."""
    found = np.full(len(times), UNKNOWN, dtype=np.int64)
    for thread in np.unique(ranges.thread)[:MOST_THREADS]:
        rows = np.flatnonzero(threads == thread)
        if not len(rows):
            continue
        mine = np.flatnonzero(ranges.thread == thread)
        mine = mine[np.lexsort((-ranges.end_ns[mine], ranges.begin_ns[mine]))]
        since, holder = _innermost(ranges.begin_ns[mine], ranges.end_ns[mine])
        at = holder[np.searchsorted(since, times[rows], side="right")]
        found[rows] = np.where(at == UNKNOWN, UNKNOWN, mine[at])
    return found


def _innermost(begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Which of the ranges, sorted by begin, holds from which time on.

    ``holder[searchsorted(since, time, side="right")]`` is the one that holds at ``time``, or `UNKNOWN`.
    """
    since: list[int] = []
    holder = [UNKNOWN]
    inside: list[int] = []
    ends = end.tolist()

    def leave(until: int) -> None:
        while inside and ends[inside[-1]] <= until:
            left = ends[inside.pop()]
            while inside and ends[inside[-1]] <= left:
                inside.pop()
            since.append(left)
            holder.append(inside[-1] if inside else UNKNOWN)

    for row, time in enumerate(begin.tolist()):
        leave(time)
        since.append(time)
        holder.append(row)
        inside.append(row)
    leave(LATEST_NS + LONGEST_NS)
    return np.array(since, dtype=np.int64), np.array(holder, dtype=np.int64)


def _cut(trace: Trace, steps: Spans, occupation: Occupation, launches: Launches) -> Bools:
    """Which steps the recording has in part only, as far as it tells."""
    if len(trace.device_ranges):
        activities = occupation.activities
        if not len(activities):
            return np.zeros(len(steps), dtype=np.bool_)
        begin, end = int(activities.begin_ns.min()), int(activities.end_ns.max())
        return np.asarray((steps.begin_ns < begin - _SLACK_NS) | (steps.end_ns > end + _SLACK_NS))
    queued = launches.calls.where(launches.queued)
    cut = np.zeros(len(steps), dtype=np.bool_)
    rows = owner(steps, queued.begin_ns, queued.thread)
    cut[rows[rows != UNKNOWN]] = True
    return cut


def _times(
    trace: Trace, occupation: Occupation, step: Ints, steps: Spans, phase_name: Ints, part: str, cut: Bools
) -> list[PhaseTimes]:
    activities = occupation.activities
    used = np.flatnonzero(step != UNKNOWN)
    if not len(used):
        return []
    order = used[np.argsort(step[used], kind="stable")]
    first = np.flatnonzero(np.diff(step[order], prepend=UNKNOWN))
    numbers = step[order][first]
    begin = np.minimum.reduceat(activities.begin_ns[order], first)
    end = np.maximum.reduceat(activities.end_ns[order], first)
    gap = np.zeros(len(numbers), dtype=np.int64)
    waited = gap
    bridged = occupation.busy
    if not part:
        gap = waited = _idle_before(occupation.busy, begin, end)
        if occupation.gaps.brief.any():
            bridged = bridge(occupation.busy, BACK_TO_BACK_NS)
            waited = _idle_before(bridged, begin, end)
    exposed = union(occupation.exposed_communication, occupation.exposed_transfer)
    found = []
    for name in np.unique(phase_name[numbers]):
        mine = phase_name[numbers] == name
        whole = mine & ~cut[numbers]
        comparable = None
        if not part and whole.any():
            spans = union(np.stack((begin[whole], end[whole]), axis=1))
            all_ns = int(gap[whole].sum()) + length_ns(spans)
            stall_ns = length_ns(spans) - _within(spans, bridged) + _within(spans, exposed)
            comparable = (int(waited[whole].sum()) + stall_ns) / all_ns if all_ns else None
        spans = union(np.stack((begin[mine], end[mine]), axis=1))
        some = steps.where(numbers[mine])
        span_ns, busy_ns = length_ns(spans), _within(spans, occupation.busy)
        found.append(
            PhaseTimes(
                device=occupation.device,
                phase=trace.names[int(name)],
                part=part,
                steps=int(mine.sum()),
                tokens=_tokens(some.value, part),
                span_ns=span_ns,
                busy_ns=busy_ns,
                stall_ns=span_ns - busy_ns + _within(spans, exposed),
                gap_ns=int(gap[mine].sum()),
                host_ns=int((some.end_ns - some.begin_ns).sum(dtype=np.float64)),
                cut=int((mine & cut[numbers]).sum()),
                comparable=comparable,
            )
        )
    return found


def _host_times(trace: Trace, ranges: Spans, phase_name: Ints, part: str) -> list[PhaseTimes]:
    found = []
    for name in np.unique(phase_name):
        some = ranges.where(phase_name == name)
        found.append(
            PhaseTimes(
                device=UNKNOWN,
                phase=trace.names[int(name)],
                part=part,
                steps=len(some),
                tokens=_tokens(some.value, part),
                span_ns=0,
                busy_ns=0,
                stall_ns=0,
                gap_ns=0,
                host_ns=int((some.end_ns - some.begin_ns).sum(dtype=np.float64)),
                cut=0,
                comparable=None,
            )
        )
    return found


def _tokens(values: Ints, part: str) -> int:
    """A part without tokens of its own says 0, as NVTX ranges cannot say nothing."""
    told = values > 0 if part else values >= 0
    return int(values.sum(dtype=np.float64)) if len(values) and told.all() else UNKNOWN


def _within(spans: Intervals, intervals: Intervals) -> int:
    """Nanoseconds of the spans that lie in the intervals."""
    return int(overlap_ns(intervals, spans[:, 0], spans[:, 1]).sum())


def _idle_before(busy: Intervals, begin: Ints, end: Ints) -> Ints:
    """Idle time between the end of all steps that began earlier and each step's begin.

    What ran in between (the preparation of the next step) is no idle time.
    """
    order = np.argsort(begin, kind="stable")
    reach = np.maximum.accumulate(end[order])
    idle = np.zeros(len(order), dtype=np.int64)
    since, until = reach[:-1], begin[order][1:]
    apart = np.maximum(until - since, 0)
    idle[order[1:]] = apart - overlap_ns(busy, since, since + apart)
    return idle
