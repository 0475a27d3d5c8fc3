"""A mixture of experts whose steps reach fewer experts than even routing would, told by the DRAM counter.

The model of the work has a step reach the experts that even routing would: ``E·(1-(1-k/E)^tokens)`` of
``E`` with ``k`` a token. Routers that favour some reach fewer, down to the ``k`` of one token, and less is
read than modelled. Kernels cannot read less than they need: where the counter reads well below the model,
yet no less than ``k`` experts need, it is the better figure, and figures take their bytes from it.
"""

from __future__ import annotations

from dataclasses import replace

from llmprobe.compute.counter_roofs import of_phase
from llmprobe.compute.evidence import RoutingEvidence
from llmprobe.compute.facts import EXPERTS, OPERATORS
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import Observation

_EXPERTS = OPERATORS[EXPERTS]


def by_counter(seen: Observation, limits: Thresholds) -> Observation:
    """The same with the bytes that the counter saw in its figures, and with ``routing``; or as it was.

    Args:
        seen: figures by the model of the work.
        limits: a counter less than ``counter_disagreement_ratio`` below the model changes nothing, nor does
            one more than ``counter_agreement_ratio`` below what ``k`` experts need.
    """
    figures, experts, peaks = seen.figures, seen.experts, seen.peaks
    if figures is None or experts is None or peaks is None or not figures.steps or not figures.mbu_step:
        return seen
    counters = of_phase(seen.counters, figures.seconds, seen.window_seconds, limits)
    modelled, tokens = figures.mbu_step, (figures.prompt_tokens + figures.decode_tokens) / figures.steps
    if counters is None or tokens < 1:
        return seen
    counted = counters.dram_active_ratio
    # In shares of what the memory could move in the time of a mean step, as MBU is.
    could_move = peaks.bandwidth_bytes_per_second * figures.seconds / figures.steps
    one = experts.bytes / experts.count / could_move
    even = experts.count * (1 - (1 - experts.top_k / experts.count) ** tokens)
    others = modelled - one * even
    least = others + one * experts.top_k
    if modelled - counted <= limits.counter_disagreement_ratio or one <= 0 or others < 0:
        return seen
    if counted < least - limits.counter_agreement_ratio:
        return seen
    reached = max((counted - others) / one, float(experts.top_k))
    return replace(
        seen,
        figures=_with_less_moved(figures, counted / modelled),
        routing=RoutingEvidence(reached, even, experts.count, counters.age_seconds),
    )


def _with_less_moved(figures: PhaseFigures, ratio: float) -> PhaseFigures:
    """``ratio`` of the bytes; those that are gone were the experts'."""
    seconds = (1 - ratio) * (figures.mbu_step or 0.0) * figures.seconds  # of the memory's, all steps together
    parts = dict(figures.components)
    memory, compute = (parts.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
    # Floors above the time that steps took were cut to it, in proportion.
    modelled = max((figures.floor_seconds or 0.0) * figures.steps, memory + compute)
    uncut = modelled / (memory + compute) if memory + compute > 0 else 1.0
    left = max(modelled - seconds, 0.0)
    parts["floor_memory"] = min(max(left - compute, 0.0), memory)
    rest = "unattributed" if figures.sync_gap_is_lower_bound else "inefficiency"
    parts[rest] = parts.get(rest, 0.0) + memory - parts["floor_memory"]
    floors = dict(figures.operator_floors)
    if _EXPERTS in floors:
        floors = {name: (of_memory * uncut, of_compute) for name, (of_memory, of_compute) in floors.items()}
        floors[_EXPERTS] = max(floors[_EXPERTS][0] - seconds, 0.0), floors[_EXPERTS][1]
    return replace(
        figures,
        floor_seconds=None if figures.floor_seconds is None else left / figures.steps,
        mbu_step=_times(figures.mbu_step, ratio),
        mbu_busy=_times(figures.mbu_busy, ratio),
        intensity=_times(figures.intensity, 1 / ratio),
        components=parts,
        operator_floors=floors,
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
