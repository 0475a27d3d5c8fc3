"""By how much a look at steps made them longer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.lengthened import LEAST_STEPS, lengthened_ratios
from llmprobe.record.layout import STEP, Flag, Phase

MS = 1_000_000


def steps(
    count: int, period_ms: float, tokens: int = 4, phase: Phase = Phase.DECODE, first: int = 1
) -> np.ndarray:
    """That follow each other, each with 1 ms of waiting before it."""
    rows = np.zeros(count, STEP)
    rows["phase"], rows["step"], rows["decode_tokens"] = phase, np.arange(first, first + count), tokens
    rows["e3"] = (np.arange(1, count + 1) * period_ms * MS).astype(np.int64)
    rows["e0"] = rows["e3"] - round((period_ms - 1) * MS)
    return rows


@given(st.integers(LEAST_STEPS + 1, 60), st.floats(5, 50), st.floats(0.5, 3))
def test_the_share_added_is_that_of_the_longer_step(count: int, before: float, factor: float) -> None:
    found = lengthened_ratios(steps(count, before * factor), steps(count, before))
    assert found["decode"] == pytest.approx(max(1 - 1 / factor, 0.0), abs=1e-5)


@pytest.mark.parametrize(
    "inside",
    [
        steps(LEAST_STEPS - 1, 12),
        steps(40, 12, tokens=5),  # another batch
        steps(40, 12, phase=Phase.MIXED),
        steps(0, 12),
    ],
    ids=["too few", "other tokens", "another phase", "none"],
)
def test_steps_that_are_not_alike_are_not_compared(inside: np.ndarray) -> None:
    assert lengthened_ratios(inside, steps(40, 10)) == {}


def test_a_step_whose_predecessor_is_not_known_has_no_time() -> None:
    inside = steps(20, 12)
    inside["flags"][10] |= Flag.RESTARTED
    inside["e3"][10:] += 10**12
    inside["step"][15:] += 7  # some are missing
    inside["e3"][15:] += 10**12
    assert lengthened_ratios(inside, steps(40, 10))["decode"] == pytest.approx(1 / 6)


def test_waiting_for_requests_is_nothing_that_a_recording_added() -> None:
    def now_and_then(count: int, every_ms: int) -> np.ndarray:
        rows = steps(count, every_ms, phase=Phase.PREFILL)
        rows["e0"] = rows["e3"] - 20 * MS
        return rows

    assert lengthened_ratios(now_and_then(10, 500), now_and_then(16, 250)) == {}
    mostly_busy = now_and_then(30, 25)
    mostly_busy["e0"][20:] += 900 * MS
    mostly_busy["e3"][20:] += 900 * MS
    assert lengthened_ratios(mostly_busy, now_and_then(30, 25)) == {"prefill": 0.0}


def test_phases_that_alternate_are_told_apart() -> None:
    def mixed(decode_ms: float, prefill_ms: float) -> np.ndarray:
        rows = steps(80, 1)
        rows["phase"][::4] = Phase.PREFILL
        took = np.where(rows["phase"] == Phase.PREFILL, prefill_ms, decode_ms) * MS
        rows["e3"] = np.cumsum(took.astype(np.int64))
        return rows

    found = lengthened_ratios(mixed(12, 100), mixed(10, 50))
    assert found == pytest.approx({"decode": 1 / 6, "prefill": 0.5})
