from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.compute import stall
from llmprobe.compute.stall import Stall, StepSeen, bound, find
from llmprobe.record.layout import UNKNOWN_PHASE, Phase

from .builders import SECOND, steps


def history(count: int = 50, seconds: float = 0.01, tokens: int = 8, **changes: Any) -> np.ndarray:
    """Steps one after the other from time 0 on."""
    length = round(seconds * SECOND)
    return steps(
        *(
            {
                "time": number * length,
                "times": (
                    number * length,
                    (number + 1) * length,
                    (number + 1) * length,
                    (number + 1) * length,
                ),
                "decode_tokens": tokens,
                **changes,
            }
            for number in range(count)
        )
    )


def look(seconds: float, recent: np.ndarray, **changes: Any) -> Stall | None:
    """At an engine that began a step when the last of ``recent`` ended, ``seconds`` ago."""
    at = int(recent["e3"][-1]) if len(recent) else 0
    values: dict[str, Any] = {
        "begun": len(recent) + 1,
        "begun_ns": at,
        "ended": len(recent),
        "phase": int(Phase.DECODE),
        "tokens": 8,
        "recent": recent,
        "now_ns": at + round(seconds * SECOND),
        "pending_since_ns": 0,
        "pending_known": True,
    }
    return find(**{**values, **changes})


def test_a_step_that_runs_past_ten_seconds_is_stalled_and_says_what_the_engine_did_last() -> None:
    recent = history()
    assert look(9.99, recent) is None
    found = look(10.01, recent, tokens=3, phase=int(Phase.MIXED))
    assert found is not None
    assert (found.where, found.step, found.phase, found.tokens) == ("step", 51, "mixed", 3)
    assert found.seconds == pytest.approx(10.01)
    assert found.since_ns == int(recent["e3"][-1])
    assert found.bound.seconds == 10.0
    assert "p99 of 50 recent steps" in found.bound.reason
    assert found.last_steps[-1] == StepSeen(50, "decode", 8, pytest.approx(0.01))
    assert len(found.last_steps) == 5


def test_a_running_step_that_nobody_read_is_stalled_all_the_same() -> None:
    """An engine that hangs with the interpreter lock never tells what its step works on."""
    found = look(10.01, history(), phase=UNKNOWN_PHASE)
    assert found is not None
    assert found.phase is None


def test_an_engine_with_slow_steps_is_given_ten_times_as_long_as_they_take() -> None:
    recent = history(seconds=4.0)
    assert look(39, recent) is None
    assert look(41, recent) is not None


def test_a_step_with_more_tokens_than_any_before_is_given_longer() -> None:
    recent = history(seconds=0.5, tokens=16)
    assert look(30, recent, tokens=16) is not None
    assert look(30, recent, tokens=16 * 64) is None
    assert look(400, recent, tokens=16 * 64) is not None


def test_first_steps_may_take_two_minutes() -> None:
    recent = history(count=3)
    assert look(100, recent) is None
    assert look(121, recent) is not None


def test_nothing_to_do_is_no_stall() -> None:
    assert look(3600, history(), pending_since_ns=None) is None


def test_where_nobody_tells_of_requests_a_running_step_is_work() -> None:
    assert look(11, history(), pending_since_ns=None, pending_known=False) is not None


def test_an_engine_that_does_not_begin_a_step_while_requests_wait_is_stalled_too() -> None:
    recent = history()
    between = {"begun": len(recent), "ended": len(recent)}
    assert look(29, recent, **between) is None
    found = look(31, recent, **between)
    assert found is not None
    assert (found.where, found.step, found.phase, found.tokens) == ("between_steps", 50, None, None)
    assert look(3600, recent, pending_since_ns=None, pending_known=False, **between) is None


def test_waiting_between_steps_counts_from_when_work_came() -> None:
    recent = history()
    came = int(recent["e3"][-1]) + 100 * SECOND
    between = {"begun": len(recent), "ended": len(recent), "pending_since_ns": came}
    assert look(120, recent, **between) is None
    assert look(131, recent, **between) is not None


def test_before_its_first_step_an_engine_may_take_its_time() -> None:
    assert look(3600, steps(), begun=0, ended=0) is None


def test_flush_steps_tell_nothing_of_how_long_a_step_takes() -> None:
    from llmprobe.record.layout import Flag

    assert bound(history(flags=int(Flag.EMPTY)), 1).seconds == stall.FIRST_SECONDS


@settings(max_examples=40, deadline=None)
@given(
    seconds=st.floats(1e-5, 1e4),
    count=st.integers(0, 60),
    tokens=st.integers(0, 2**20),
    usual=st.integers(0, 2**20),
)
def test_the_bound_is_never_below_ten_seconds_nor_above_ten_minutes(
    seconds: float, count: int, tokens: int, usual: int
) -> None:
    allowed = bound(history(count, seconds, usual), tokens)
    assert stall.LEAST_SECONDS <= allowed.seconds <= stall.MOST_SECONDS
    assert allowed.reason


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-4, 50.0), min_size=20, max_size=60))
def test_no_step_within_the_usual_range_is_called_stalled(lengths: list[float]) -> None:
    ends = np.cumsum(np.array(lengths) * SECOND).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1]])
    recent = steps(
        *(
            {"time": int(begin), "times": (int(begin), int(end), int(end), int(end)), "decode_tokens": 1}
            for begin, end in zip(begins, ends, strict=True)
        )
    )
    assert look(max(lengths) * 0.99, recent, tokens=1) is None
