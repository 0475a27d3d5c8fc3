"""Which launches of kernels and CUDA graphs left no trace of running, and which only had yet to run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from llmprobe.analysis.busy import longest_window_ns
from llmprobe.analysis.events import UNKNOWN, Spans, Trace
from llmprobe.compute.steps import Bools

_GRAPH = re.compile(r"^(cuda|cu)GraphLaunch")
_KERNEL = re.compile(r"^(cuda|cu)LaunchKernel")
#: Work that is seen up to so much of the recording before a launch is seen up to it.
_END_RATIO = 0.05


@dataclass(frozen=True)
class Launches:
    """Calls that launch a kernel or a CUDA graph; the masks are of their rows."""

    calls: Spans
    graph: Bools  #: of a CUDA graph
    missing: Bools  #: nothing is seen that it launched
    queued: Bools  #: of these, those that waited for the device, or ran, as the recording ended


def launches_of(trace: Trace) -> Launches:
    """The launches of a recording.

    The host runs ahead of the device, by a whole step and more. What it launched last had yet to run when the
    recording ended: all behind the last thing of the thread that is seen, be it a copy, where its work is
    seen up to about its last launch. Any other launch that left no trace was lost.
    """
    if not len(trace.calls):
        nothing = np.zeros(0, dtype=np.bool_)
        return Launches(trace.calls, nothing, nothing, nothing)
    kernel, graph = (np.array([bool(kind.match(name)) for name in trace.names]) for kind in (_KERNEL, _GRAPH))
    chosen = (kernel | graph)[trace.calls.name]
    calls = trace.calls if chosen.all() else trace.calls.where(chosen)
    graph = graph[calls.name]
    if not len(calls):
        return Launches(calls, graph, graph, graph)
    activities = trace.activities
    # Nearly in order already, as a stable sort likes it.
    known = np.sort(activities.launched_ns, kind="stable")
    at = np.searchsorted(known, calls.begin_ns)
    missing = known[np.minimum(at, len(known) - 1)] != calls.begin_ns if len(known) else ~np.zeros_like(graph)
    queued = np.zeros_like(missing)
    window = longest_window_ns(trace)
    for thread in np.unique(calls.thread[missing]).tolist():
        mine = calls.thread == thread
        ran = (activities.thread == thread) & (activities.launched_ns != UNKNOWN)
        if not (mine & ~missing).any() or not ran.any():
            continue
        # What ran as the recording ended is not in it either.
        longest = int((activities.end_ns - activities.begin_ns)[ran].max())
        unseen = int(calls.begin_ns[mine].max()) - int(activities.end_ns[ran].max())
        if unseen <= max(longest, _END_RATIO * window):
            queued |= mine & missing & (calls.begin_ns > activities.launched_ns[ran].max())
    return Launches(calls, graph, missing, queued)
