from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.accounting import StepAccounts, account
from llmprobe.compute.facts import ModelFacts
from llmprobe.compute.figures import summarise
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.intervals import OPEN
from llmprobe.record.layout import Flag, Phase

from .builders import PEAKS, SECOND, facts, group, steps

MODEL = ModelFacts.from_json(facts(group(bytes_per_token=10, flops_per_pair=100)))
ALWAYS = np.array([[0, OPEN]], dtype=np.int64)


def run(*rows: dict[str, Any], model: ModelFacts | None = MODEL, peaks: Peaks | None = PEAKS) -> StepAccounts:
    return account(
        steps(*rows), cursor_ns=0, last_step=0, pending=ALWAYS, blocked=None, model=model, peaks=peaks
    )


def marks(*seconds: float) -> list[int]:
    return [int(second * SECOND) for second in seconds]


DECODE = {"requests": 1, "decode_tokens": 1, "sampled": 1, "context_decode": [50], "pairs_decode": [50]}
# 200 + 40 + 10·(50 + 1) bytes; 2·100 + 2·20 + 100·50 FLOPs
BYTES, FLOPS = 750, 5240


def test_a_window_by_hand() -> None:
    accounts = run(
        {"times": marks(0.5, 2, 2.5, 3), **DECODE},
        {"times": marks(4, 6, 7, 8), **DECODE},
    )
    found = summarise(accounts, since_ns=0, now_ns=10 * SECOND, peaks=PEAKS)
    assert found.keys() == {"decode"}
    decode = found["decode"]
    assert decode.steps == 2
    assert decode.decode_tokens == 2
    assert decode.span_seconds == pytest.approx(6.5)
    assert decode.gap_seconds == pytest.approx(1.5)
    assert decode.seconds == pytest.approx(8)
    assert decode.steps_per_second == pytest.approx(0.2)
    assert decode.step_seconds_p50 == pytest.approx(3.25)
    assert decode.step_seconds_p99 == pytest.approx(4, rel=0.01)
    assert decode.mbu_step == pytest.approx(2 * BYTES / 8 / 1e3)
    assert decode.mbu_busy == pytest.approx(2 * BYTES / 5 / 1e3)
    assert decode.mfu_step == pytest.approx(2 * FLOPS / 8 / 4e3)
    assert decode.mfu_busy == pytest.approx(2 * FLOPS / 5 / 4e3)
    assert decode.sync_gap_ratio == pytest.approx((1.5 + 1.5) / 8)
    assert decode.sync_gap_is_lower_bound
    assert decode.intensity == pytest.approx(FLOPS / BYTES)
    # linear and head: memory, 0.24 s; attention: 5000 FLOPs, 1.25 s
    assert decode.floor_seconds == pytest.approx(0.24 + 1.25)
    assert decode.components["host_gap"] == pytest.approx(1.5)
    assert sum(decode.components.values()) == pytest.approx(8)


def test_only_steps_that_ended_in_the_window_count() -> None:
    accounts = run(*({"times": marks(t, t + 1, t + 1, t + 1), **DECODE} for t in range(5)))
    found = summarise(accounts, since_ns=2 * SECOND, now_ns=4 * SECOND, peaks=PEAKS)
    assert found["decode"].steps == 2
    assert found["decode"].steps_per_second == 1
    assert summarise(accounts, since_ns=8 * SECOND, now_ns=9 * SECOND, peaks=PEAKS) == {}


def test_phases_are_told_apart_and_absent_without_steps() -> None:
    accounts = run(
        {"phase": Phase.PREFILL, "prompt_tokens": 7, "times": marks(0, 1, 1, 1)},
        {"phase": Phase.DRAFT, "decode_tokens": 3, "times": marks(1, 2, 2, 2)},
    )
    found = summarise(accounts, since_ns=0, now_ns=10 * SECOND, peaks=PEAKS)
    assert found.keys() == {"prefill", "draft"}
    assert found["prefill"].prompt_tokens == 7
    draft = found["draft"]
    assert draft.mbu_step is draft.mfu_busy is draft.floor_seconds is draft.intensity is None


