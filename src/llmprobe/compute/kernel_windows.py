"""What a kernel window says about the steps that lie wholly in it.

A step lies in a window if it began on the host after the window was opened (what was launched before may be
missing) and ended on the device before it was closed. Its span is e0 to e3 of the step clock; both clocks are
CLOCK_MONOTONIC to within some ten microseconds.

Two things are not bubbles. From one kernel to the next in a queue that never runs dry the device itself
takes about half a microsecond (`BACK_TO_BACK_NS`). And a window slows what it looks at: launching a CUDA
graph takes the host longer while its kernels are recorded. By how much steps in the window are longer than
those right before it is known from the step clock, and taken off (``disturbed_ns``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from llmprobe.compute.device_activity import COMMUNICATION, COMPUTE, TRANSFER, device_activity
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.intervals import Intervals, bridge, overlap_ns
from llmprobe.compute.kernel_classes import COMMUNICATION as COMMUNICATION_CLASS
from llmprobe.compute.kernel_classes import kernel_class
from llmprobe.compute.lengthened import alike
from llmprobe.compute.steps import NO_PARTS, PHASES, RESTARTED, Floats, Ints

#: Kinds of activity, as `llmprobe.record.cupti` numbers them.
KERNEL, COPY, SET = 0, 1, 2
#: Kernels this near to a span's ends still count when its length is compared: both clocks differ a bit.
_SLACK_NS = 50_000
_TOP = 12
#: A kernel that follows another within this time was waiting in the device's queue.
BACK_TO_BACK_NS = 1_000
#: Steps that ended so long before a window at most say how long steps are without one.
_BEFORE_NS = 3 * 10**9
#: Steps whose middle half is spread over more of their median are too unlike each other to say by how much a
#: window makes them longer: of mixed steps a window sees one or two, and calls all their bubbles its own.
_MOST_SPREAD_RATIO = 0.25


@dataclass(frozen=True)
class TopKernel:
    """One kernel in the steps of a phase."""

    name: str
    kernel_class: str
    count: int
    seconds: float


@dataclass(frozen=True)
class PhaseWindow:
    """Sums over the whole steps of one phase in one window, in nanoseconds of device time."""

    steps: int
    span_ns: int
    sample_gap_ns: int  #: e1 to e2, in which the device waited for sampling to be asked for
    busy_ns: int  #: of the span, time in which anything ran
    launch_gap_ns: int  #: of the span without the sample gap, time in which nothing ran
    communication_ns: int  #: exposed
    transfer_ns: int  #: exposed
    gap_ns: int  #: between the steps
    gap_busy_ns: int  #: of it, time in which something ran all the same (preparation of the next step)
    kernel_span_ns: int  #: first kernel to last kernel of each step
    gaps: int = 0  #: steps before which the time is known
    disturbed_ns: int = 0  #: by how much the window made them longer; no part of the other figures
    floor_ns: int = 0  #: modelled; with `floorless`, not of all of them
    floorless: int = 0  #: steps whose floor is not known
    tokens: int = 0  #: query tokens
    class_ns: dict[str, int] = field(default_factory=dict)  #: by class, summed over kernels that overlap too
    top: tuple[TopKernel, ...] = ()

    def evidence(self, age_seconds: float) -> KernelEvidence:
        """As ratios."""
        span = max(self.span_ns, 1)
        return KernelEvidence(
            steps=self.steps,
            launch_gap_ratio=self.launch_gap_ns / span,
            disturbed_ratio=self.disturbed_ns / span,
            communication_ratio=self.communication_ns / span,
            transfer_ratio=self.transfer_ns / span,
            age_seconds=age_seconds,
            clock_ratio=self.kernel_span_ns / (span + self.disturbed_ns),
            gap_busy_seconds=self.gap_busy_ns / self.gaps / 1e9 if self.gap_ns > 0 and self.gaps else None,
            **self._work(),
        )

    def _work(self) -> dict[str, float]:
        """What its steps did, where that says how long their kernels run."""
        if self.floor_ns <= 0 or self.floorless or self.communication_ns or not self.steps:
            return {}
        return {
            "busy_per_floor": self.busy_ns / self.floor_ns,
            "floor_step_seconds": self.floor_ns / self.steps / 1e9,
            "step_tokens": self.tokens / self.steps,
        }


_SUMS = tuple(one.name for one in fields(PhaseWindow) if one.name not in ("class_ns", "top"))


def together(windows: Sequence[PhaseWindow]) -> PhaseWindow:
    """Several windows of one phase as one."""
    class_ns: dict[str, int] = {}
    kernels: dict[str, TopKernel] = {}
    for window in windows:
        for label, nanoseconds in window.class_ns.items():
            class_ns[label] = class_ns.get(label, 0) + nanoseconds
        for kernel in window.top:
            if known := kernels.get(kernel.name):
                count, seconds = known.count + kernel.count, known.seconds + kernel.seconds
                kernels[kernel.name] = replace(known, count=count, seconds=seconds)
            else:
                kernels[kernel.name] = kernel
    top = sorted(kernels.values(), key=lambda kernel: -kernel.seconds)[:_TOP]
    sums = {name: sum(getattr(window, name) for window in windows) for name in _SUMS}
    return PhaseWindow(**sums, class_ns=class_ns, top=tuple(top))


def phase_windows(
    activities: np.ndarray,
    names: Sequence[str],
    steps: np.ndarray,
    begin_ns: int,
    end_ns: int,
    floor_s: Floats | None = None,
) -> dict[str, PhaseWindow]:
    """
    Args:
        activities: (N,) with fields ``begin``, ``end`` (nanoseconds of CLOCK_MONOTONIC), ``name``, ``kind``;
            of one device, sorted by begin.
        names: of kernels, by ``name``.
        steps: (M,) step records in the journal's order, with the one before the window where there is one.
        begin_ns: when the window was opened.
        end_ns: when it began to be closed.
        floor_s: (M,) the steps' modelled floors in seconds, 0 where one is not known; None: of none.

    Returns:
        By phase label; phases without a whole step are absent.
    """
    whole = (steps["time"] >= begin_ns) & (steps["e3"] <= end_ns) & (steps["e3"] > steps["e0"])
    if not whole.any():
        return {}
    classes = [kernel_class(name) for name in names]
    communicates = np.array([label == COMMUNICATION_CLASS for label in classes] or [False])
    role = np.full(len(activities), COMPUTE)
    is_kernel = activities["kind"] == KERNEL
    role[is_kernel & communicates[activities["name"] * is_kernel]] = COMMUNICATION
    role[~is_kernel] = TRANSFER
    rows = np.stack((activities["begin"], activities["end"]), axis=1)
    ran = device_activity(rows, role)
    busy = bridge(ran.busy, BACK_TO_BACK_NS)

    floor = np.zeros(len(steps)) if floor_s is None else floor_s * 1e9
    tokens = steps["prompt_tokens"].astype(np.int64) + steps["decode_tokens"]
    e0, e1, e2, e3 = (steps[name].astype(np.int64) for name in ("e0", "e1", "e2", "e3"))
    e1 = np.clip(e1, e0, e3)
    e2 = np.clip(e2, e1, e3)
    inside = overlap_ns(busy, e0, e3)
    in_sample_gap = overlap_ns(busy, e1, e2)
    sample_gap = e2 - e1
    waited = _waits_before_sampling(steps, whole, sample_gap - in_sample_gap, e3 - e0 - inside)
    launch_gap = e3 - e0 - inside - waited
    communication = overlap_ns(ran.exposed_communication, e0, e3)
    transfer = overlap_ns(ran.exposed_transfer, e0, e3)
    last_end = np.concatenate((e0[:1], np.maximum.accumulate(e3)[:-1]))
    number = steps["step"].astype(np.int64)
    follows = np.concatenate(([False], number[1:] == number[:-1] + 1)) & ((steps["flags"] & RESTARTED) == 0)
    # A gap that began before the window was opened may hold launches that nobody saw.
    follows &= last_end >= begin_ns
    gap_end = np.maximum(e0, last_end)
    gap = np.where(follows, gap_end - last_end, 0)
    gap_busy = np.where(follows, overlap_ns(ran.busy, last_end, gap_end), 0)
    envelope = _envelope(ran.busy, e0, e3)

    found = {}
    for phase in np.unique(steps["phase"][whole]).tolist():
        chosen = whole & (steps["phase"] == phase)
        if phase >= len(PHASES):
            continue
        class_ns, top = _kernels(activities, names, classes, e0[chosen], e3[chosen])
        bubbles = int(launch_gap[chosen].sum())
        disturbed = min(_disturbed(steps, chosen, begin_ns), bubbles)
        found[PHASES[phase]] = PhaseWindow(
            steps=int(chosen.sum()),
            span_ns=int((e3 - e0)[chosen].sum()) - disturbed,
            sample_gap_ns=int(sample_gap[chosen].sum()),
            busy_ns=int(inside[chosen].sum()),
            launch_gap_ns=bubbles - disturbed,
            communication_ns=int(communication[chosen].sum()),
            transfer_ns=int(transfer[chosen].sum()),
            gap_ns=int(gap[chosen].sum()),
            gap_busy_ns=int(gap_busy[chosen].sum()),
            gaps=int((chosen & follows).sum()),
            kernel_span_ns=int(envelope[chosen].sum()),
            disturbed_ns=disturbed,
            floor_ns=round(float(floor[chosen].sum())),
            floorless=int((floor[chosen] <= 0).sum()),
            tokens=int(tokens[chosen].sum()),
            class_ns=class_ns,
            top=top,
        )
    return found


def _waits_before_sampling(steps: np.ndarray, whole: np.ndarray, stamped: Ints, idle: Ints) -> Ints:
    """Idle time of each step before its sampling; steps without stamps there have the mean of the others."""
    missing = (steps["flags"] & NO_PARTS) != 0
    found = np.where(missing, 0, stamped)
    for phase in np.unique(steps["phase"][missing]):
        known = whole & ~missing & (steps["phase"] == phase)
        if known.any():
            rows = missing & (steps["phase"] == phase)
            found[rows] = np.minimum(round(float(stamped[known].mean())), idle[rows])
    return np.asarray(np.minimum(found, idle))


def _disturbed(steps: np.ndarray, chosen: np.ndarray, begin_ns: int) -> int:
    """Nanoseconds by which the chosen steps are longer than like steps before the window, together.

    0 where they cannot be compared.
    """
    inside = steps[chosen]
    before = steps[
        (steps["phase"] == inside["phase"][0])
        & (steps["e3"] < begin_ns)
        & (steps["e3"] > begin_ns - _BEFORE_NS)
    ]
    if not alike(inside, before, least_inside=2):
        return 0
    usual = before["e3"] - before["e0"]
    low, median, high = (float(value) for value in np.percentile(usual, (25, 50, 75)))
    if high - low > _MOST_SPREAD_RATIO * median:
        return 0
    longer = float(np.median(inside["e3"] - inside["e0"])) - median
    return max(round(longer * len(inside)), 0)


def _envelope(busy: Intervals, e0: Ints, e3: Ints) -> Ints:
    """Nanoseconds from the first to the last moment in which anything ran in or right beside each span."""
    if not len(busy):
        return np.zeros(len(e0), dtype=np.int64)
    first = np.searchsorted(busy[:, 1], e0, side="right")
    last = np.searchsorted(busy[:, 0], e3, side="left") - 1
    begin = np.maximum(busy[np.minimum(first, len(busy) - 1), 0], e0 - _SLACK_NS)
    end = np.minimum(busy[np.maximum(last, 0), 1], e3 + _SLACK_NS)
    return np.where(first <= last, np.maximum(end - begin, 0), 0)


def _kernels(
    activities: np.ndarray, names: Sequence[str], classes: Sequence[str], e0: Ints, e3: Ints
) -> tuple[dict[str, int], tuple[TopKernel, ...]]:
    """Time by class, and the kernels that took most, of those that began in one of the spans."""
    begin = activities["begin"]
    step = np.searchsorted(e0, begin, side="right") - 1
    mine = (activities["kind"] == KERNEL) & (step >= 0) & (begin < e3[np.maximum(step, 0)])
    name = activities["name"][mine]
    length = (activities["end"] - activities["begin"])[mine]
    if not len(name):
        return {}, ()
    total = np.bincount(name, weights=length, minlength=len(names))
    count = np.bincount(name, minlength=len(names))
    class_ns: dict[str, int] = {}
    for index in np.flatnonzero(count).tolist():
        class_ns[classes[index]] = class_ns.get(classes[index], 0) + int(total[index])
    order = np.argsort(-total, kind="stable")[:_TOP].tolist()
    top = tuple(
        TopKernel(names[index], classes[index], int(count[index]), float(total[index]) / 1e9)
        for index in order
        if count[index]
    )
    return class_ns, top
