"""The states of a capture: only allowed ways, every state survives a round trip through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from llmprobe.capture.boot import boot_id
from llmprobe.capture.session import FINAL, STATES, Capture, Request, TransitionError, is_id

ORDER = ("pending", "recording", "importing", "analysing", "done")


def new() -> Capture:
    return Capture(
        id="20261123-101500-ab12cd",
        owner="/dev/shm/llmprobe",
        server="vllm-8000",
        group="g",
        request=Request("nsys", 5.0, None),
        times={"pending": 1.0},
    )


class Life(RuleBasedStateMachine):
    """Any sequence of wishes, checked against the one sentence that the design says about states."""

    def __init__(self) -> None:
        super().__init__()
        self.capture = new()
        self.clock = 1.0
        self.entered = ["pending"]

    @rule(state=st.sampled_from(STATES))
    def enter(self, state: str) -> None:
        self.clock += 1
        reason = "because" if state in ("failed", "cancelled") else None
        now = self.capture.state
        allowed = now not in FINAL and (
            state in ("failed", "cancelled") or ORDER.index(state) == ORDER.index(now) + 1
        )
        if allowed:
            self.capture = self.capture.enter(state, self.clock, reason=reason)
            self.entered.append(state)
        else:
            with pytest.raises(TransitionError):
                self.capture.enter(state, self.clock, reason=reason)

    @rule(progress=st.floats(allow_nan=False))
    def progress(self, progress: float) -> None:
        self.capture = self.capture.at(progress)
        assert 0 <= (self.capture.progress or 0) <= 1

    @invariant()
    def times_tell_the_way(self) -> None:
        assert list(self.capture.times) == self.entered
        assert list(self.capture.times.values()) == sorted(self.capture.times.values())

    @invariant()
    def an_end_without_success_has_a_reason(self) -> None:
        assert (self.capture.reason is not None) == (self.capture.state in ("failed", "cancelled"))

    @invariant()
    def it_comes_back_from_json(self) -> None:
        assert Capture.from_json(json.loads(json.dumps(self.capture.to_json()))) == self.capture


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize(("state", "reason"), [("failed", None), ("cancelled", None), ("recording", "why")])
def test_a_reason_belongs_to_an_end_without_success_and_to_nothing_else(
    state: str, reason: str | None
) -> None:
    with pytest.raises(TransitionError, match="reason"):
        new().enter(state, 2.0, reason=reason)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_anything_else_is_no_capture(data: object) -> None:
    with pytest.raises(ValueError, match="not a capture"):
        Capture.from_json(data)


@given(st.sampled_from(sorted(new().to_json())), JSON)
def test_a_damaged_capture_is_none_or_still_sound(key: str, value: object) -> None:
    data = {**new().to_json(), key: value}
    try:
        capture = Capture.from_json(data)
    except ValueError:
        return
    assert is_id(capture.id)
    assert capture.state in STATES


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "../20261123-101500-ab12cd",
        "20261123-101500-ab12cd/",
        "20261123-101500-ab12cd\n",
        "%2e",
    ],
)
def test_nothing_but_an_id_is_one(text: str) -> None:
    assert not is_id(text)
    assert is_id("20261123-101500-ab12cd")


def test_durations_go_by_the_clock_that_nobody_sets() -> None:
    capture = replace(new(), clocks={"pending": 50.0}, boot="this").enter("recording", 9.0, clock=52.0)
    assert capture.since("pending", at=-1e6, clock=60.0) == 10.0
    assert capture.since("recording", at=1e6, clock=60.0) == 8.0
    assert Capture.from_json(json.loads(json.dumps(capture.to_json()))) == capture


def test_moments_of_another_boot_are_forgotten() -> None:
    capture = replace(new(), clocks={"pending": 50.0}, boot="this")
    assert capture.in_boot("this") is capture
    later = capture.in_boot("next")
    assert later.since("pending", at=4.0, clock=0.5) == 3.0
    assert later.since("pending", at=0.0, clock=0.5) == 0.0, "the clock was set back"


def test_a_capture_that_was_kept_without_them_is_read() -> None:
    data = new().to_json()
    del data["clocks"], data["boot"]
    assert Capture.from_json(data) == new()


def test_a_boot_has_a_name(tmp_path: Path) -> None:
    assert boot_id() == boot_id()
    assert boot_id(tmp_path / "none") == ""
