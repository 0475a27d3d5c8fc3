"""What an analysis says, as JSON for programs and as text for people.

The JSON's keys are fixed by `SCHEMA_VERSION`; later versions add keys and move none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llmprobe.analysis.busy import Occupation, classes_of, length_ns, occupations
from llmprobe.analysis.content import Content, GapRow, Gpu, KernelRow, OperatorRow, PhaseRow
from llmprobe.analysis.events import COPY, GRAPH, KERNEL, SET, UNKNOWN, Trace, printable
from llmprobe.analysis.findings import find
from llmprobe.analysis.launches import launches_of
from llmprobe.analysis.phases import PhaseTimes, phase_times, steps_of
from llmprobe.analysis.text import render
from llmprobe.analysis.trust import judge
from llmprobe.compute.kernel_classes import COPY as COPY_CLASS
from llmprobe.compute.kernel_classes import GRAPH as GRAPH_CLASS
from llmprobe.compute.kernel_classes import SET as SET_CLASS

SCHEMA_VERSION = 1
LONGEST_GAPS = 20
MOST_KERNELS = 1000
MOST_HOST_OPERATORS = 200


@dataclass(frozen=True)
class Report(Content):
    """Everything an analysis says about one recording, as JSON and as text."""

    def to_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": asdict(self.source),
            "trust": asdict(self.trust),
            **{
                key: [_rounded(asdict(row)) for row in getattr(self, key)]
                for key in ("gpus", "phases", "operators", "kernels", "gaps", "findings", "host_operators")
            },
        }

    def to_text(self) -> str:
        """The report for people."""
        return render(self)


def make_report(trace: Trace) -> Report:
    """Everything there is to say about a recording."""
    launches = launches_of(trace)
    trust = judge(trace, launches)
    gpus = occupations(trace)
    phases = phase_times(trace, gpus, launches)
    classes = classes_of(trace)
    kernels = _kernels(trace, classes)
    return Report(
        source=replace(trace.source, path=printable(trace.source.path)),
        trust=trust,
        gpus=[_gpu(trace, one) for one in gpus],
        phases=[_phase(trace, one) for one in phases],
        operators=_operators(kernels),
        kernels=kernels[:MOST_KERNELS],
        gaps=_gaps(trace, gpus),
        findings=find(trace, trust, gpus, phases),
        host_operators=trace.host_operators[:MOST_HOST_OPERATORS],
    )


def _gpu(trace: Trace, one: Occupation) -> Gpu:
    busy = one.busy_ns / 1e9
    ratio = busy / one.seconds if one.seconds else 0.0
    known = one.gaps.launched_late != UNKNOWN
    late = float(one.gaps.launched_late[known].sum()) / 1e9 if known.any() else None
    counts = np.bincount(one.activities.kind, minlength=4)
    return Gpu(
        name=trace.devices[one.device],
        seconds=one.seconds,
        busy_ratio=ratio,
        idle_ratio=1 - ratio,
        busy_seconds=busy,
        exposed_communication_seconds=length_ns(one.exposed_communication) / 1e9,
        exposed_transfer_seconds=length_ns(one.exposed_transfer) / 1e9,
        unlaunched_idle_seconds=late,
        back_to_back_idle_seconds=float(one.gaps.length_ns[one.gaps.brief].sum()) / 1e9,
        kernels=int(counts[KERNEL]),
        copies=int(counts[COPY]),
        sets=int(counts[SET]),
        graphs=int(counts[GRAPH]),
    )


def _phase(trace: Trace, one: PhaseTimes) -> PhaseRow:
    span, gap = one.span_ns, one.gap_ns
    whole = not one.part and bool(gap + span)
    return PhaseRow(
        name=one.phase,
        part=one.part or None,
        gpu=None if one.device == UNKNOWN else trace.devices[one.device],
        steps=one.steps,
        tokens=None if one.tokens == UNKNOWN else one.tokens,
        host_seconds=one.host_ns / 1e9,
        seconds=None if one.device == UNKNOWN else span / 1e9,
        busy_ratio=one.busy_ns / span if span else None,
        idle_ratio=1 - one.busy_ns / span if span else None,
        gap_seconds=gap / 1e9 if whole else None,
        sync_gap_ratio=(gap + one.stall_ns) / (gap + span) if whole else None,
        cut_steps=one.cut,
        comparable_sync_gap_ratio=one.comparable,
    )


def _kernels(trace: Trace, classes: list[str]) -> list[KernelRow]:
    activities = trace.activities
    if not len(activities):
        return []
    length = activities.end_ns - activities.begin_ns
    total = max(1.0, float(length.sum(dtype=np.float64)))
    # A kernel may be called like a copy or graph of ours; its kind keeps them apart.
    key = activities.name * len(_OF_KIND) + activities.kind
    found, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    # Exact: float sums lose nanoseconds only beyond 2^53 of them, 104 days.
    seconds = np.bincount(inverse, weights=length)
    rows = []
    for index in np.argsort(-seconds, kind="stable").tolist():
        name, kind = divmod(int(found[index]), len(_OF_KIND))
        rows.append(
            KernelRow(
                name=trace.names[name],
                share=float(seconds[index]) / total,
                count=int(count[index]),
                seconds=float(seconds[index]) / 1e9,
                mean_seconds=float(seconds[index]) / 1e9 / int(count[index]),
                operator=_OF_KIND[kind] or classes[name],
            )
        )
    return rows


_OF_KIND = {KERNEL: "", COPY: COPY_CLASS, SET: SET_CLASS, GRAPH: GRAPH_CLASS}


def _operators(kernels: Iterable[KernelRow]) -> list[OperatorRow]:
    sums: dict[str, tuple[float, int, float]] = {}
    for row in kernels:
        share, count, seconds = sums.get(row.operator, (0.0, 0, 0.0))
        sums[row.operator] = (share + row.share, count + row.count, seconds + row.seconds)
    rows = [
        OperatorRow(name, share, count, seconds, seconds / count)
        for name, (share, count, seconds) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _gaps(trace: Trace, gpus: list[Occupation]) -> list[GapRow]:
    rows = []
    first = min((one.window_ns[0] for one in gpus if len(one.activities)), default=0)
    for one in gpus:
        gaps = one.gaps
        longest = np.argsort(-gaps.length_ns, kind="stable")[:LONGEST_GAPS]
        steps, phases = steps_of(trace, one.activities.where(gaps.after[longest]))
        before, _ = steps_of(trace, one.activities.where(gaps.before[longest]))
        inside = (steps == before).tolist()
        for at, phase, in_step in zip(longest.tolist(), phases, inside, strict=True):
            names = [trace.names[int(one.activities.name[row[at]])] for row in (gaps.before, gaps.after)]
            late = int(gaps.launched_late[at])
            rows.append(
                GapRow(
                    gpu=trace.devices[one.device],
                    begin_seconds=float(gaps.begin_ns[at] - first) / 1e9,
                    seconds=float(gaps.length_ns[at]) / 1e9,
                    before=names[0],
                    after=names[1],
                    unlaunched_seconds=None if late == UNKNOWN else late / 1e9,
                    phase=phase,
                    in_step=None if phase is None else in_step,
                )
            )
    return sorted(rows, key=lambda row: -row.seconds)[:LONGEST_GAPS]


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 12) if isinstance(value, float) else value for key, value in row.items()}
