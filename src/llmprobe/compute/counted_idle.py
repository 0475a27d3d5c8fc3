"""Launch bubbles from a hardware counter, where nobody looks at the kernels.

NVML's "graphics engine active" is the share of time in which the GPU had anything to compute. Between small
kernels it stays up for part of a gap (of 0.38 idle time between kernels of 5 us it left 0.24 over:
benchmarks/counter_gaps.py), so what it leaves over is a lower bound of the time in which nothing was
computed. Part of that lies between steps, where the step clock sees it; the rest can only lie inside them.
Copies between host and device are other engines' work: time in which only those run is left over too.

On an H100 with vLLM the counter's idle time and the step clock's gaps agreed within 0.03 wherever steps are
whole CUDA graphs (docs/verdicts.md).
"""

from __future__ import annotations

from llmprobe.compute.evidence import CounterEvidence
from llmprobe.compute.figures import PhaseFigures

#: The counter is read once a second and may start up to that much before the window.
_UNSURE_RATIO = 0.05


def idle_ratio(
    figures: PhaseFigures, window_seconds: float, counters: CounterEvidence | None
) -> float | None:
    """Share of a phase's time, gaps included, in which the GPU had nothing to compute.

    None if that is not known.

    Args:
        figures: of the phase, the only one that runs in most of the window.
        window_seconds: that figures and counters are of. Time outside the phase counts as idle.
        counters: None where there are none, or where they do not speak for the phase.
    """
    if counters is None or counters.graphics_active_ratio is None or figures.seconds <= 0:
        return None
    outside = max(window_seconds - figures.seconds, 0.0)
    idle = (1 - counters.graphics_active_ratio) * window_seconds - outside
    return min(max(idle / figures.seconds, 0.0), 1.0)


def bubble_seconds(figures: PhaseFigures, window_seconds: float, counters: CounterEvidence | None) -> float:
    """At least so long, in all steps together, nothing was computed inside steps. 0 if not known."""
    idle = idle_ratio(figures, window_seconds, counters)
    if idle is None:
        return 0.0
    known = figures.gap_seconds + figures.components.get("sample_gap", 0.0)
    inside = idle * figures.seconds - known
    return min(inside, figures.span_seconds) if inside > _UNSURE_RATIO * figures.seconds else 0.0
