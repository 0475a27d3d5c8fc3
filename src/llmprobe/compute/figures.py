"""The figures of a time window, by phase."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS, StepAccounts, operator_floors
from llmprobe.compute.facts import OPERATORS
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.steps import PHASES, Floats

#: The components that are waiting.
STALLS = ("host_gap", "sample_gap", "launch_gap", "communication", "transfer")
_LAUNCH_GAP = COMPONENTS.index("launch_gap")


@dataclass(frozen=True)
class PhaseFigures:
    """One phase over a window. What is not known is None.

    ``mbu_*`` and ``mfu_*`` are ratios of the peak; above 1 means that the peak is too low or the work
    overestimated. On the basis ``step`` they are over span and gap ((weights + KV)/TPOT ÷ peak), on the
    basis ``busy`` over busy time. ``sync_gap_ratio`` is stall ÷ pending time. Without kernel windows, bubbles
    inside a step and exposed communication are not in it, so that the truth may be higher
    (``sync_gap_is_lower_bound``), and what prepares a step on the device before its forward counts as
    waiting. ``components`` leaves out idle time that belongs to no step (`IDLE_COMPONENTS`).
    ``operator_floors`` are the seconds that ``floor_memory`` and ``floor_compute`` consist of, by operator
    (`llmprobe.compute.facts.OPERATORS`); empty where nobody asked for them.
    """

    steps: int
    seconds: float  # span + gap
    span_seconds: float
    gap_seconds: float
    prompt_tokens: int
    decode_tokens: int
    steps_per_second: float  # over the window's length
    step_seconds_p50: float  # of spans
    step_seconds_p99: float
    floor_seconds: float | None  # mean of a step
    mbu_step: float | None
    mbu_busy: float | None
    mfu_step: float | None
    mfu_busy: float | None
    sync_gap_ratio: float | None
    sync_gap_is_lower_bound: bool
    intensity: float | None  # FLOPs per byte
    components: dict[str, float]  # seconds
    operator_floors: dict[str, tuple[float, float]] = field(default_factory=dict)  # seconds: memory, compute


def summarise(
    accounts: StepAccounts, *, since_ns: int, now_ns: int, peaks: Peaks | None, operators: bool = False
) -> dict[str, PhaseFigures]:
    """Figures of the steps that ended in (``since_ns``, ``now_ns``], by phase label.

    Phases without steps are absent. ``operator_floors`` are left out unless ``operators`` asks for them.
    """
    window = accounts.between(since_ns, now_ns)
    result = {}
    for index in np.unique(window.phase):
        label = PHASES[index]
        rows = _where(window, window.phase == index)
        if not rows.empty.all():
            figures = _figures(rows, (now_ns - since_ns) / 1e9, peaks)
            result[label] = (
                replace(figures, operator_floors=_by_operator(rows, peaks)) if operators else figures
            )
    return result


def _where(rows: StepAccounts, chosen: np.ndarray) -> StepAccounts:
    """The chosen rows; not copied where all are, as in most windows."""
    return rows if chosen.all() else rows.take(chosen)


def _figures(rows: StepAccounts, window_seconds: float, peaks: Peaks | None) -> PhaseFigures:
    real = _where(rows, ~rows.empty)
    span, gap = float(rows.span_s.sum()), float(rows.gap_s.sum())
    spans = np.sort(real.span_s)
    # Ratios over the steps whose work is known only, so that the others do not dilute them.
    known = _where(rows, rows.traffic_bytes.sum(axis=1) > 0)
    moved, done = float(known.traffic_bytes.sum()), float(known.flops.sum())
    step = float((known.span_s + known.gap_s).sum())
    busy = float(known.busy_s.sum() - known.components[:, _LAUNCH_GAP].sum())
    bandwidth = peaks.bandwidth_bytes_per_second if peaks else None
    rate = peaks.flops_per_second if peaks else None
    floors = rows.floor_s[rows.floor_s > 0]
    sums = dict(zip(COMPONENTS, rows.components.sum(axis=0).tolist(), strict=True))
    stall = sum(sums[name] for name in STALLS)
    return PhaseFigures(
        steps=len(real),
        seconds=span + gap,
        span_seconds=span,
        gap_seconds=gap,
        prompt_tokens=int(rows.prompt_tokens.sum()),
        decode_tokens=int(rows.decode_tokens.sum()),
        steps_per_second=len(real) / window_seconds,
        step_seconds_p50=_quantile(spans, 0.5),
        step_seconds_p99=_quantile(spans, 0.99),
        floor_seconds=float(floors.mean()) if len(floors) else None,
        mbu_step=_utilisation(moved, step, bandwidth),
        mbu_busy=_utilisation(moved, busy, bandwidth),
        mfu_step=_utilisation(done, step, rate),
        mfu_busy=_utilisation(done, busy, rate),
        sync_gap_ratio=stall / (span + gap) if span + gap > 0 else None,
        sync_gap_is_lower_bound=not bool(rows.sampled_kernels.all()),
        intensity=done / moved if moved > 0 else None,
        components={name: seconds for name, seconds in sums.items() if name not in IDLE_COMPONENTS},
    )


def _quantile(ranked: Floats, q: float) -> float:
    """As `np.quantile` of sorted values, which takes ten times as long for the few that there are."""
    at = q * (len(ranked) - 1)
    below = int(at)
    above = min(below + 1, len(ranked) - 1)
    return float(ranked[below] + (ranked[above] - ranked[below]) * (at - below))


def _by_operator(rows: StepAccounts, peaks: Peaks | None) -> dict[str, tuple[float, float]]:
    if peaks is None:
        return {}
    memory, compute = (part.sum(axis=0) for part in operator_floors(rows, peaks))
    return {
        name: (float(memory[index]), float(compute[index]))
        for index, name in enumerate(OPERATORS)
        if memory[index] > 0 or compute[index] > 0
    }


def _utilisation(amount: float, seconds: float, peak: float | None) -> float | None:
    if peak is None or seconds <= 0 or amount <= 0:
        return None
    return amount / seconds / peak
