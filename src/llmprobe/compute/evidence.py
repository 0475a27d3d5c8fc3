"""What speaks for or against a verdict besides the step clock and the model of the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmprobe.compute.steps import Floats

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
    ``gap_busy_seconds``: time between a step and the one before it in which something ran all the same, such
    as copies and kernels that prepare it, in the mean of steps; None if there was no time between them.
    ``disturbed_ratio``: by how much the window itself made the steps longer, which is in none of the other
    figures. ``busy_per_floor``: time in which anything ran ÷ modelled floor of the same steps; None where a
    floor is not known, and where ranks wait for each other in kernels that communicate: those run for as
    long as anybody is late.
    """

    steps: int
    launch_gap_ratio: float
    communication_ratio: float
    transfer_ratio: float
    age_seconds: float
    clock_ratio: float | None = None
    gap_busy_seconds: float | None = None
    disturbed_ratio: float = 0.0
    busy_per_floor: float | None = None

    def launch_gaps(self, span_s: Floats, busy_s: Floats, floor_s: Floats) -> Floats:
        """Seconds of launch bubbles in steps that nobody watched.

        How long kernels run depends on the work of a step, how long the device waits for the next launch on
        the host. So what such steps were busy for is their modelled floor times what windows saw of busy time
        above it, and the rest of their time, which the step clock measured, are bubbles: of all together,
        because single steps differ from their model. Where a floor is not known, by the ratio of the span.

        Args:
            span_s: (N,) e0 to e3.
            busy_s: (N,) that without the wait before sampling.
            floor_s: (N,) their modelled floor, 0 where it is not known.
        """
        by_ratio = self.launch_gap_ratio * span_s
        known = floor_s > 0
        if self.busy_per_floor is None or not known.any():
            return by_ratio
        above = np.where(known, busy_s - self.busy_per_floor * floor_s, 0.0)
        over = np.clip(above, 0.0, None)
        all_over = over.sum()
        share = max(above.sum(), 0.0) / all_over if all_over > 0 else 0.0
        return np.where(known, over * share, by_ratio)

    def prepared(self, gap_s: Floats) -> Floats:
        """Seconds before steps that were no waiting: likewise a matter of their work, not of the host's.

        Args:
            gap_s: (N,) seconds between the step before and this one.
        """
        return np.minimum(gap_s, max(self.gap_busy_seconds or 0.0, 0.0))

    def at(self, span_seconds: float, busy_seconds: float, floor_seconds: float | None) -> KernelEvidence:
        """The same of steps that took so long together; arguments as of `launch_gaps`."""
        if span_seconds <= 0:
            return self
        span, busy, floor = (np.array([one or 0.0]) for one in (span_seconds, busy_seconds, floor_seconds))
        return replace(self, launch_gap_ratio=float(self.launch_gaps(span, busy, floor)[0]) / span_seconds)

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
