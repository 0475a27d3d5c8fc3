from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.accounting import COMPONENTS, StepAccounts, account, floors, idle
from llmprobe.compute.facts import ModelFacts
from llmprobe.compute.intervals import OPEN, Intervals, empty, union
from llmprobe.record.layout import STEP, Flag, Phase

from .builders import PEAKS, SECOND, facts, group, steps

ALWAYS = np.array([[0, OPEN]], dtype=np.int64)
MODEL = ModelFacts.from_json(facts(group(bytes_per_token=10, flops_per_pair=100)))


def seconds(*rows: tuple[float, float]) -> Intervals:
    return np.array([[int(a * SECOND), int(b * SECOND)] for a, b in rows], dtype=np.int64).reshape(-1, 2)


def times(*marks: float) -> list[int]:
    return [int(mark * SECOND) for mark in marks]


def accounted(records: np.ndarray, **changes: Any) -> StepAccounts:
    given: dict[str, Any] = {
        "cursor_ns": 0,
        "last_step": 0,
        "pending": ALWAYS,
        "blocked": None,
        "model": None,
        "peaks": None,
        **changes,
    }
    return account(records, **given)


def row(accounts: StepAccounts, index: int = 0) -> dict[str, float]:
    """The components of a step that are not 0."""
    named = zip(COMPONENTS, accounts.components[index].tolist(), strict=True)
    return {name: pytest.approx(value) for name, value in named if value}


def test_idle_time_while_pending_is_a_host_gap_and_otherwise_no_work() -> None:
    found = accounted(steps({"times": times(10, 12, 13, 15)}), pending=seconds((2, 3), (7, 20)))
    assert row(found) == {"no_work": 6, "host_gap": 4, "sample_gap": 1, "unattributed": 4}
    assert (found.gap_s, found.no_work_s, found.sample_gap_s, found.busy_s, found.span_s) == (4, 6, 1, 4, 5)
    assert found.cursor_ns == 15 * SECOND
    assert found.last_step == 1


def test_blocked_time_outranks_pending_time() -> None:
    found = accounted(
        steps({"times": times(10, 12, 12, 15)}), pending=seconds((0, 20)), blocked=seconds((3, 5), (8, 9))
    )
    assert row(found) == {"host_gap": 7, "blocked": 3, "unattributed": 5}


def test_steps_without_stamps_in_their_middle_wait_as_long_as_the_others() -> None:
    bare = {"flags": Flag.NO_PARTS}
    found = accounted(
        steps(
            {"times": times(0, 3, 4, 10)},
            {"times": times(10, 20, 20, 20), **bare},
            {"times": times(20, 23, 26, 30)},
            {"times": times(30, 31, 31, 31), **bare},  # shorter than the others wait
            {"times": times(31, 40, 40, 40), "phase": Phase.PREFILL, **bare},  # none of its phase has them
        )
    )
    assert found.sample_gap_s.tolist() == [1, 2, 3, 1, 0]
    assert found.busy_s.tolist() == [9, 8, 7, 0, 9]


def test_time_begins_with_the_first_step() -> None:
    found = accounted(steps({"times": times(10, 11, 11, 12)}), cursor_ns=None, last_step=None)
    assert row(found) == {"unattributed": 2}


@pytest.mark.parametrize("lost", [{"step": 9}, {"flags": Flag.RESTARTED}])
def test_a_pending_gap_in_which_steps_were_lost_is_not_the_host_s(lost: dict[str, int]) -> None:
    found = accounted(
        steps({"times": times(1, 1, 1, 2)}, {"times": times(5, 5, 5, 6), **lost}), pending=seconds((0, 4))
    )
    assert row(found, 1) == {"unattributed": 2 + 1, "no_work": 1}
    assert found.gap_s.tolist() == [1, 0]


def test_the_first_step_after_a_known_one_reveals_what_was_lost_between_batches() -> None:
    one = accounted(steps({"step": 4, "times": times(1, 1, 1, 2)}), last_step=3)
    assert row(one) == {"host_gap": 1, "unattributed": 1}
    other = accounted(steps({"step": 4, "times": times(1, 1, 1, 2)}), last_step=1)
    assert row(other) == {"unattributed": 2}


