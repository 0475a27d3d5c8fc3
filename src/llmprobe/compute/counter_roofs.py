"""Which roof a GPU's hardware counters see reached, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

from llmprobe.compute.confidence import margin
from llmprobe.compute.evidence import CounterEvidence
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import COMPUTE, MEMORY


def of_phase(
    counters: CounterEvidence | None, seconds: float, window_seconds: float, limits: Thresholds
) -> CounterEvidence | None:
    """The counters where they speak for a phase, else None.

    They average over a whole GPU and window: the phase has to fill both.

    Args:
        counters: mean over the window.
        seconds: that the phase took of it.
    """
    if counters is None or counters.shared or window_seconds <= 0:
        return None
    return counters if seconds / window_seconds >= limits.counter_phase_share_ratio else None


@dataclass(frozen=True)
class CounterRoofs:
    """Counters against their thresholds.

    Attributes:
        counters: those that speak for the phase; None if none do.
        limits: thresholds.
        moved: the same in favour of the class that stands.
    """

    counters: CounterEvidence | None
    limits: Thresholds
    moved: Thresholds

    @property
    def reached(self) -> str | None:
        """The roof that is reached; the one nearer to its threshold if both are; None if none is."""
        if self.counters is None:
            return None
        dram = self.counters.dram_active_ratio / self.moved.dram_active_ratio
        tensor = self.counters.tensor_active_ratio / self.moved.tensor_active_ratio
        if max(dram, tensor) < 1:
            return None
        return MEMORY if dram >= tensor else COMPUTE

    def margin(self, roof: str) -> float:
        """How far the counter of that roof lies above its own, as `llmprobe.compute.confidence.margin`."""
        if self.counters is None:
            return 0.0
        if roof == MEMORY:
            return margin(self.counters.dram_active_ratio, self.limits.dram_active_ratio)
        return margin(self.counters.tensor_active_ratio, self.limits.tensor_active_ratio)

    def confirms(self, roof: str, figures: PhaseFigures) -> bool:
        """Whether the counter of that roof reads as much as the model of the work says of whole steps.

        No more than that, short of its own threshold: two sources then give the same MBU, or MFU.
        """
        if self.counters is None:
            return False
        counted, modelled = {
            MEMORY: (self.counters.dram_active_ratio, figures.mbu_step),
            COMPUTE: (self.counters.tensor_active_ratio, figures.mfu_step),
        }[roof]
        return modelled is not None and counted >= modelled - self.limits.counter_agreement_ratio

    def said(self, roof: str) -> str:
        """What the counter of that roof reads, as the end of a reason; empty without one."""
        if self.counters is None:
            return ""
        if roof == MEMORY:
            return f", DRAM counter {self.counters.dram_active_ratio:.2f}"
        return f", tensor counter {self.counters.tensor_active_ratio:.2f}"