def test_without_peaks_there_is_intensity_but_no_utilisation() -> None:
    accounts = run({"times": marks(0, 1, 1, 1), **DECODE}, peaks=None)
    decode = summarise(accounts, since_ns=0, now_ns=SECOND, peaks=None)["decode"]
    assert decode.intensity is not None
    assert decode.mbu_step is decode.mbu_busy is decode.mfu_step is decode.mfu_busy is None
    assert decode.floor_seconds is None


def test_without_a_model_nothing_modelled_is_claimed() -> None:
    accounts = run({"times": marks(0, 1, 1, 1), **DECODE}, model=None)
    decode = summarise(accounts, since_ns=0, now_ns=SECOND, peaks=PEAKS)["decode"]
    assert decode.intensity is decode.mbu_step is decode.mfu_step is decode.floor_seconds is None


def test_steps_from_before_the_model_was_known_do_not_dilute_its_figures() -> None:
    unknown = run({"times": marks(0, 1, 1, 1), **DECODE}, model=None)
    later = {"step": 2, "times": marks(1, 2, 2, 2), **DECODE}
    known = account(
        steps(later),
        cursor_ns=SECOND,
        last_step=1,
        pending=ALWAYS,
        blocked=None,
        model=MODEL,
        peaks=PEAKS,
    )
    both = StepAccounts.concat([unknown, known])
    decode = summarise(both, since_ns=0, now_ns=2 * SECOND, peaks=PEAKS)["decode"]
    assert decode.steps == 2
    assert decode.mbu_step == pytest.approx(BYTES / 1 / 1e3)


def test_an_empty_step_costs_time_but_is_no_step() -> None:
    flush = {"flags": Flag.EMPTY, "times": marks(1, 2, 2, 2)}
    found = summarise(
        run({"times": marks(0, 1, 1, 1), **DECODE}, flush), since_ns=0, now_ns=2 * SECOND, peaks=PEAKS
    )
    assert found["decode"].steps == 1
    assert found["decode"].seconds == pytest.approx(2)
    assert found["decode"].mbu_step == pytest.approx(BYTES / 1 / 1e3)
    assert summarise(run(flush), since_ns=0, now_ns=2 * SECOND, peaks=PEAKS) == {}


def test_a_gap_with_lost_steps_in_it_is_neither_stall_nor_pending_time() -> None:
    accounts = run({"times": marks(0, 1, 1, 1), **DECODE}, {"step": 9, "times": marks(5, 6, 6, 6), **DECODE})
    decode = summarise(accounts, since_ns=0, now_ns=9 * SECOND, peaks=PEAKS)["decode"]
    assert decode.sync_gap_ratio == 0
    assert decode.seconds == pytest.approx(2)


span = st.integers(1, 10 * SECOND)


@given(st.lists(st.tuples(span, span, span, span), min_size=1, max_size=20))
def test_ratios_stay_within_bounds_when_no_step_beats_its_floor(rows: list[tuple[int, ...]]) -> None:
    edges = np.cumsum(np.array(rows).ravel()).reshape(-1, 4)
    accounts = run(*({"times": row.tolist(), **DECODE} for row in edges))
    decode = summarise(accounts, since_ns=0, now_ns=int(edges[-1, -1]), peaks=PEAKS)["decode"]
    assert decode.sync_gap_ratio is not None
    assert 0 <= decode.sync_gap_ratio <= 1
    assert decode.mbu_step is not None
    assert decode.mbu_busy is not None
    assert 0 < decode.mbu_step <= decode.mbu_busy
    if not accounts.above_peak.any():
        assert decode.mbu_busy <= 1
        assert decode.mfu_busy is not None
        assert decode.mfu_busy <= 1
    assert decode.step_seconds_p50 <= decode.step_seconds_p99
    assert sum(decode.components.values()) == pytest.approx(decode.seconds)
