"""The figures of a time window, by phase."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS, StepAccounts
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.steps import PHASES


@dataclass(frozen=True)
class PhaseFigures:
    """One phase over a window. What is not known is None.

    ``mbu_*`` and ``mfu_*`` are ratios of the peak; above 1 means that the peak is too low or the work
    overestimated. On the basis ``step`` they are over span and gap ((weights + KV)/TPOT ÷ peak), on the
    basis ``busy`` over busy time. ``sync_gap_ratio`` is stall ÷ pending time; without kernels, bubbles inside
    a step and exposed communication are not in it, so the truth may be higher. ``components`` leaves out
    idle time that belongs to no step (`IDLE_COMPONENTS`).
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


def summarise(
    accounts: StepAccounts, *, since_ns: int, now_ns: int, peaks: Peaks | None
) -> dict[str, PhaseFigures]:
    """Figures of the steps that ended in (``since_ns``, ``now_ns``], by phase label.

    Phases without steps are absent.
    """
    window = accounts.between(since_ns, now_ns)
    result = {}
    for index, label in enumerate(PHASES):
        rows = window.take(window.phase == index)
        if not rows.empty.all():
            result[label] = _figures(rows, (now_ns - since_ns) / 1e9, peaks)
    return result


def _figures(rows: StepAccounts, window_seconds: float, peaks: Peaks | None) -> PhaseFigures:
    real = rows.take(~rows.empty)
    span, gap = float(rows.span_s.sum()), float(rows.gap_s.sum())
    stall = gap + float(rows.sample_gap_s.sum())
    p50, p99 = np.quantile(real.span_s, (0.5, 0.99))
    # Ratios over the steps whose work is known only, so that the others do not dilute them.
    known = rows.take(rows.traffic_bytes.sum(axis=1) > 0)
    moved, done = float(known.traffic_bytes.sum()), float(known.flops.sum())
    step, busy = float((known.span_s + known.gap_s).sum()), float(known.busy_s.sum())
    bandwidth = peaks.bandwidth_bytes_per_second if peaks else None
    rate = peaks.flops_per_second if peaks else None
    floors = rows.floor_s[rows.floor_s > 0]
    sums = dict(zip(COMPONENTS, rows.components.sum(axis=0).tolist(), strict=True))
    return PhaseFigures(
        steps=len(real),
        seconds=span + gap,
        span_seconds=span,
        gap_seconds=gap,
        prompt_tokens=int(rows.prompt_tokens.sum()),
        decode_tokens=int(rows.decode_tokens.sum()),
        steps_per_second=len(real) / window_seconds,
        step_seconds_p50=float(p50),
        step_seconds_p99=float(p99),
        floor_seconds=float(floors.mean()) if len(floors) else None,
        mbu_step=_utilisation(moved, step, bandwidth),
        mbu_busy=_utilisation(moved, busy, bandwidth),
        mfu_step=_utilisation(done, step, rate),
        mfu_busy=_utilisation(done, busy, rate),
        sync_gap_ratio=stall / (span + gap) if span + gap > 0 else None,
        sync_gap_is_lower_bound=True,
        intensity=done / moved if moved > 0 else None,
        components={name: seconds for name, seconds in sums.items() if name not in IDLE_COMPONENTS},
    )


def _utilisation(amount: float, seconds: float, peak: float | None) -> float | None:
    if peak is None or seconds <= 0 or amount <= 0:
        return None
    return amount / seconds / peak