def test_an_encoder_before_the_forward_is_busy_time_not_a_gap() -> None:
    found = accounted(steps({"times": times(10, 12, 12, 12), "encode_ns": 3 * SECOND}))
    assert row(found) == {"host_gap": 7, "unattributed": 3 + 2}
    longer_than_the_gap = accounted(steps({"times": times(1, 2, 2, 2), "encode_ns": 3 * SECOND}))
    assert row(longer_than_the_gap) == {"unattributed": 2}


def test_the_floor_is_split_by_the_roof_that_sets_it() -> None:
    # linear: 200 B (0.2 s) against 2·100·8 FLOPs (0.4 s): compute.
    # head: 40 B (0.04 s) against 40 FLOPs (0.01 s): memory.
    # attention: 10·(50 + 8) B (0.58 s) against 100·8 FLOPs (0.2 s): memory.
    step = {"decode_tokens": 8, "sampled": 1, "context_decode": [50], "pairs_decode": [8]}
    found = accounted(steps({"times": times(1, 4, 4, 4), **step}), pending=empty(), model=MODEL, peaks=PEAKS)
    assert row(found) == {
        "no_work": 1,
        "floor_memory": 0.58 + 0.04,
        "floor_compute": 0.4,
        "unattributed": 3 - 1.02,
    }
    assert found.floor_s == pytest.approx([1.02])
    assert not found.above_peak.any()


def test_a_floor_above_the_time_it_took_is_scaled_down_and_said() -> None:
    step = {"decode_tokens": 8, "sampled": 1, "context_decode": [50], "pairs_decode": [8]}
    found = accounted(steps({"times": times(0, 0.5, 0.5, 0.51), **step}), model=MODEL, peaks=PEAKS)
    assert row(found) == {"floor_memory": 0.51 * 0.62 / 1.02, "floor_compute": 0.51 * 0.4 / 1.02}
    assert found.floor_s == pytest.approx([1.02]), "the floor itself stays as modelled"
    assert found.above_peak.all()


def test_a_step_hidden_behind_another_says_nothing_about_the_peak() -> None:
    step = {"decode_tokens": 8, "sampled": 1}
    found = accounted(
        steps({"times": times(0, 9, 9, 9), **step}, {"times": times(1, 8, 8, 8), **step}),
        model=MODEL,
        peaks=PEAKS,
    )
    assert found.span_s.tolist() == [9, 0]
    assert not found.above_peak.any()


@pytest.mark.parametrize("known", [{"model": MODEL}, {"peaks": PEAKS}])
def test_without_model_or_peaks_busy_time_is_unattributed(known: dict[str, Any]) -> None:
    found = accounted(steps({"times": times(0, 2, 2, 2), "decode_tokens": 1}), **known)
    assert row(found) == {"unattributed": 2}


def test_a_draft_model_s_time_is_unattributed() -> None:
    found = accounted(
        steps({"phase": Phase.DRAFT, "times": times(0, 2, 2, 2), "decode_tokens": 1}),
        model=MODEL,
        peaks=PEAKS,
    )
    assert row(found) == {"unattributed": 2}


def test_no_steps_move_no_cursor() -> None:
    found = accounted(steps(), cursor_ns=7, last_step=3)
    assert (len(found), found.cursor_ns, found.last_step) == (0, 7, 3)
    assert found.device_time() == {}
    assert len(StepAccounts.concat([])) == 0


def test_time_by_phase_keeps_idle_time_apart() -> None:
    found = accounted(
        steps({"phase": Phase.PREFILL, "times": times(4, 5, 5, 5)}, {"times": times(5, 6, 7, 8)}),
        pending=seconds((2, 9)),
        blocked=seconds((2, 3)),
    )
    by_phase = found.device_time()
    assert by_phase.keys() == {"prefill", "decode", "none"}
    assert by_phase["none"] == {"blocked": 1, "no_work": 2}
    assert by_phase["prefill"]["host_gap"] == 1
    assert by_phase["decode"]["sample_gap"] == 1
    assert sum(sum(parts.values()) for parts in by_phase.values()) == pytest.approx(8)


