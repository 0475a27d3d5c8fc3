"""Where a rank's wall time went: every nanosecond from one step's end to the next gets one component.

The row of a step covers the time from the end of the step before it to its own end::

      end of the last step        e0           e1        e2          e3
          |  no_work | host_gap   |  forward   | sample   | sampling  |
          |          | or blocked |            |  _gap    |           |

Idle time before e0 is ``host_gap`` while requests are pending, ``blocked`` while they wait for something
else than this device, otherwise ``no_work``. Busy time is the forward and the sampling. Of it the floor
(`floors`) cannot be avoided on this device; the rest is ``unattributed`` until kernels are seen, because slow
kernels, launch bubbles, communication and transfers look alike from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmprobe.compute.facts import OPERATORS, ModelFacts
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.intervals import Intervals, empty, overlap_ns, subtract
from llmprobe.compute.steps import EMPTY, NO_PARTS, PHASES, RESTARTED, Bools, Floats, Ints
from llmprobe.compute.traffic import traffic, work

COMPONENTS = (
    "floor_memory",
    "floor_compute",
    "inefficiency",
    "launch_gap",
    "host_gap",
    "sample_gap",
    "communication",
    "transfer",
    "unattributed",
    "blocked",
    "no_work",
)
_INDEX = {name: index for index, name in enumerate(COMPONENTS)}

#: Time that belongs to no step: how much of it a step's row holds depends on when `idle` was called.
IDLE_COMPONENTS = ("blocked", "no_work")
NO_PHASE = "none"


@dataclass
class StepAccounts:
    """One row a step, in the order of the records. Seconds are device time of this rank."""

    phase: npt.NDArray[np.uint8]  # (N,) index into `PHASES`
    end_ns: Ints  # (N,) end of the step, CLOCK_MONOTONIC; never runs backwards
    span_s: Floats  # (N,) e0 to e3
    gap_s: Floats  # (N,) known idle time before e0 while work was pending (host_gap)
    no_work_s: Floats  # (N,) idle time before e0 with nothing to do
    sample_gap_s: Floats  # (N,) e1 to e2
    busy_s: Floats  # (N,) span without the sample gap
    floor_s: Floats  # (N,) modelled floor, not clamped to busy_s; 0 where not known
    traffic_bytes: Floats  # (N, 4) by `OPERATORS`; 0 where not known
    flops: Floats  # (N, 4) likewise
    components: Floats  # (N, 11) seconds by `COMPONENTS`; a row sums to the time it covers
    prompt_tokens: Ints  # (N,)
    decode_tokens: Ints  # (N,)
    sampled: Ints  # (N,)
    new_tokens: Ints  # (N,)
    above_peak: Bools  # (N,) a whole step beats its floor: a peak is too low, or the work overestimated
    empty: Bools  # (N,) a step without a token; its time counts, the step does not
    sampled_kernels: Bools  # (N,) kernel windows were applied (`llmprobe.compute.sampled`)
    cursor_ns: int | None  # time is accounted for up to here; None before the first step
    last_step: int | None  # number of the last step

    def __len__(self) -> int:
        return len(self.end_ns)

    @classmethod
    def none(cls, cursor_ns: int | None = None, last_step: int | None = None) -> StepAccounts:
        """No step at all."""
        rows: dict[str, np.ndarray] = {
            name: np.zeros((0, *shape), dtype=dtype) for name, (dtype, shape) in _COLUMNS.items()
        }
        return cls(**rows, cursor_ns=cursor_ns, last_step=last_step)

    @classmethod
    def concat(cls, parts: Sequence[StepAccounts]) -> StepAccounts:
        """Join consecutive accounts, oldest first; none give an empty one."""
        if not parts:
            return cls.none()
        rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        return cls(**rows, cursor_ns=parts[-1].cursor_ns, last_step=parts[-1].last_step)

    def take(self, rows: np.ndarray | slice) -> StepAccounts:
        """The given rows (a mask, indices or a slice)."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _COLUMNS})

    def between(self, since_ns: int, until_ns: int) -> StepAccounts:
        """Steps that ended after ``since_ns`` and not after ``until_ns``."""
        first, last = np.searchsorted(self.end_ns, (since_ns, until_ns), side="right")
        return self.take(slice(int(first), int(last)))

    def device_time(self) -> dict[str, dict[str, float]]:
        """Seconds by phase and component, to be added to cumulative totals.

        `IDLE_COMPONENTS` stand under the phase "none", like the vector of `idle`.
        """
        result: dict[str, dict[str, float]] = {}
        idle_time = dict.fromkeys(IDLE_COMPONENTS, 0.0)
        for index, label in enumerate(PHASES):
            rows = self.phase == index
            if rows.any():
                sums = dict(zip(COMPONENTS, self.components[rows].sum(axis=0).tolist(), strict=True))
                for name in IDLE_COMPONENTS:
                    idle_time[name] += sums.pop(name)
                result[label] = sums
        if result:
            result[NO_PHASE] = idle_time
        return result


