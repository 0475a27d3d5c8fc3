"""Which steps vLLM launches as one CUDA graph: the host cannot leave bubbles inside those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: Values of vLLM's ``cudagraph_mode`` with which a decode step is one graph (vllm/config/compilation.py).
_WHOLE_DECODE = ("FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
#: Share of a window's steps; the few others cannot carry a verdict.
_NEARLY_ALL = 0.95


def launched_whole(flags: Mapping[str, Any], phase: str, tokens: Callable[[], np.ndarray]) -> bool:
    """Whether nearly all of some steps were launched as one graph each, by the engine's configuration.

    Args:
        flags: of the worker, which has settled what its attention backend can do.
        phase: of the steps.
        tokens: gives those of each step, (N,); asked only where the flags leave it open.

    Drafts make decode steps of unequal length, which may not be one graph; of those nothing is said.
    """
    largest = flags.get("max_cudagraph_capture_size")
    if (
        phase != "decode"
        or flags.get("cudagraph_mode") not in _WHOLE_DECODE
        or flags.get("speculative_method") is not None
        or not isinstance(largest, int)
    ):
        return False
    counts = tokens()
    return bool(len(counts) and np.mean(counts <= largest) >= _NEARLY_ALL)
