"""A mixture of experts whose steps read fewer experts than even routing would, told by the DRAM counter.

The model of the work has a step read the experts that even routing would: ``E·(1-(1-k/E)^tokens)`` of
``E`` with ``k`` a token. Routers that favour some reach fewer, down to the ``k`` of one token, and less is
read than modelled. Kernels cannot read less than they need: where the counter reads well below the model,
yet no less than ``k`` experts and all else need, it is the better figure, and bytes are taken from it.
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

    MBU, intensity and the memory's floors change. ``floor_seconds`` stays that of the model: what kernel
    windows saw of a step is told by it.

    Args:
        seen: figures by the model of the work, with floors by operator.
        limits: the counter counts for nothing up to ``counter_agreement_ratio`` below the model, and for all
            from ``counter_disagreement_ratio`` on; in between for a part, so that noise at an edge makes no
            MBU jump. It may read ``counter_agreement_ratio`` less than one token's experts and all else need.
    """
    figures, experts, peaks = seen.figures, seen.experts, seen.peaks
    if figures is None or experts is None or peaks is None or not figures.mbu_step:
        return seen
    counters = of_phase(seen.counters, figures.seconds, seen.window_seconds, limits)
    if counters is None or figures.seconds <= 0:
        return seen
    # Seconds that the memory takes at its peak rate, for all steps together. What it counted in the rest of
    # the window may all have been in these steps.
    modelled, counted = figures.mbu_step * figures.seconds, counters.dram_active_ratio * seen.window_seconds
    weight = _weight((modelled - counted) / figures.seconds, limits)
    if weight <= 0 or counted <= 0:  # steps that read nothing at all: no counter of theirs
        return seen
    of_experts = figures.operator_floors.get(_EXPERTS, (0.0, 0.0))[0] * _uncut(figures)
    every = experts.bytes / peaks.bandwidth_bytes_per_second * figures.steps
    # Where experts are spread over ranks, one that no favoured expert lies on reads none.
    least = 0.0 if seen.expert_parallel else experts.top_k / experts.count
    others = max(modelled - of_experts, 0.0)
    if of_experts <= 0 or counted < others + least * every - limits.counter_agreement_ratio * figures.seconds:
        return seen
    routing = RoutingEvidence(
        read_ratio=max((counted - others) / every, least),
        even_ratio=of_experts / every,
        even_mbu=figures.mbu_step,
        weight=weight,
        age_seconds=counters.age_seconds,
    )
    return replace(seen, figures=_with_less_read(figures, weight * (modelled - counted)), routing=routing)


def _weight(apart: float, limits: Thresholds) -> float:
    """How much the counter counts for: 0 to 1."""
    begin, end = limits.counter_agreement_ratio, limits.counter_disagreement_ratio
    if end <= begin:  # as somebody set them
        return float(apart > end)
    return min(max((apart - begin) / (end - begin), 0.0), 1.0)


def _uncut(figures: PhaseFigures) -> float:
    """Modelled floors ÷ those of the components, which accounting cut to the time that steps took."""
    kept = sum(figures.components.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
    return max((figures.floor_seconds or 0.0) * figures.steps / kept, 1.0) if kept > 0 else 1.0


def _with_less_read(figures: PhaseFigures, seconds: float) -> PhaseFigures:
    """Without bytes of experts that take the memory so long, for all steps together."""
    uncut, parts = _uncut(figures), dict(figures.components)
    floors = {
        name: (memory * uncut, compute * uncut) for name, (memory, compute) in figures.operator_floors.items()
    }
    memory, compute = floors[_EXPERTS]
    gone = min(seconds, memory)
    floors[_EXPERTS] = memory - gone, compute
    of_memory, of_compute = (parts.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
    rest = "unattributed" if figures.sync_gap_is_lower_bound else "inefficiency"
    busy = of_memory + of_compute + parts.get(rest, 0.0)
    of_memory, of_compute = max(of_memory * uncut - gone, 0.0), of_compute * uncut
    total = of_memory + of_compute
    cut = min(busy / total, 1.0) if total > 0 else 1.0
    parts["floor_memory"], parts["floor_compute"] = of_memory * cut, of_compute * cut
    parts[rest] = max(busy - total * cut, 0.0)
    ratio = 1 - seconds / ((figures.mbu_step or 0.0) * figures.seconds)
    return replace(
        figures,
        mbu_step=_times(figures.mbu_step, ratio),
        mbu_busy=_times(figures.mbu_busy, ratio),
        intensity=_times(figures.intensity, 1 / ratio),
        components=parts,
        operator_floors={name: (memory * cut, compute * cut) for name, (memory, compute) in floors.items()},
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
