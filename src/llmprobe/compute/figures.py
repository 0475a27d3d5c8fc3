"""The figures of a time window, by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS, StepAccounts
from llmprobe.compute.facts import OPERATORS
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.steps import PHASES, Floats
from llmprobe.compute.sums import COLUMNS, INDEX, PhaseSums, by_phase

#: The components that are no busy time, and all that are waiting.
GAPS = ("host_gap", "sample_gap", "launch_gap")
STALLS = (*GAPS, "communication", "transfer")
_STEPS = INDEX["steps"]
_KNOWN = ("known_bytes", "known_flops", "known_seconds", "known_busy")
_SHOWN_COMPONENTS = tuple(name for name in COMPONENTS if name not in IDLE_COMPONENTS)


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
    window = by_phase(accounts.between(since_ns, now_ns), peaks)
    return figures_of(window, window_seconds=(now_ns - since_ns) / 1e9, peaks=peaks, operators=operators)


def figures_of(
    window: Mapping[int, PhaseSums], *, window_seconds: float, peaks: Peaks | None, operators: bool = False
) -> dict[str, PhaseFigures]:
    """Likewise of a window's sums, by the index of the phase."""
    return {
        PHASES[index]: _figures(window[index], window_seconds, peaks, operators)
        for index in sorted(window)
        if window[index].sums[_STEPS] > 0
    }


def _figures(phase: PhaseSums, window_seconds: float, peaks: Peaks | None, operators: bool) -> PhaseFigures:
    values = phase.sums.tolist()
    seen = dict(zip(COLUMNS, values, strict=True))
    span, gap, steps = seen["span"], seen["gap"], round(seen["steps"])
    spans = np.sort(phase.spans)
    # Ratios over the steps whose work is known only, so that the others do not dilute them.
    moved, done, step, busy = (seen[name] for name in _KNOWN)
    bandwidth = peaks.bandwidth_bytes_per_second if peaks else None
    rate = peaks.flops_per_second if peaks else None
    stall = sum(seen[name] for name in STALLS)
    return PhaseFigures(
        steps=steps,
        seconds=span + gap,
        span_seconds=span,
        gap_seconds=gap,
        prompt_tokens=round(seen["prompt_tokens"]),
        decode_tokens=round(seen["decode_tokens"]),
        steps_per_second=steps / window_seconds,
        step_seconds_p50=_quantile(spans, 0.5),
        step_seconds_p99=_quantile(spans, 0.99),
        floor_seconds=seen["floor"] / seen["floored"] if seen["floored"] else None,
        mbu_step=_utilisation(moved, step, bandwidth),
        mbu_busy=_utilisation(moved, busy, bandwidth),
        mfu_step=_utilisation(done, step, rate),
        mfu_busy=_utilisation(done, busy, rate),
        sync_gap_ratio=stall / (span + gap) if span + gap > 0 else None,
        sync_gap_is_lower_bound=seen["unsampled"] > 0,
        intensity=done / moved if moved > 0 else None,
        components={name: seen[name] for name in _SHOWN_COMPONENTS},
        operator_floors=_by_operator(seen) if operators and peaks is not None else {},
    )


def _quantile(ranked: Floats, q: float) -> float:
    """As `np.quantile` of sorted values, which takes ten times as long for the few that there are."""
    at = q * (len(ranked) - 1)
    below = int(at)
    above = min(below + 1, len(ranked) - 1)
    return float(ranked[below] + (ranked[above] - ranked[below]) * (at - below))


def _by_operator(seen: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    pairs = {name: (seen[f"memory.{name}"], seen[f"compute.{name}"]) for name in OPERATORS}
    return {name: pair for name, pair in pairs.items() if pair[0] > 0 or pair[1] > 0}


def _utilisation(amount: float, seconds: float, peak: float | None) -> float | None:
    if peak is None or seconds <= 0 or amount <= 0:
        return None
    return amount / seconds / peak
