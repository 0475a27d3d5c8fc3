"""When a load is taken for steady."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from support import counted

from llmprobe.record.layout import STEP, Phase


def decode_steps(requests: int, time_ns: int) -> np.ndarray:
    steps = np.zeros(20, dtype=STEP)
    steps["phase"], steps["requests"], steps["time"] = Phase.DECODE, requests, time_ns
    return steps


class Log:
    """Gives one more batch of steps at each look."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self._batches, self.looks = batches, 0

    def steps(self) -> np.ndarray:
        self.looks += 1
        return np.concatenate(self._batches[: self.looks])


class Load:
    def wait(self, seconds: float) -> None:
        pass


def waited(batches: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many looks it took."""
    log: Any = Log(batches)
    monkeypatch.setattr(counted, "_STEADY_SECONDS", 5.0)
    counted.wait_steady(Load(), log, 32)
    return int(log.looks)


def test_steps_of_the_load_before_are_not_taken_for_those_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, after = time.monotonic_ns() - 1, time.monotonic_ns() + 10**12
    late = decode_steps(32, before)  # read only once the next load has begun
    assert waited([late, late, decode_steps(7, after), decode_steps(32, after)], monkeypatch) == 4


def test_a_load_that_never_gets_steady_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "_STEADY_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match="no steady decode of 32 requests"):
        counted.wait_steady(Load(), Log([decode_steps(32, 0)]), 32)
