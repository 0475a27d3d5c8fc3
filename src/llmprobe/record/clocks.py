"""Which step clock goes with a device."""

from __future__ import annotations

from typing import Any

from llmprobe.record.clock import HostClock, StepClock
from llmprobe.record.cuda_clock import CudaClock


def step_clock(device: Any, *, in_captures: bool = True) -> StepClock:
    """The clock for a ``torch.device`` (or its name): CUDA events on GPUs, else the host's clock.

    Args:
        in_captures: as for `CudaClock`.
    """
    kind = getattr(device, "type", None) or str(device).partition(":")[0]
    return CudaClock(device, in_captures=in_captures) if kind == "cuda" else HostClock()
