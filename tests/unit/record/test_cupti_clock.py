"""CUPTI's times, by whatever clock: where they lie on CLOCK_MONOTONIC."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmprobe.record import cupti_clock
from llmprobe.record.cupti_clock import Reading, monotonic_ns

SECOND = 10**9


@given(
    st.integers(0, 10**15),
    st.integers(0, 10**18),
    st.integers(10**18, 2 * 10**18),
    st.floats(0.2, 4.0),
    st.integers(2_000_000, 2 * 10**9),
    st.floats(-1, 1),
)
def test_times_follow_cuptis_clock_whatever_it_counts(
    monotonic: int, counted: int, real: int, rate: float, length: int, where: float
) -> None:
    """``rate`` ticks a nanosecond: 1 as a rule, that of the processor once torch's profiler has run."""
    first = Reading(100, monotonic, counted, real)
    last = Reading(100, monotonic + length, counted + round(length * rate), real + length)
    at = np.array([counted + round(length * rate * where)], dtype=np.int64)
    (found,) = monotonic_ns(at, first, last)
    assert abs(int(found) - (monotonic + length * where)) <= 10


@given(
    st.integers(3600 * SECOND, 10**16),
    st.floats(1.5, 5.0),
    st.integers(2_000_000, 2 * 10**9),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["own", "real", "monotonic"])), max_size=30),
)
def test_times_of_a_clock_of_the_system_are_known_though_cupti_counts_ticks(
    monotonic: int, rate: float, length: int, stamped: list[tuple[float, str]]
) -> None:
    """As kernels have them once torch's profiler has run twice; each row by the clock that it has."""
    ticks, real = round(monotonic * rate), 18 * 10**17
    first = Reading(100, monotonic, ticks, real)
    last = Reading(100, monotonic + length, ticks + round(length * rate), real + length)
    clocks = {"own": (ticks, rate), "real": (real, 1.0), "monotonic": (monotonic, 1.0)}
    times = [clocks[clock][0] + round(length * where * clocks[clock][1]) for where, clock in stamped]
    found = monotonic_ns(np.array(times, dtype=np.int64), first, last)
    for at, (where, _) in zip(found.tolist(), stamped, strict=True):
        assert abs(at - (monotonic + length * where)) <= 10


@given(st.integers(0, (1 << 63) - 1))
def test_what_is_of_no_clock_is_far_away(stamp: int) -> None:
    first = Reading(100, 7200 * SECOND, 9000 * SECOND, 18 * 10**17)
    last = Reading(100, 7201 * SECOND, 9002 * SECOND, 18 * 10**17 + SECOND)
    assume(min(abs(stamp - clock) for reading in (first, last) for clock in reading[1:]) > 70 * SECOND)
    (found,) = monotonic_ns(np.array([stamp], dtype=np.int64), first, last)
    assert abs(int(found) - first.monotonic) > 30 * SECOND


def test_the_clocks_are_read_at_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.monotonic_ns(), time.time_ns()
    found = cupti_clock.read(lambda: 42)
    after = time.monotonic_ns(), time.time_ns()
    assert found.cupti == 42
    assert before[0] <= found.monotonic <= after[0]
    assert before[1] <= found.real <= after[1]
    assert found.uncertainty >= 0
