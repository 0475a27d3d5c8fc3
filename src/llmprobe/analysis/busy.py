"""When each GPU was busy, to the nanosecond: unions of everything that ran, and what lies between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmprobe.analysis.events import COPY, GRAPH, KERNEL, SET, UNKNOWN, Activities, Ints, Trace
from llmprobe.compute.device_activity import COMMUNICATION, COMPUTE, TRANSFER, device_activity
from llmprobe.compute.intervals import Intervals, bridge, union
from llmprobe.compute.kernel_classes import COMMUNICATION as COMMUNICATION_CLASS
from llmprobe.compute.kernel_classes import kernel_class
from llmprobe.compute.kernel_windows import BACK_TO_BACK_NS
from llmprobe.compute.steps import Bools

#: Recordings whose lengths differ by less than this are of processes that just begin and end apart.
_SILENT_RATIO = 0.8


@dataclass(frozen=True)
class Gaps:
    """Idle times of one GPU, in order; row ``i`` ends when activity ``after[i]`` begins."""

    begin_ns: Ints
    end_ns: Ints
    before: Ints  #: the activity that ended last before it, as an index into the GPU's activities
    after: Ints  #: the activity that ended it
    launched_late: (
        Ints  #: nanoseconds of it in which the activity after it had not been launched; else `UNKNOWN`
    )

    @property
    def length_ns(self) -> Ints:
        """How long each lasted."""
        return np.asarray(self.end_ns - self.begin_ns)

    @property
    def brief(self) -> Bools:
        """Which the device itself takes from one activity to the next: no host could shorten them."""
        return np.asarray(self.length_ns <= BACK_TO_BACK_NS)


@dataclass(frozen=True)
class Occupation:
    """One GPU over the window of the recording."""

    device: int
    activities: Activities
    busy: Intervals
    gaps: Gaps
    window_ns: tuple[int, int]
    exposed_communication: Intervals  #: communication kernels ran and nothing that computes
    exposed_transfer: Intervals  #: copies or sets ran and no kernel did

    @property
    def seconds(self) -> float:
        """The window's length."""
        return (self.window_ns[1] - self.window_ns[0]) / 1e9

    @property
    def busy_ns(self) -> int:
        """Time in which anything at all ran."""
        return length_ns(self.busy)


def classes_of(trace: Trace) -> list[str]:
    """The class of each name of the trace, were it a kernel's."""
    return [kernel_class(name) for name in trace.names]


def window_of(trace: Trace) -> tuple[int, int]:
    """From the first begin to the last end of anything on any GPU, in nanoseconds.

    Not the time that the tool recorded: starting and stopping it takes time of its own, and how long the
    device was silent before the first launch would depend on that. Nor from a CUDA graph on that was launched
    before nsys recorded calls: it gives such graphs, but nothing that ran between them.
    """
    return _window(trace.activities)


def windows_of(trace: Trace) -> list[tuple[int, int]]:
    """The same for each GPU, in nanoseconds: of anything on any GPU of the recording that it is from.

    Recordings of one capture are of equal length; one in which nothing ran any more before it ended has a
    window as long as the longest.
    """
    if trace.recordings is None or not len(trace.recordings):
        return [window_of(trace)] * len(trace.devices)
    of_row = trace.recordings[trace.activities.device]
    spans = [_window(trace.activities.where(of_row == one)) for one in range(int(trace.recordings.max()) + 1)]
    longest = max(end - begin for begin, end in spans)
    windows = [
        (begin, begin + longest) if end - begin < _SILENT_RATIO * longest and end else (begin, end)
        for begin, end in spans
    ]
    return [windows[one] for one in trace.recordings.tolist()]


def longest_window_ns(trace: Trace) -> int:
    """Of all GPUs: what was recorded is about that long, whatever lies between recordings."""
    return max((end - begin for begin, end in windows_of(trace)), default=0)


def _window(activities: Activities) -> tuple[int, int]:
    if not len(activities):
        return 0, 0
    beside = (activities.kind != GRAPH) | (activities.launched_ns != UNKNOWN)
    return int(activities.begin_ns[beside if beside.any() else ...].min()), int(activities.end_ns.max())


def occupations(trace: Trace) -> list[Occupation]:
    """Each GPU of the trace, over the same window where one tool recorded all."""
    windows = windows_of(trace)
    communicates = np.array([label == COMMUNICATION_CLASS for label in classes_of(trace)] or [False])
    found = []
    for device in range(len(trace.devices)):
        mine = trace.activities
        if len(trace.devices) > 1:
            mine = mine.where(trace.activities.device == device)
        role = np.where((mine.kind == KERNEL) & communicates[mine.name], COMMUNICATION, COMPUTE)
        role[(mine.kind == COPY) | (mine.kind == SET)] = TRANSFER
        ran = device_activity(np.stack((mine.begin_ns, mine.end_ns), axis=1), role)
        window = windows[device]
        busy = _within(ran.busy, window)
        if trace.source.tool == "kernels":  # as live windows see it, with which such a capture is compared
            busy = bridge(busy, BACK_TO_BACK_NS)
        found.append(
            Occupation(
                device=device,
                activities=mine,
                busy=busy,
                gaps=_gaps(mine, busy),
                window_ns=window,
                exposed_communication=_within(ran.exposed_communication, window),
                exposed_transfer=_within(ran.exposed_transfer, window),
            )
        )
    return found


def _within(intervals: Intervals, window: tuple[int, int]) -> Intervals:
    if len(intervals) and intervals[0, 0] < window[0]:
        return union(np.maximum(intervals, window[0]))
    return intervals


def length_ns(intervals: Intervals) -> int:
    """All of their time."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def _gaps(activities: Activities, busy: Intervals) -> Gaps:
    """Between the rows of ``busy``; ``activities`` are in order of begin."""
    if len(busy) < 2:
        nothing = np.empty(0, dtype=np.int64)
        return Gaps(nothing, nothing, nothing, nothing, nothing)
    begin, end = busy[:-1, 1], busy[1:, 0]
    # Activities without length are no part of the union and must not seem to end a gap.
    real = np.flatnonzero(activities.end_ns > activities.begin_ns)
    after = real[np.searchsorted(activities.begin_ns[real], end, side="left")]
    by_end = real[np.argsort(activities.end_ns[real], kind="stable")]
    before = by_end[np.searchsorted(activities.end_ns[by_end], begin, side="right") - 1]
    launched = activities.launched_ns[after]
    late = np.where(launched == UNKNOWN, UNKNOWN, np.clip(launched, begin, end) - begin)
    return Gaps(begin, end, before, after, late)
