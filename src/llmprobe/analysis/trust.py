"""Whether a recording can carry conclusions at all: looked at before anything is concluded from it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from llmprobe.analysis.busy import longest_window_ns, window_of, windows_of
from llmprobe.analysis.events import COPY, GRAPH, KERNEL, UNKNOWN, Spans, Trace
from llmprobe.analysis.launches import Launches
from llmprobe.analysis.phases import PHASES
from llmprobe.compute.steps import Bools

#: How bad a reason is. One ``untrusted`` reason makes the recording untrusted.
NOTE, LIMITED, UNTRUSTED = "note", "limited", "untrusted"

_GRAPH_MAKING = re.compile(r"^(cuda|cu)(GraphInstantiate|StreamBeginCapture)")

#: Launches without what they launched: a few at the recording's end are normal, more are not.
_MISSING_RATIO = 0.05
_MISSING_FLOOR = 8
#: An engine that serves instantiates no graphs; a program may make a few.
_GRAPHS_MADE = 3
#: As many bytes to the device are weights, not prompts.
_LOADING_BYTES = 1 << 30
_LOADING_RATIO = 0.3
_SHORT_SECONDS = 0.01
_FEW_KERNELS = 50
_UNMARKED_RATIO = 0.2
_ABSENT_RATIO = 0.5
_UNLAUNCHED_RATIO = 0.05
_IMPLAUSIBLE_RATIO = 0.01


@dataclass(frozen=True)
class Reason:
    """One thing that is wrong with a recording, or good to know."""

    check: str
    level: str
    text: str


@dataclass(frozen=True)
class Trust:
    """How far a recording carries: ``trusted``, ``limited`` or ``untrusted``, and why."""

    verdict: str
    reasons: list[Reason]


def judge(trace: Trace, launches: Launches) -> Trust:
    """Look for all that makes figures from a recording wrong."""
    reasons = [*_lost(trace), *_implausible(trace), *_nothing(trace, launches)]
    if len(trace.activities):
        reasons += [
            *_missing(trace, launches),
            *_graphs(trace),
            *_loading(trace),
            *_short(trace),
            *_ends(trace),
            *_late_gpus(trace),
        ]
    levels = {reason.level for reason in reasons}
    verdict = UNTRUSTED if UNTRUSTED in levels else LIMITED if LIMITED in levels else "trusted"
    order = (UNTRUSTED, LIMITED, NOTE)
    return Trust(verdict, sorted(reasons, key=lambda reason: order.index(reason.level)))


def _lost(trace: Trace) -> list[Reason]:
    return [
        Reason(
            "lost_events",
            UNTRUSTED,
            f"the tool lost events, so idle time is overstated. It says: {text}",
        )
        for text in trace.lost
    ]


def _implausible(trace: Trace) -> list[Reason]:
    if not trace.implausible:
        return []
    few = trace.implausible <= _IMPLAUSIBLE_RATIO * len(trace.activities)
    text = f"{trace.implausible} activities have times that no clock gives and are left out"
    return [Reason("implausible_times", LIMITED if few else UNTRUSTED, text)]


def _nothing(trace: Trace, launches: Launches) -> list[Reason]:
    if len(trace.activities):
        if (trace.activities.kind == KERNEL).any() or (trace.activities.kind == GRAPH).any():
            return []
        text = "copies and sets were recorded, but not one kernel and no CUDA graph"
        if trace.source.tool == "torch":
            text += (
                ". After another recording in the same process CUPTI may stamp kernels by another clock than "
                "torch's, which then drops them, by chance: record once more, or take a kernels capture"
            )
        return [Reason("no_kernels", UNTRUSTED, text)]
    if not trace.cuda_traced:
        how = "activities=[ProfilerActivity.CUDA] (llmprobe's captures are)"
        if trace.source.tool == "nsys":
            how = "--trace cuda,nvtx"
        return [
            Reason(
                "cuda_not_traced",
                UNTRUSTED,
                f"no GPU work was recorded: that is all where there is no GPU, else record with {how}",
            )
        ]
    if len(launches.calls):
        return [
            Reason(
                "no_kernels",
                UNTRUSTED,
                f"{len(launches.calls)} launches and not one kernel: another tool held CUPTI in this process "
                "(kernel windows or a torch profiler, before or during the recording), or profiling is not "
                "permitted",
            )
        ]
    return [
        Reason(
            "no_kernels",
            UNTRUSTED,
            "no kernel and no launch: an idle server, one on the CPU, or one whose worker was not traced",
        )
    ]


def _missing(trace: Trace, launches: Launches) -> list[Reason]:
    activities, calls = trace.activities, trace.calls
    if not len(calls):
        marked = len(trace.device_ranges) > 0
        what = "late launches cannot be told" if marked else "neither late launches nor phases can be told"
        return [Reason("no_calls", NOTE, f"calls into CUDA were not recorded: {what}")]
    reasons = []
    unlaunched = float((activities.launched_ns == UNKNOWN).mean())
    if unlaunched > _UNLAUNCHED_RATIO:
        text = f"of {unlaunched:.0%} of what ran the launch was not recorded"
        reasons.append(Reason("unknown_launches", NOTE, text))
    # While a graph is captured, launches run nothing.
    capturing = bool(_called(trace, _GRAPH_MAKING).any())
    for chosen, what in ((launches.graph, "CUDA graph"), (~launches.graph, "kernel")):
        if capturing and what == "kernel":
            continue
        total, lost = int(chosen.sum()), int((chosen & launches.missing & ~launches.queued).sum())
        if lost > max(_MISSING_FLOOR, _MISSING_RATIO * total):
            how = "for less long, with one tool only"
            if what == "CUDA graph" and not (activities.kind == GRAPH).any():
                how = f"graphs whole (nsys: --cuda-graph-trace=graph), {how}"
            text = (
                f"{lost} of {total} {what} launches left no trace of running: idle time is overstated. "
                f"Record {how}"
            )
            reasons.append(Reason(f"missing_{what.split()[-1]}s", UNTRUSTED, text))
    queued = int(launches.queued.sum())
    if queued > max(_MISSING_FLOOR, _MISSING_RATIO * len(launches.calls)) and not capturing:
        text = (
            f"{queued} launches had yet to run when the recording ended: figures are of what ran until then"
        )
        reasons.append(Reason("queued_launches", NOTE, text))
    return reasons


def _graphs(trace: Trace) -> list[Reason]:
    activities = trace.activities
    whole = activities.kind == GRAPH
    if not whole.any():
        return []
    length = activities.end_ns - activities.begin_ns
    share = float(length[whole].sum(dtype=np.float64) / max(1.0, length.sum(dtype=np.float64)))
    return [
        Reason(
            "graphs_unseen",
            LIMITED,
            f"{int(whole.sum())} CUDA graphs ({share:.0%} of device time) were recorded whole: their "
            "kernels are unseen, and idle time inside them counts as busy. A `kernels` or `torch` capture of "
            "a server that runs without nsys sees them; so does nsys with --cuda-graph-trace=node, which can "
            "hang the server for good",
        )
    ]


def _loading(trace: Trace) -> list[Reason]:
    activities = trace.activities
    reasons = []
    made = int(_called(trace, _GRAPH_MAKING).sum())
    if made >= _GRAPHS_MADE:
        text = f"the engine was starting: {made} calls make CUDA graphs. Record once it serves"
        reasons.append(Reason("startup", UNTRUSTED, text))
    to_device = np.array(["HtoD" in name for name in trace.names] or [False])[activities.name]
    to_device &= activities.kind == COPY
    size = float(activities.moved_bytes[to_device].sum(dtype=np.float64))
    seconds = float((activities.end_ns - activities.begin_ns)[to_device].sum(dtype=np.float64)) / 1e9
    window = longest_window_ns(trace) / 1e9
    if size >= _LOADING_BYTES and seconds >= _LOADING_RATIO * window:
        text = (
            f"weights were being loaded: {size / 1e9:.1f} GB went to the device in {seconds:.2f} of "
            f"{window:.2f} s. Record once the server serves"
        )
        reasons.append(Reason("model_loading", UNTRUSTED, text))
    ranges = trace.device_ranges if len(trace.device_ranges) else trace.ranges
    steps = _steps(trace, ranges)
    if steps.any() and window:
        silent = float(ranges.begin_ns[steps].min() - activities.begin_ns.min()) / 1e9
        if silent > _UNMARKED_RATIO * window:
            text = f"the first step begins {silent:.2f} s after the first kernel: before, no phase is known"
            reasons.append(Reason("unmarked_start", LIMITED, text))
    return reasons


def _short(trace: Trace) -> list[Reason]:
    activities = trace.activities
    seconds = longest_window_ns(trace) / 1e9
    if seconds < _SHORT_SECONDS or len(activities) < _FEW_KERNELS:
        text = (
            f"only {len(activities)} activities in {seconds * 1e3:.3g} ms: too little to tell what is usual"
        )
        return [Reason("short", LIMITED, text)]
    return []


def _ends(trace: Trace) -> list[Reason]:
    reasons = []
    cut = int((trace.ranges.end_ns == UNKNOWN).sum())
    if cut:
        reasons.append(
            Reason("cut_ranges", NOTE, f"{cut} ranges were still open at the end and are left out")
        )
    if trace.recorded is not None:
        recorded = float(trace.recorded[0, 1] - trace.recorded[0, 0]) / 1e9
        begin, end = window_of(trace)
        silent = recorded - (end - begin) / 1e9
        if silent > 0.2 * recorded:
            text = f"the tool recorded {recorded:.2f} s; figures are about the {(end - begin) / 1e9:.2f} s"
            reasons.append(Reason("cut_ends", NOTE, f"{text} from the first activity to the last"))
    return reasons


def _late_gpus(trace: Trace) -> list[Reason]:
    activities = trace.activities
    reasons = []
    for device, (label, (begin, end)) in enumerate(zip(trace.devices, windows_of(trace), strict=True)):
        mine = activities.device == device
        if len(trace.devices) < 2 or not mine.any():
            continue
        covered = int(activities.end_ns[mine].max() - activities.begin_ns[mine].min()) / max(1, end - begin)
        if covered < _ABSENT_RATIO:
            text = f"{label} was seen in {covered:.0%} of the recording only: the rest counts as idle"
            reasons.append(Reason("gpu_partly_seen", LIMITED, text))
    return reasons


def _called(trace: Trace, pattern: re.Pattern[str]) -> Bools:
    named = np.array([bool(pattern.match(name)) for name in trace.names] or [False])
    if not len(trace.calls):
        return np.zeros(0, dtype=np.bool_)
    return np.asarray(named[trace.calls.name])


def _steps(trace: Trace, ranges: Spans) -> Bools:
    named = np.array([name in PHASES for name in trace.names] or [False])
    return np.asarray(named[ranges.name]) if len(ranges) else np.zeros(0, dtype=np.bool_)
