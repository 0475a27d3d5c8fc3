"""Pressure, and when it takes the headline."""

from __future__ import annotations

from typing import Any

import pytest

from llmprobe.compute.headline import headline
from llmprobe.compute.pressure import EngineLoad, Pressure, pressures, worst
from llmprobe.compute.thresholds import Thresholds

from .verdicts import verdict

LIMITS = Thresholds()


def load(**changes: Any) -> EngineLoad:
    values: dict[str, Any] = {
        "engine": 0,
        "running": 8,
        "waiting": 0,
        "kv_usage": 0.3,
        "preemptions": 0,
        "requests": 100,
        "queue_seconds": 0.001,
        "first_token_seconds": 0.1,
        "request_seconds": 2.0,
        "full_steps_ratio": 0.1,
        "max_num_seqs": 16,
    }
    return EngineLoad(**{**values, **changes})


def active(**changes: Any) -> set[str]:
    return {found.kind for found in pressures(load(**changes), LIMITS) if found.active}


def test_an_unhurried_engine_is_under_no_pressure() -> None:
    assert active() == set()
    assert {found.kind for found in pressures(load(), LIMITS)} == {
        "kv_cache", "queue", "preemption", "token_budget", "sequence_limit"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"kv_usage": 0.98}, set()),  # full, yet nobody waits
        ({"kv_usage": 0.98, "waiting": 5}, {"kv_cache"}),
        ({"queue_seconds": 0.03}, {"queue"}),
        ({"preemptions": 2}, {"preemption"}),
        ({"full_steps_ratio": 0.9, "waiting": 1}, {"token_budget"}),
        ({"running": 16, "waiting": 1}, {"sequence_limit"}),
        ({"running": 16}, set()),
    ],
)
def test_each_kind_has_its_threshold(changes: dict[str, Any], kinds: set[str]) -> None:
    assert active(**changes) == kinds


def test_what_is_not_known_is_missing() -> None:
    nothing = load(
        running=None, waiting=None, kv_usage=None, requests=0, queue_seconds=None, full_steps_ratio=None
    )
    assert pressures(nothing, LIMITS) == ()


def test_the_engine_under_most_pressure_speaks_for_the_server() -> None:
    both = [*pressures(load(engine=0), LIMITS), *pressures(load(engine=1, queue_seconds=0.09), LIMITS)]
    assert worst(both)["queue"].engine == 1


BUSY = verdict(
    "memory_bound",
    reason="MBU 0.72",
    healthy=True,
    attained_ratio=0.88,
    headroom_seconds=0.001,
    steps_per_second=100.0,
    share_ratio=1.0,
)


def said(engine: EngineLoad, *verdicts: Any) -> str:
    found = worst(pressures(engine, LIMITS))
    return headline({item.phase: item for item in verdicts}, found, {engine.engine: engine})


def test_queueing_that_costs_most_leads_and_says_why() -> None:
    text = said(load(queue_seconds=1.42, first_token_seconds=2.0, kv_usage=0.98, waiting=30), BUSY)
    assert text.startswith("SLOW: queueing is 71% of TTFT (KV cache 98% full with 30 requests waiting).")
    assert "Decode healthy: 0.88 of attainable" in text


def test_queueing_that_costs_less_than_the_device_does_not_lead() -> None:
    slow = verdict(
        "sync_bound", "host_between_steps", headroom_seconds=0.009, steps_per_second=100.0, share_ratio=1.0
    )
    text = said(load(queue_seconds=0.1, first_token_seconds=0.15, request_seconds=30.0), slow)
    assert text.startswith("Decode sync-bound, confidence 0.80")


def test_high_pressure_leads_where_no_floor_is_known() -> None:
    text = said(
        load(queue_seconds=0.1, first_token_seconds=0.15), verdict("unknown", "no_peaks", share_ratio=0.9)
    )
    assert text.startswith("SLOW: queueing is 67% of TTFT.")


def test_slight_pressure_does_not_lead() -> None:
    assert not said(load(queue_seconds=0.03), BUSY).startswith("SLOW")


def test_an_idle_server_is_said_to_be_idle() -> None:
    assert said(load(), verdict("idle", share_ratio=0.01)).startswith("IDLE")
    assert said(load(running=0, waiting=0)) == "IDLE: no steps yet."


def test_requests_without_a_step_are_no_idleness() -> None:
    text = said(load(running=2, waiting=1, kv_usage=0.1))
    assert text == "CAN'T TELL: no step has ended yet; requests: 2 running, 1 waiting."


def test_what_cannot_be_told_says_why() -> None:
    text = said(load(), verdict("unknown", "no_peaks", reason="no peak rates", share_ratio=0.9))
    assert text == "Decode: can't tell: no peak rates."


def test_the_phase_that_takes_most_time_comes_first() -> None:
    text = said(
        load(),
        verdict("memory_bound", share_ratio=0.2),
        verdict("compute_bound", phase="prefill", share_ratio=0.7),
    )
    assert text.startswith("Prefill compute-bound")
    assert "decode memory-bound" in text


def test_texts_are_one_line() -> None:
    for found in pressures(load(waiting=3), LIMITS):
        assert isinstance(found, Pressure)
        assert "\n" not in found.text