_COLUMNS: dict[str, tuple[type, tuple[int, ...]]] = {
    "phase": (np.uint8, ()),
    "end_ns": (np.int64, ()),
    **dict.fromkeys(("span_s", "gap_s", "no_work_s", "sample_gap_s", "busy_s", "floor_s"), (np.float64, ())),
    **dict.fromkeys(("traffic_bytes", "flops"), (np.float64, (len(OPERATORS),))),
    "components": (np.float64, (len(COMPONENTS),)),
    **dict.fromkeys(("prompt_tokens", "decode_tokens", "sampled", "new_tokens"), (np.int64, ())),
    **dict.fromkeys(("above_peak", "empty", "sampled_kernels"), (np.bool_, ())),
}


def account(
    steps: np.ndarray,
    *,
    cursor_ns: int | None,
    last_step: int | None,
    pending: Intervals,
    blocked: Intervals | None = None,
    model: ModelFacts | None,
    peaks: Peaks | None,
) -> StepAccounts:
    """Account for consecutive steps. Batches may be cut anywhere: hand the result's ``cursor_ns`` and
    ``last_step`` to the next call.

    Args:
        steps: (N,) step records, in the journal's order.
        cursor_ns: time up to which this rank is accounted for; None: time begins with the first step.
        last_step: number of the step before these; None if there was none. A number that does not follow
            the one before means lost records: pending idle time is then ``unattributed``, as the lost
            steps ran in it. So it is after a restart (`RESTARTED`).
        pending: when requests were unfinished.
        blocked: when all of them waited for something else than this device; it outranks ``pending``.
        model: None if not known; all busy time is then ``unattributed``.
        peaks: likewise.

    A step's ``encode_ns`` is taken to lie right before its e0 and is ``unattributed``: the device was busy
    with an encoder whose work is not modelled. Times that overlap the step before are clamped to its end.
    """
    if not len(steps):
        return StepAccounts.none(cursor_ns, last_step)
    start = int(steps["e0"][0]) if cursor_ns is None else cursor_ns
    reach = np.maximum.accumulate(np.concatenate(([start], steps["e3"].astype(np.int64))))
    begin, end = reach[:-1], reach[1:]
    e0 = np.clip(steps["e0"], begin, end)
    e1 = np.clip(steps["e1"], e0, end)
    e2 = np.clip(steps["e2"], e1, end)
    sample_gap_ns = _sample_gaps(steps, end - e0, e2 - e1)
    idle_end = np.clip(e0 - steps["encode_ns"].astype(np.int64), begin, e0)

    blocked = empty() if blocked is None else blocked
    pending_ns = overlap_ns(subtract(pending, blocked), begin, idle_end)
    blocked_ns = overlap_ns(blocked, begin, idle_end)
    no_work_ns = idle_end - begin - pending_ns - blocked_ns

    number = steps["step"].astype(np.int64)
    before = np.concatenate(([number[0] - 1 if last_step is None else last_step], number[:-1]))
    gap_known = (number == before + 1) & ((steps["flags"] & RESTARTED) == 0)
    gap_ns = np.where(gap_known, pending_ns, 0)

    busy_s = (end - e0 - sample_gap_ns) / 1e9
    moved = np.zeros((len(steps), len(OPERATORS))) if model is None else traffic(steps, model)
    done = np.zeros((len(steps), len(OPERATORS))) if model is None else work(steps, model)
    memory_s, compute_s = floors(moved, done, peaks)
    floor_s = memory_s + compute_s
    # A floor above the time it took is wrong; keep its proportions, so that a row still sums to its time.
    too_high = floor_s > busy_s
    scale = np.divide(busy_s, floor_s, out=np.ones(len(steps)), where=too_high)

    components = np.zeros((len(steps), len(COMPONENTS)))
    components[:, _INDEX["floor_memory"]] = memory_s * scale
    components[:, _INDEX["floor_compute"]] = compute_s * scale
    components[:, _INDEX["host_gap"]] = gap_ns / 1e9
    components[:, _INDEX["sample_gap"]] = sample_gap_ns / 1e9
    components[:, _INDEX["unattributed"]] = (
        np.where(too_high, 0, busy_s - floor_s) + (pending_ns - gap_ns + e0 - idle_end) / 1e9
    )
    components[:, _INDEX["blocked"]] = blocked_ns / 1e9
    components[:, _INDEX["no_work"]] = no_work_ns / 1e9
    return StepAccounts(
        phase=steps["phase"].astype(np.uint8),
        end_ns=end,
        span_s=(end - e0) / 1e9,
        gap_s=gap_ns / 1e9,
        no_work_s=no_work_ns / 1e9,
        sample_gap_s=sample_gap_ns / 1e9,
        busy_s=busy_s,
        floor_s=floor_s,
        traffic_bytes=moved,
        flops=done,
        components=components,
        prompt_tokens=steps["prompt_tokens"].astype(np.int64),
        decode_tokens=steps["decode_tokens"].astype(np.int64),
        sampled=steps["sampled"].astype(np.int64),
        new_tokens=steps["new_tokens"].astype(np.int64),
        above_peak=too_high & (steps["e0"] >= begin),
        empty=(steps["flags"] & EMPTY) != 0,
        sampled_kernels=np.zeros(len(steps), dtype=np.bool_),
        cursor_ns=int(end[-1]),
        last_step=int(number[-1]),
    )


