"""What `when` takes, and when the time has come."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.capture.condition import (
    ENGINE_FIGURES,
    PHASE_FIGURES,
    Condition,
    ConditionError,
    Live,
    NextStep,
    Watch,
    parse,
)


def live(gap: float | None = None, waiting: float = 0, **steps: int) -> Live:
    figures = {} if gap is None else {"decode": ({"sync_gap_ratio": gap},)}
    return Live({"rank0": steps}, figures, ({"requests_waiting": waiting},))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", None),
        ("next prefill", NextStep("prefill")),
        ("next decode", NextStep("decode")),
        ("sync_gap_ratio > 0.3 for 10s", Condition("sync_gap_ratio", None, ">", 0.3, 10.0)),
        ("sync_gap_ratio>0.3", Condition("sync_gap_ratio", None, ">", 0.3, 0.0)),
        ("decode.mbu_step <= 0.4 for 500ms", Condition("mbu_step", "decode", "<=", 0.4, 0.5)),
        ("  requests_waiting >= 10 for 2 m ", Condition("requests_waiting", None, ">=", 10.0, 120.0)),
    ],
)
def test_what_it_takes(text: str, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "later",
        "next",
        "next mixed",
        "NOW",
        "sync_gap_ratio",
        "sync_gap_ratio > ",
        "sync_gap_ratio > x",
        "sync_gap_ratio > nan",
        "sync_gap_ratio > -1",
        "sync_gap_ratio > 1e9",
        "sync_gap_ratio == 0.3",
        "sync_gap_ratio > 0.3 for",
        "sync_gap_ratio > 0.3 for 10",
        "sync_gap_ratio > 0.3 for 10h",
        "sync_gap_ratio > 0.3 for 11m",
        "sync_gap_ratio > 0.3; rm -rf /",
        "sync_gap_ratio > 0.3\nnow",
        "$(id) > 0",
        "steps.__class__ > 0",
        "nothing > 0",
        "night.sync_gap_ratio > 0",
        "decode.requests_waiting > 1",
        "sync_gap_ratio > " + "1" * 300,
    ],
)
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConditionError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=250))
def test_any_text_is_understood_or_refused(text: str) -> None:
    with contextlib.suppress(ConditionError):
        parse(text)


@given(
    st.sampled_from(PHASE_FIGURES + ENGINE_FIGURES),
    st.sampled_from([">", ">=", "<", "<="]),
    st.integers(0, 10**6),
    st.integers(1, 600),
)
def test_what_is_written_is_what_is_read(figure: str, op: str, number: int, seconds: int) -> None:
    assert parse(f"{figure} {op} {number} for {seconds}s") == Condition(figure, None, op, number, seconds)


def test_now_has_come_at_once() -> None:
    assert Watch(None).come(Live(), 0.0)


def test_the_next_step_is_one_after_the_first_look() -> None:
    watch = Watch(NextStep("prefill"))
    assert not watch.come(live(prefill=7, decode=1), 0.0)
    assert not watch.come(live(prefill=7, decode=99), 1.0)
    assert watch.come(live(prefill=8, decode=99), 2.0)


def test_a_mixed_step_prefills_too() -> None:
    watch = Watch(NextStep("prefill"))
    assert not watch.come(live(mixed=1), 0.0)
    assert watch.come(live(mixed=2), 1.0)


def test_the_next_step_may_be_one_of_any_rank() -> None:
    def both(first: int, second: int) -> Live:
        return Live({"engine0": {"prefill": first}, "engine1": {"prefill": second}})

    watch = Watch(NextStep("prefill"))
    assert not watch.come(both(1000, 900), 0.0)
    assert not watch.come(both(1000, 900), 1.0)
    assert watch.come(both(1000, 901), 2.0)


def test_steps_that_were_there_when_it_came_into_sight_are_not_the_next() -> None:
    watch = Watch(NextStep("prefill"))
    assert not watch.come(None, 0.0)
    assert not watch.come(live(prefill=1000), 1.0)
    assert not watch.come(None, 2.0)
    assert not watch.come(live(prefill=1000), 3.0)
    # A process that was not seen before: when it took its steps is not known.
    assert not watch.come(Live({"rank0": {"prefill": 1000}, "rank1": {"prefill": 5}}), 4.0)
    assert watch.come(Live({"rank0": {"prefill": 1000}, "rank1": {"prefill": 6}}), 5.0)


def test_now_does_not_wait_for_a_server_out_of_sight() -> None:
    assert Watch(None).come(None, 0.0)


def test_a_server_out_of_sight_breaks_a_condition() -> None:
    watch = Watch(parse("sync_gap_ratio > 0.3 for 10s"))
    assert not watch.come(live(0.4), 0.0)
    assert not watch.come(None, 9.0)
    assert not watch.come(live(0.4), 11.0)
    assert watch.come(live(0.4), 21.0)


def test_steps_are_counted_on_the_rank_that_took_most() -> None:
    before = Live({"a": {"decode": 10, "prefill": 1}, "b": {"decode": 50}})
    after = Live({"a": {"decode": 13, "prefill": 2}, "b": {"decode": 52}, "c": {"decode": 99}})
    assert after.steps_since(before) == 4
    assert after.steps_since(before, ("prefill",)) == 1
    assert after.steps_since(Live()) == 0


def test_a_condition_must_hold_without_a_break() -> None:
    watch = Watch(parse("sync_gap_ratio > 0.3 for 10s"))
    assert not watch.come(live(0.4), 0.0)
    assert not watch.come(live(0.4), 9.0)
    assert not watch.come(live(0.2), 9.5)
    assert not watch.come(live(0.4), 10.0)
    assert not watch.come(live(0.4), 19.0)
    assert watch.come(live(0.4), 20.0)


def test_a_figure_that_is_not_known_holds_nothing() -> None:
    watch = Watch(parse("sync_gap_ratio < 2"))
    assert not watch.come(live(), 0.0)
    assert not watch.come(Live(), 1.0)
    assert watch.come(live(0.1), 2.0)


def test_a_phase_narrows_it() -> None:
    there = live(0.9)
    assert Watch(parse("decode.sync_gap_ratio > 0.5")).come(there, 0.0)
    assert not Watch(parse("prefill.sync_gap_ratio > 0.5")).come(there, 0.0)


def test_the_most_crowded_engine_counts() -> None:
    there = Live({}, {}, ({"requests_waiting": 1.0}, {"requests_waiting": 12.0}))
    assert Watch(parse("requests_waiting >= 12")).come(there, 0.0)
    assert not Watch(parse("requests_waiting < 5")).come(there, 0.0)


def test_every_figure_is_one_of_the_views() -> None:
    import dataclasses

    from llmprobe.collect.views import EngineView
    from llmprobe.compute.figures import PhaseFigures

    assert set(PHASE_FIGURES) <= {field.name for field in dataclasses.fields(PhaseFigures)}
    assert set(ENGINE_FIGURES) <= {field.name for field in dataclasses.fields(EngineView)}


def test_a_figure_that_was_never_known_is_named() -> None:
    watch = Watch(parse("decode.mbu_step > 0.9"))
    assert not watch.come(None, 0.0)
    assert not watch.come(Live(figures={"decode": ({"sync_gap_ratio": 0.1},)}), 1.0)
    assert watch.never_known == "mbu_step"
    assert not watch.come(Live(figures={"decode": ({"mbu_step": 0.1},)}), 2.0)
    assert watch.never_known is None
    assert Watch(parse("next decode")).never_known is None
