"""By how much a recording made steps longer, as accuracy.py says it."""

from __future__ import annotations

import numpy as np
import pytest
from support.step_agreement import _slower

from llmprobe.record.layout import STEP, Phase

PERIOD = 0.006


def steps(begin: float, count: int, grow: float, factor: float = 1.0) -> np.ndarray:
    """Steps of decode whose spans grow by so much a second, with 1 % of noise."""
    rows = np.zeros(count, STEP)
    at = begin + np.arange(count) * PERIOD
    rows["phase"], rows["requests"], rows["time"] = Phase.DECODE, 1, np.round(at * 1e9)
    noise = np.random.default_rng(0).normal(1, 0.01, count)
    rows["e0"] = rows["time"]
    rows["e3"] = rows["e0"] + np.round(0.005 * (1 + grow * at) * factor * noise * 1e9).astype(np.int64)
    return rows


@pytest.mark.parametrize("grow", [0.0, 0.03])
@pytest.mark.parametrize("factor", [1.0, 1.05])
@pytest.mark.parametrize("held_up", [None, 120, 480])
def test_neither_growing_contexts_nor_a_step_that_was_held_up_is_the_recordings(
    grow: float, factor: float, held_up: int | None
) -> None:
    before = steps(1.0, 600, grow)
    if held_up is not None:
        before["e3"][held_up] += 100_000_000
    recorded = steps(5.0, 90, grow, factor)
    found = _slower(np.concatenate([before, recorded]), recorded)
    assert found == pytest.approx(factor - 1, abs=0.005)


def test_too_few_before_say_nothing() -> None:
    recorded = steps(5.0, 90, 0.0)
    assert _slower(np.concatenate([steps(4.2, 100, 0.0), recorded]), recorded) is None