def _sample_gaps(steps: np.ndarray, span_ns: Ints, stamped_ns: Ints) -> Ints:
    """The wait before sampling: as stamped; steps without stamps there have the mean of their phase's others.

    Where no step of the phase has them, none is known, and it stays in the busy time.
    """
    missing = (steps["flags"] & NO_PARTS) != 0
    if not missing.any():
        return stamped_ns
    found = np.where(missing, 0, stamped_ns)
    for phase in np.unique(steps["phase"][missing]):
        known = ~missing & (steps["phase"] == phase)
        if known.any():
            rows = missing & (steps["phase"] == phase)
            found[rows] = np.minimum(round(float(stamped_ns[known].mean())), span_ns[rows])
    return found


def step_floors(steps: np.ndarray, model: ModelFacts | None, peaks: Peaks | None) -> Floats:
    """(N,) the modelled floor of each step record in seconds; 0 where it is not known."""
    if model is None or peaks is None or not len(steps):
        return np.zeros(len(steps))
    memory, compute = floors(traffic(steps, model), work(steps, model), peaks)
    return memory + compute


def floors(traffic_bytes: Floats, flops: Floats, peaks: Peaks | None) -> tuple[Floats, Floats]:
    """The least seconds that steps could take, split by the roof that sets them.

    The floor is Σ over operators of max(traffic ÷ bandwidth, work ÷ FLOP rate): one operator cannot hide
    behind another, as they depend on each other's results (roofline: Williams et al. 2009).

    Args:
        traffic_bytes: (N, operators).
        flops: (N, operators).
        peaks: None gives zeros.

    Returns:
        Seconds (N,) of operators that memory bounds, and of those that compute bounds.
    """
    if peaks is None:
        return np.zeros(len(traffic_bytes)), np.zeros(len(flops))
    memory, compute = _floors(traffic_bytes, flops, peaks)
    return memory.sum(axis=1), compute.sum(axis=1)


def operator_floors(rows: StepAccounts, peaks: Peaks) -> tuple[Floats, Floats]:
    """The seconds that ``floor_memory`` and ``floor_compute`` of each row consist of.

    Returns:
        (N, 4) each, by `OPERATORS`; a row of the first sums to its ``floor_memory``.
    """
    memory, compute = _floors(rows.traffic_bytes, rows.flops, peaks)
    raw = memory.sum(axis=1) + compute.sum(axis=1)
    kept = rows.components[:, _INDEX["floor_memory"]] + rows.components[:, _INDEX["floor_compute"]]
    scale = np.divide(kept, raw, out=np.zeros(len(rows)), where=raw > 0)[:, np.newaxis]
    return memory * scale, compute * scale


def _floors(traffic_bytes: Floats, flops: Floats, peaks: Peaks) -> tuple[Floats, Floats]:
    memory = traffic_bytes / peaks.bandwidth_bytes_per_second
    compute = flops / peaks.flops_per_second
    by_memory = memory >= compute
    return np.where(by_memory, memory, 0), np.where(by_memory, 0, compute)


def idle(
    cursor_ns: int, now_ns: int, pending: Intervals, blocked: Intervals | None = None
) -> tuple[Floats, int]:
    """Account for idle time that no step will account for soon.

    Moves the cursor over the time in which nothing was pending, or everything was blocked, and stops where
    work begins that is still pending at ``now_ns``: only the next step tells what happened from there on.
    Pending time that ended is ``unattributed``: no step came of it (a front end learns of the last step's end
    a moment later). Do not call it up to a ``now_ns`` for which steps or arrivals may still be under way to
    the reader.

    Returns:
        Seconds (11,) by `COMPONENTS` and the new cursor.
    """
    blocked = empty() if blocked is None else blocked
    components = np.zeros(len(COMPONENTS))
    waiting = subtract(pending[pending[:, 1] > now_ns], blocked)
    waiting = waiting[waiting[:, 1] > cursor_ns]
    stop = max(cursor_ns, min(now_ns, int(waiting[0, 0]) if len(waiting) else now_ns))
    begin, end = np.array([cursor_ns]), np.array([stop])
    blocked_ns = int(overlap_ns(blocked, begin, end)[0])
    ended_ns = int(overlap_ns(subtract(pending, blocked), begin, end)[0])
    components[_INDEX["blocked"]] = blocked_ns / 1e9
    components[_INDEX["unattributed"]] = ended_ns / 1e9
    components[_INDEX["no_work"]] = (stop - cursor_ns - blocked_ns - ended_ns) / 1e9
    return components, stop
