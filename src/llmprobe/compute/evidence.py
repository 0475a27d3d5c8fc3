"""What speaks for or against a verdict besides the step clock and the model of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "sampled", "counter", "modelled"]


@dataclass(frozen=True)
class Evidence:
    """One quantity that decided. ``threshold`` is None where the value only explains.

    ``age_seconds`` is how long ago it was seen; 0 for figures of the window itself.
    """

    quantity: str
    value: float
    threshold: float | None
    source: Source
    age_seconds: float = 0.0


@dataclass(frozen=True)
class KernelEvidence:
    """What kernel windows or a capture saw inside the steps of one phase. Ratios of the steps' span.

    ``launch_gap_ratio``: no kernel, copy or set ran, the wait before sampling left out.
    ``communication_ratio`` and ``transfer_ratio``: only such ran, while no compute kernel did (exposed).
    ``clock_ratio``: span by kernels ÷ span by the step clock over the same steps; None if not compared.
    ``gap_busy_ratio``: share of the time *between* steps in which something ran all the same, such as copies
    and kernels that prepare the next step; None if there was no such time. ``disturbed_ratio``: by how much
    the window itself made the steps longer, which is in none of the other figures.
    """

    steps: int
    launch_gap_ratio: float
    communication_ratio: float
    transfer_ratio: float
    age_seconds: float
    clock_ratio: float | None = None
    gap_busy_ratio: float | None = None
    disturbed_ratio: float = 0.0

    @property
    def stall_ratio(self) -> float:
        """Share of the span in which no compute kernel ran."""
        return min(self.launch_gap_ratio + self.communication_ratio + self.transfer_ratio, 1.0)


@dataclass(frozen=True)
class CounterEvidence:
    """Hardware counters of a whole GPU (NVML GPM), mean over the window.

    ``graphics_active_ratio``: share of time in which the GPU had anything to compute (its "graphics engine"
    was active); stays up between small kernels, and does not count copies. ``shared``: another process used
    the GPU in that time; None if that is not known.
    """

    dram_active_ratio: float
    tensor_active_ratio: float
    sm_active_ratio: float | None
    age_seconds: float
    shared: bool | None = None
    graphics_active_ratio: float | None = None
