"""A server that stopped when it was recorded is told from one that gets on, or has nothing to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from llmprobe.capture.condition import Live
from llmprobe.capture.stopped import stopped, wait_for_signs
from llmprobe.compute.stall import Bound, Stall, StepSeen

SECOND = 1_000_000_000
BEGUN = 100 * SECOND
STALL = Stall("step", BEGUN, 12.0, Bound(10.0, "at least 10 s"), 7, "decode", 16, ())


def hung(**changed: object) -> Live:
    return Live(working=True, stalls=((1, dataclasses.replace(STALL, **changed)),))  # type: ignore[arg-type]


def test_who_hangs_and_in_what_is_said_with_what_is_known() -> None:
    hangs = "rank 1 has been in step 7 (decode, 16 tokens) for 12 s"
    said = f"Since it was recorded the server has not got on: {hangs}"
    assert stopped(hung(), BEGUN, "") == said
    assert stopped(hung(), BEGUN, "Start it anew") == f"{said}. Start it anew"
    assert "engine 3, rank 1 has been in step 7 for" in (stopped(hung(engine=3, phase=None), BEGUN, "") or "")
    between = stopped(hung(where="between_steps"), BEGUN, "") or ""
    assert "rank 1 has begun no step for 12 s, with requests waiting" in between


def test_nobody_who_gets_on_or_is_gone_is_said_to_hang() -> None:
    assert stopped(None, BEGUN, "hint") is None
    assert stopped(Live(working=True), BEGUN, "hint") is None


@pytest.mark.parametrize(
    ("before", "step_seconds", "counts"), [(0.5, 0.01, True), (3.0, 0.01, False), (3.0, 4.0, True)]
)
def test_the_step_that_hangs_may_have_begun_just_before_the_recording(
    before: float, step_seconds: float, counts: bool
) -> None:
    last = (StepSeen(6, "decode", 16, step_seconds),)
    live = hung(since_ns=BEGUN - round(before * SECOND), last_steps=last)
    assert (stopped(live, BEGUN, "") is not None) == counts


def looks(*seen: Live | None) -> tuple[Callable[[], Live | None], list[float]]:
    """Shows these one after the other, and then the last; and the pauses that were made."""
    left = list(seen)
    return lambda: left.pop(0) if len(left) > 1 else left[0], []


def steps(*counts: int, working: bool = True) -> Live:
    return Live({f"rank{rank}": {"decode": count} for rank, count in enumerate(counts)}, working=working)


@pytest.mark.parametrize(
    ("seen", "pauses"),
    [
        ((steps(1, 1), steps(2, 1), steps(2, 2)), 2),  # the last rank counts
        ((steps(1, working=False),), 0),
        ((steps(1), steps(1, working=False)), 1),
        ((steps(1), steps(1), hung()), 2),
        ((steps(1), None), 1),
        ((None,), 0),
    ],
)
def test_it_is_waited_until_it_can_be_told(seen: tuple[Live | None, ...], pauses: int) -> None:
    look, made = looks(*seen)

    def pause(seconds: float) -> bool:
        made.append(seconds)
        assert len(made) <= pauses
        return False

    wait_for_signs(look, pause)
    assert len(made) == pauses


def test_an_agent_that_leaves_waits_no_longer() -> None:
    wait_for_signs(lambda: steps(1), lambda seconds: True)
    wait_for_signs(lambda: steps(1), lambda seconds: False, seconds=0.0)
