"""Which step clock goes with a device."""

from __future__ import annotations

from typing import Any

from llmprobe.record.clock import HostClock, StepClock
from llmprobe.record.cuda_clock import CudaClock


def step_clock(device: Any, *, in_captures: bool = True) -> StepClock | None:
    """The clock for a ``torch.device`` (or its name): CUDA events on GPUs, the host's clock on processors.

    None for any other device (``xpu``, ``mps``, ``npu``, ...): work goes on there when a call returns, and by
    the host's clock a busy device would seem to wait.

    Args:
        in_captures: as for `CudaClock`.
    """
    kind = getattr(device, "type", None) or str(device).partition(":")[0]
    if kind == "cuda":
        return CudaClock(device, in_captures=in_captures)
    # Weights that are moved in for each use lie on "meta" meanwhile.
    return HostClock() if kind in ("cpu", "meta") else None


def no_clock(device: Any) -> str:
    """Why there is none."""
    return (
        f"steps on {device} are not recorded: when its work begins and ends can only be told on CUDA devices"
    )
