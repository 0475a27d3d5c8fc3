"""What speaks for or against a verdict besides the step clock and the model of the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmprobe.compute.steps import Floats

Source = Literal["measured", "sampled", "counter", "modelled"]
#: Steps do the work of those in the windows where their mean floor and tokens are theirs to within these.
_LIKE_FLOOR, _LIKE_TOKENS = 1.25, 1.5


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
class Unwatched:
    """Steps of one phase, one row each, of which no kernel was seen.

    ``span_s`` is e0 to e3 in seconds, ``busy_s`` that without the wait before sampling, ``floor_s`` the
    modelled floor (0 where it is not known), ``tokens`` query tokens.
    """

    span_s: Floats
    busy_s: Floats
    floor_s: Floats
    tokens: Floats

    def after(self, earlier: Unwatched | None, most: int) -> Unwatched:
        """The newest ``most`` of ``earlier`` and these."""
        if earlier is None:
            return Unwatched(*(column[-most:] for column in self._columns()))
        both = zip(earlier._columns(), self._columns(), strict=True)
        return Unwatched(*(np.concatenate(pair)[-most:] for pair in both))

    def _columns(self) -> tuple[Floats, Floats, Floats, Floats]:
        return self.span_s, self.busy_s, self.floor_s, self.tokens


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
    floor is not known, and where ranks were seen to wait for each other in kernels that communicate: those
    run for as long as anybody is late. ``floor_step_seconds`` and ``step_tokens``: modelled floor and query
    tokens of the mean step.
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
    floor_step_seconds: float | None = None
    step_tokens: float | None = None

    def launch_gaps(self, steps: Unwatched, earlier: Unwatched | None = None) -> Floats:
        """Seconds of launch bubbles in each of ``steps``, which nobody watched.

        How long kernels run depends on the work of a step, how long the device waits for the next launch on
        the host. So what steps like those in the windows were busy for is their modelled floor times what
        windows saw of busy time above it, and the rest of their time, which the step clock measured, are
        bubbles: of all together, because single steps differ from their model. Where a floor is not known,
        or the work is another, by the ratio of the span: how far kernels are from their floor depends on the
        batch and its context.

        Args:
            earlier: steps of the same phase before them, for what is true only of many together.
        """
        by_ratio = self.launch_gap_ratio * steps.span_s
        pool = steps if earlier is None else steps.after(earlier, len(earlier.span_s) + len(steps.span_s))
        if self.busy_per_floor is None or not self._alike(pool):
            return by_ratio
        above = _above(pool, self.busy_per_floor)
        over = np.clip(above, 0.0, None).sum()
        share = max(float(above.sum()), 0.0) / over if over > 0 else 0.0
        return np.where(
            steps.floor_s > 0, np.clip(_above(steps, self.busy_per_floor), 0.0, None) * share, by_ratio
        )

    def _alike(self, steps: Unwatched) -> bool:
        """Whether these do as much work as those in the windows, in the mean."""
        known = steps.floor_s > 0
        if not known.any() or not self.floor_step_seconds or not self.step_tokens:
            return False
        floor = float(steps.floor_s[known].mean()) / self.floor_step_seconds
        tokens = float(steps.tokens[known].mean()) / self.step_tokens
        return 1 / _LIKE_FLOOR <= floor <= _LIKE_FLOOR and 1 / _LIKE_TOKENS <= tokens <= _LIKE_TOKENS

    def prepared(self, gap_s: Floats) -> Floats:
        """Seconds before steps that were no waiting: likewise a matter of their work, not of the host's.

        Args:
            gap_s: (N,) seconds between the step before and this one.
        """
        return np.minimum(gap_s, max(self.gap_busy_seconds or 0.0, 0.0))

    def at(self, mean: Unwatched) -> KernelEvidence:
        """The same of steps of which ``mean`` is the mean, in one row."""
        span = float(mean.span_s[0])
        if span <= 0:
            return self
        return replace(self, launch_gap_ratio=float(self.launch_gaps(mean)[0]) / span)

    @property
    def stall_ratio(self) -> float:
        """Share of the span in which no compute kernel ran."""
        return min(self.launch_gap_ratio + self.communication_ratio + self.transfer_ratio, 1.0)


def _above(steps: Unwatched, busy_per_floor: float) -> Floats:
    """Seconds of each step beyond what its kernels run for; 0 where its floor is not known."""
    return np.where(steps.floor_s > 0, steps.busy_s - busy_per_floor * steps.floor_s, 0.0)


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


@dataclass(frozen=True)
class RoutingEvidence:
    """How much of its experts a step reads, mean, where the DRAM counter shows that routing is uneven.

    ``read_ratio``: the share of the weights of all experts on this rank that the counter leaves for them; at
    most so much, as it counts all else that is read too. ``even_ratio``: what even routing would read, and
    ``even_mbu``: the MBU of whole steps then. ``weight``: how much of the difference figures took over.
    """

    read_ratio: float
    even_ratio: float
    even_mbu: float
    weight: float
    age_seconds: float

    def said(self) -> str:
        """As the end of a reason."""
        return (
            f"MBU {self.even_mbu:.2f} if routing were even, but by the DRAM counter steps read "
            f"{self.read_ratio:.0%} of the experts' weights instead of {self.even_ratio:.0%}"
        )
