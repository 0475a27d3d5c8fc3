"""Which decode steps are one CUDA graph, by vLLM's flags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmprobe.compute.graphs import launched_whole

FLAGS: dict[str, Any] = {"cudagraph_mode": "FULL_AND_PIECEWISE", "max_cudagraph_capture_size": 512}


@pytest.mark.parametrize(
    ("changed", "phase", "tokens", "whole"),
    [
        ({}, "decode", [1, 16, 512], True),
        ({}, "decode", [1, 513, 600], False),
        ({}, "decode", [600] + [4] * 99, True),
        ({}, "prefill", [1, 16], False),
        ({}, "mixed", [16], False),
        ({}, "decode", [], False),
        ({"cudagraph_mode": "FULL_DECODE_ONLY"}, "decode", [1], True),
        ({"cudagraph_mode": "PIECEWISE"}, "decode", [1], False),
        ({"cudagraph_mode": "NONE"}, "decode", [1], False),
        ({"cudagraph_mode": None}, "decode", [1], False),
        ({"max_cudagraph_capture_size": None}, "decode", [1], False),
        ({"speculative_method": "ngram"}, "decode", [5], False),
    ],
)
def test_launched_whole(changed: dict[str, Any], phase: str, tokens: list[int], whole: bool) -> None:
    assert launched_whole({**FLAGS, **changed}, phase, lambda: np.array(tokens)) is whole
