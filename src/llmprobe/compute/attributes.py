"""What a verdict says beyond its class: how near to the roof, through which operator, what is left."""

from __future__ import annotations

from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import BALANCED, COMPUTE, MEMORY, Observation


def healthy(
    seen: Observation, figures: PhaseFigures, bottleneck: str, near: bool | None, limits: Thresholds
) -> bool:
    """Whether whole steps, gaps included, come near enough to the roof that binds them.

    Never in 32 bits on a GPU: that roof is a low one, and need not be there.
    """
    if seen.clock != "host" and seen.peaks is not None and seen.peaks.dtype in ("float32", "tf32"):
        return False
    if near:
        return True
    memory = (figures.mbu_step or 0) >= limits.healthy_mbu_ratio
    compute = (figures.mfu_step or 0) >= limits.healthy_mfu_ratio
    return {MEMORY: memory, COMPUTE: compute, BALANCED: memory or compute}.get(bottleneck, False)


def attained(seen: Observation, bottleneck: str, mbu: float | None, mfu: float | None) -> float | None:
    """Share of the rate that this device was measured to attain at the nearer roof; None if it was not."""
    peaks, reached = seen.peaks, seen.attainable
    if peaks is None or reached is None or bottleneck not in (MEMORY, COMPUTE, BALANCED):
        return None
    memory = (mbu or 0.0) * peaks.bandwidth_bytes_per_second / reached.bandwidth_bytes_per_second
    compute = (mfu or 0.0) * peaks.flops_per_second / reached.flops_per_second
    return {MEMORY: memory, COMPUTE: compute}.get(bottleneck, max(memory, compute))


def operator(figures: PhaseFigures, bottleneck: str) -> str | None:
    """The operator with the largest part of the floor that binds."""
    floors = figures.operator_floors
    if not floors:
        return None

    def part(name: str) -> float:
        memory, compute = floors[name]
        return {MEMORY: memory, COMPUTE: compute}.get(bottleneck, memory + compute)

    return max(floors, key=part)


def headroom(seen: Observation, figures: PhaseFigures) -> float | None:
    """Seconds of a mean step, its gap included, beyond its floor; by attainable rates where known."""
    peaks, reached = seen.peaks, seen.attainable
    memory, compute = (figures.components.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
    if peaks is None or memory + compute <= 0 or not figures.steps:
        return None
    if reached is not None:
        memory *= peaks.bandwidth_bytes_per_second / reached.bandwidth_bytes_per_second
        compute *= peaks.flops_per_second / reached.flops_per_second
    return max(figures.seconds - memory - compute, 0.0) / figures.steps