def test_rows_are_cut_by_the_time_they_ended() -> None:
    found = accounted(steps(*({"times": times(t, t, t, t + 1)} for t in range(5))))
    assert found.between(2 * SECOND, 4 * SECOND).end_ns.tolist() == [3 * SECOND, 4 * SECOND]


def test_idle_stops_where_work_begins_that_is_still_pending() -> None:
    pending, blocked = seconds((6, 40), (45, 50)), seconds((5, 8), (12, 13))
    components, cursor = idle(2 * SECOND, 30 * SECOND, pending, blocked)
    assert cursor == 8 * SECOND
    assert components[COMPONENTS.index("no_work")] == pytest.approx(3)
    assert components[COMPONENTS.index("blocked")] == pytest.approx(3)
    assert components.sum() == pytest.approx(6)


def test_idle_passes_pending_work_that_ended_without_a_step() -> None:
    pending, blocked = seconds((1, 4), (6, 9), (29, 99)), seconds((5, 7))
    components, cursor = idle(2 * SECOND, 30 * SECOND, pending, blocked)
    assert cursor == 29 * SECOND
    named = zip(COMPONENTS, components.tolist(), strict=True)
    assert {name: value for name, value in named if value} == {"unattributed": 4, "blocked": 2, "no_work": 21}


def test_idle_moves_to_now_when_nothing_is_pending_and_never_back() -> None:
    assert idle(2, 30, empty(), None)[1] == 30
    assert idle(2, 30, np.array([[0, 31]]), None)[1] == 2
    components, cursor = idle(40, 30, empty(), None)
    assert cursor == 40
    assert not components.any()


moment = st.integers(0, 10**12)


@st.composite
def histories(draw: st.DrawFn) -> dict[str, Any]:
    """Records with times in any order, lost steps, and any pending and blocked times."""
    records = np.zeros(draw(st.integers(1, 12)), dtype=STEP)
    for name in ("e0", "e1", "e2", "e3"):
        records[name] = [draw(moment) for _ in records]
    if draw(st.booleans()):  # as a working engine writes them
        marks = np.sort(np.concatenate([records[name] for name in ("e0", "e1", "e2", "e3")]))
        for index, name in enumerate(("e0", "e1", "e2", "e3")):
            records[name] = marks[index::4]
    records["step"] = np.cumsum([draw(st.integers(1, 2)) for _ in records])
    records["phase"] = [draw(st.integers(0, 5)) for _ in records]
    records["flags"] = [draw(st.sampled_from([0, 0, 0, 1, 4])) for _ in records]
    records["decode_tokens"] = [draw(st.integers(0, 10**6)) for _ in records]
    records["sampled"] = records["decode_tokens"] // 2
    records["encode_ns"] = [draw(st.sampled_from([0, 0, 10**9, 2**64 - 1])) for _ in records]
    records["context_decode"][:, 0] = [draw(st.integers(0, 2**32 - 1)) for _ in records]
    times_of = st.lists(st.tuples(moment, st.one_of(moment, st.just(OPEN))), max_size=5)
    return {
        "steps": records,
        "cursor_ns": draw(st.one_of(st.none(), moment)),
        "last_step": draw(st.one_of(st.none(), st.integers(0, 2))),
        "pending": union(np.array(draw(times_of), dtype=np.int64).reshape(-1, 2)),
        "blocked": draw(
            st.one_of(
                st.none(), times_of.map(lambda rows: union(np.array(rows, dtype=np.int64).reshape(-1, 2)))
            )
        ),
        "model": draw(st.sampled_from([None, MODEL])),
        "peaks": draw(st.sampled_from([None, PEAKS])),
    }


def run(history: dict[str, Any], **changes: Any) -> StepAccounts:
    given = {**history, **changes}
    return account(given.pop("steps"), **given)


@given(histories())
def test_components_always_sum_to_wall_time(history: dict[str, Any]) -> None:
    found = run(history)
    start = history["cursor_ns"]
    start = int(history["steps"]["e0"][0]) if start is None else start
    assert (found.components >= 0).all()
    np.testing.assert_allclose(
        found.components.sum(axis=1), np.diff(found.end_ns, prepend=start) / 1e9, rtol=1e-9, atol=1e-9
    )
    floor = found.components[:, 0] + found.components[:, 1]
    assert (floor <= found.busy_s * (1 + 1e-9)).all()
    np.testing.assert_allclose(found.span_s, found.busy_s + found.sample_gap_s, atol=1e-9)


@given(histories(), st.lists(st.integers(0, 12), max_size=3))
def test_batches_may_be_cut_anywhere(history: dict[str, Any], cuts: list[int]) -> None:
    whole = run(history)
    edges = sorted({0, len(history["steps"]), *(min(cut, len(history["steps"])) for cut in cuts)})
    cursor, last, parts = history["cursor_ns"], history["last_step"], []
    for first, end in itertools.pairwise(edges):
        parts.append(run(history, steps=history["steps"][first:end], cursor_ns=cursor, last_step=last))
        cursor, last = parts[-1].cursor_ns, parts[-1].last_step
    joined = StepAccounts.concat(parts)
    for field in dataclasses.fields(StepAccounts):
        np.testing.assert_array_equal(getattr(joined, field.name), getattr(whole, field.name))


@given(histories(), st.integers(0, 10**12))
def test_accounting_for_idle_time_early_changes_no_total(history: dict[str, Any], now: int) -> None:
    """`idle` may run at any time before the next step begins. What was pending then, and is no longer, it
    cannot give to the host."""
    start = history["cursor_ns"] or 0
    history["steps"]["encode_ns"] = 0
    first = int(min(history["steps"]["e0"][0], history["steps"]["e3"][0]))
    whole = run(history, cursor_ns=start)
    early, cursor = idle(start, min(now, first), history["pending"], history["blocked"])
    rest = run(history, cursor_ns=cursor)
    totals = [early + rest.components.sum(axis=0), whole.components.sum(axis=0)]
    for total in totals:
        total[COMPONENTS.index("unattributed")] += total[COMPONENTS.index("host_gap")]
        total[COMPONENTS.index("host_gap")] = 0
    np.testing.assert_allclose(*totals, rtol=1e-9, atol=1e-9)


@given(histories(), st.floats(1, 100))
def test_more_bytes_never_lower_the_floor(history: dict[str, Any], factor: float) -> None:
    heavy = dataclasses.replace(
        MODEL, linear=dataclasses.replace(MODEL.linear, bytes=MODEL.linear.bytes * factor)
    )
    light = run(history, model=MODEL, peaks=PEAKS)
    heavier = run(history, model=heavy, peaks=PEAKS)
    assert (heavier.floor_s >= light.floor_s * (1 - 1e-12)).all()
    assert (heavier.components[:, 0] >= light.components[:, 0] - 1e-9).all()


def test_floors_without_peaks_are_not_known() -> None:
    memory, compute = floors(np.ones((2, 4)), np.ones((2, 4)), None)
    assert not memory.any()
    assert not compute.any()


def test_ten_thousand_steps_sum_to_their_time() -> None:
    records = np.zeros(10_000, dtype=STEP)
    start = np.arange(10_000) * 10_000_000 + 1_000_000
    for name, offset in zip(("e0", "e1", "e2", "e3"), (0, 6e6, 7e6, 8e6), strict=True):
        records[name] = start + int(offset)
    records["step"] = np.arange(10_000) + 1
    records["decode_tokens"] = 1
    pending = seconds(*((t, t + 0.5) for t in range(100)))
    found = accounted(records, pending=pending, model=MODEL, peaks=PEAKS)
    assert found.components.sum() == pytest.approx(found.end_ns[-1] / 1e9)
    assert found.components[:, COMPONENTS.index("sample_gap")].sum() == pytest.approx(10)
    # 2 ms between any two steps, pending for half of them
    assert found.gap_s.sum() + found.no_work_s.sum() == pytest.approx(20, rel=1e-3)
    assert found.gap_s.sum() == pytest.approx(10, rel=1e-2)
