"""Pressure, and when it takes the headline."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import pytest

from llmprobe.compute.headline import headline, leading, stalled
from llmprobe.compute.host import ThreadLoad
from llmprobe.compute.pressure import EngineLoad, Pressure, pressures, worst
from llmprobe.compute.stall import Bound, Stall
from llmprobe.compute.thresholds import Thresholds

from .verdicts import verdict

LIMITS = Thresholds()


def thread(cpu: float, waited: float | None = 0.0) -> ThreadLoad:
    return ThreadLoad("vllm", cpu, waited)


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
        "starved_seconds": 0.0,
        "front_end": thread(0.2),
    }
    return EngineLoad(**{**values, **changes})


def active(**changes: Any) -> set[str]:
    return {found.kind for found in pressures(load(**changes), LIMITS) if found.active}


def test_an_unhurried_engine_is_under_no_pressure() -> None:
    assert active() == set()
    assert {found.kind for found in pressures(load(), LIMITS)} == {
        "kv_cache", "queue", "preemption", "token_budget", "sequence_limit", "front_end"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"kv_usage": 0.98}, set()),  # full, yet nobody waits
        ({"kv_usage": 0.98, "waiting": 5}, {"kv_cache"}),
        ({"kv_usage": 0.87, "kv_peak": 0.97, "waiting": 5}, {"kv_cache"}),  # it has just made room
        ({"kv_usage": 0.87, "kv_peak": 0.97}, set()),
        ({"kv_usage": 0.87, "kv_peak": 0.89, "waiting": 5}, set()),
        ({"queue_seconds": 0.3, "first_token_seconds": 1.0}, {"queue"}),
        ({"queue_seconds": 0.1, "first_token_seconds": 1.0}, set()),
        ({"queue_seconds": 0.007, "first_token_seconds": 0.0127}, set()),  # the rest of the running step
        ({"queue_seconds": 0.049, "first_token_seconds": 0.05}, set()),
        ({"queue_seconds": 0.051, "first_token_seconds": 0.06}, {"queue"}),
        ({"waiting": 3, "starved_seconds": 9.0}, set()),
        ({"waiting": 3, "starved_seconds": 11.0}, {"queue"}),
        ({"preemptions": 2}, {"preemption"}),
        ({"full_steps_ratio": 0.9, "waiting": 1}, {"token_budget"}),
        ({"running": 16, "waiting": 1}, {"sequence_limit"}),
        ({"running": 16}, set()),
        ({"front_end": thread(0.94)}, set()),
        ({"front_end": thread(0.96)}, {"front_end"}),
        ({"front_end": thread(0.96, None)}, {"front_end"}),
        ({"front_end": thread(0.6, 0.37)}, {"front_end"}),  # it wanted a core all the time
        ({"front_end": thread(0.3, 0.2)}, set()),
        ({"front_end": thread(1.0), "running": 0}, set()),  # nobody waits for a token
        ({"front_end": thread(1.0), "running": 0, "waiting": 1}, {"front_end"}),
        ({"output_lag_seconds": 0.09}, set()),
        ({"output_lag_seconds": 0.11}, {"front_end"}),
        ({"output_lag_seconds": 0.11, "front_end": None}, {"front_end"}),
        ({"output_lag_seconds": 0.11, "running": 0}, set()),
        ({"output_lag_seconds": 0.01, "front_end": thread(0.96)}, {"front_end"}),
    ],
)
def test_each_kind_has_its_threshold(changes: dict[str, Any], kinds: set[str]) -> None:
    assert active(**changes) == kinds


@pytest.mark.parametrize("lag", [None, 0.01, 3.0])
def test_each_names_the_threshold_that_its_value_is_held_against(lag: float | None) -> None:
    found = {item.kind: item for item in pressures(load(output_lag_seconds=lag), LIMITS)}
    assert found.pop("sequence_limit").quantity == "running_ratio"  # the engine's own limit
    assert {kind: getattr(LIMITS, item.quantity) for kind, item in found.items()} == {
        kind: item.threshold for kind, item in found.items()
    }
    late = lag is not None and lag > 0.1
    assert found["front_end"].quantity == ("output_lag_seconds" if late else "front_end_busy_ratio")


def test_what_is_not_known_is_missing() -> None:
    nothing = load(
        running=None, waiting=None, kv_usage=None, requests=0, queue_seconds=None, full_steps_ratio=None,
        starved_seconds=None, front_end=thread(1.0),
    )  # fmt: skip
    assert pressures(nothing, LIMITS) == ()
    assert "front_end" not in {found.kind for found in pressures(load(front_end=None), LIMITS)}


def test_the_least_wait_that_counts_can_be_set() -> None:
    lone = load(queue_seconds=0.007, first_token_seconds=0.0127)
    (found,) = (
        item
        for item in pressures(lone, Thresholds.from_mapping({"queue_wait_seconds": 0.005}))
        if item.kind == "queue"
    )
    assert found.active
    assert found.high
    assert found.text == "queueing is 55% of TTFT, 7 ms"


def test_those_that_wait_count_though_nobody_had_a_first_token_lately() -> None:
    """As where clients give up and others come: none of them ever tells how long it was queued."""
    starved = load(waiting=40, queue_seconds=None, first_token_seconds=None, starved_seconds=31.0)
    (found,) = (item for item in pressures(starved, LIMITS) if item.kind == "queue")
    assert (found.value, found.high) == (1.0, True)
    assert found.text == "40 requests wait and none had its first token for 31 s"
    text = said(starved, BUSY)
    assert text.startswith("SLOW: 40 requests wait and none had its first token for 31 s. Decode healthy")


def test_first_tokens_of_those_before_do_not_hide_that_others_starve() -> None:
    """A burst: as many as may run had their first token at once, the others still have none."""
    text = said(load(waiting=24, running=16, starved_seconds=12.0), BUSY)
    assert text.startswith("SLOW: 24 requests wait and none had its first token for 12 s.")
    assert said(load(waiting=1, starved_seconds=12.0), BUSY).startswith("SLOW: 1 request waits and none")


def test_the_engine_under_most_pressure_speaks_for_the_server() -> None:
    both = [*pressures(load(engine=0), LIMITS), *pressures(load(engine=1, queue_seconds=0.09), LIMITS)]
    assert worst(both)["queue"].active
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


def said(engine: EngineLoad, *verdicts: Any, led: Collection[str] = ()) -> str:
    found = worst(pressures(engine, LIMITS))
    return headline({item.phase: item for item in verdicts}, found, {engine.engine: engine}, led=led)


def test_pressure_that_leads_stays_where_both_cost_about_as_much() -> None:
    """A queue that grows: the mean of its waits wavers about what the device costs."""
    slow = verdict("sync_bound", headroom_seconds=0.005, steps_per_second=100.0, share_ratio=1.0)
    led: frozenset[str] = frozenset()
    leads = []
    # Of 3 s a request; half of what is left is waste: from 1.0 s on it costs more, below 0.78 s clearly less.
    for waited in (0.9, 1.1, 0.95, 1.05, 0.85, 0.75, 0.9, 1.1):
        engine = load(queue_seconds=waited, first_token_seconds=1.2, request_seconds=3.0, waiting=3)
        found = worst(pressures(engine, LIMITS))
        leads.append(said(engine, slow, led=led).startswith("SLOW"))
        led = frozenset(item.kind for item in leading({"decode": slow}, found, {0: engine}, led))
    assert leads == [False, True, True, True, True, False, False, True]


def test_pressure_that_leads_and_is_none_any_more_leads_no_longer() -> None:
    slow = verdict("unknown", "no_peaks", share_ratio=0.9)
    engine = load(queue_seconds=0.01, first_token_seconds=0.5)
    assert not said(engine, slow, led=frozenset({"queue"})).startswith("SLOW")


def test_queueing_that_costs_most_leads_and_says_why() -> None:
    text = said(load(queue_seconds=1.42, first_token_seconds=2.0, kv_usage=0.98, waiting=30), BUSY)
    assert text.startswith(
        "SLOW: queueing is 71% of TTFT, 1.4 s (KV cache 98% full with 30 requests waiting)."
    )
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
    assert text.startswith("SLOW: queueing is 67% of TTFT, 0.10 s.")


def test_a_full_cache_leads_where_nobody_tells_how_long_requests_queue() -> None:
    """As of a vLLM that does not say it with the first token, a moment after a request began to wait."""
    full = load(kv_usage=0.98, waiting=5, queue_seconds=None, starved_seconds=1.0, request_seconds=60.0)
    slow = verdict("sync_bound", headroom_seconds=0.005, steps_per_second=100.0, share_ratio=1.0)
    assert said(full, slow).startswith("SLOW: KV cache 98% full with 5 requests waiting.")
    told = dataclasses.replace(full, queue_seconds=0.1)
    assert said(told, slow).startswith("Decode sync-bound")


def test_an_engine_whose_tokens_wait_is_worse_off_than_one_whose_front_end_is_just_busy() -> None:
    late, busy = load(output_lag_seconds=0.3), load(engine=1, front_end=thread(0.99), output_lag_seconds=0.01)
    for both in ((late, busy), (busy, late)):
        found = worst(item for engine in both for item in pressures(engine, LIMITS))["front_end"]
        assert (found.engine, found.high) == (0, True)


@pytest.mark.parametrize(
    ("changes", "leads"),
    [
        # 1 in 10 computes its 0.09 s of prefill anew: 9 ms of a request, of which the device wastes 0.2 s
        ({"preemptions": 1, "requests": 10}, False),
        ({"preemptions": 20, "requests": 10}, False),  # 0.18 s
        ({"preemptions": 30, "requests": 10}, True),  # 0.27 s
        ({"preemptions": 1, "requests": 10, "prompt_tokens": 10, "generated_tokens": 400}, True),  # 41 x 9 ms
        ({"preemptions": 1, "requests": 10, "prompt_tokens": 400, "generated_tokens": 10}, False),
        ({"preemptions": 1, "requests": 10, "queue_seconds": None}, True),  # nobody knows what it costs
        ({"preemptions": 9, "requests": 0, "request_seconds": None}, True),
    ],
)
def test_preemptions_lead_where_what_is_computed_anew_costs_more(
    changes: dict[str, Any], leads: bool
) -> None:
    slow = verdict("memory_bound", headroom_seconds=0.001, steps_per_second=100.0, share_ratio=1.0)
    under = load(**{"queue_seconds": 0.01, "first_token_seconds": 0.1, **changes})
    (found,) = (item for item in pressures(under, LIMITS) if item.kind == "preemption")
    assert found.high
    assert ("finished requests" in said(under, slow)) is leads


def test_preemptions_that_cost_little_still_say_why_others_queue() -> None:
    under = load(preemptions=1, requests=10, queue_seconds=1.0, first_token_seconds=1.1)
    assert said(under, BUSY).startswith(
        "SLOW: queueing is 91% of TTFT, 1.0 s (1 preemption for 10 finished requests)."
    )


def test_slight_pressure_does_not_lead() -> None:
    assert not said(load(queue_seconds=0.3, first_token_seconds=1.0), BUSY).startswith("SLOW")


IDLE = verdict("idle", share_ratio=0.01)


def test_an_idle_server_is_said_to_be_idle() -> None:
    assert said(load(running=0), IDLE) == "IDLE: fewer steps in the last 10 s than a verdict needs."
    assert said(load(running=0, waiting=0)) == "IDLE: no steps yet."


def test_an_idle_server_is_not_slow_for_what_was() -> None:
    """Requests are looked at over 30 s, steps over 10: what waited has ended meanwhile."""
    past = load(running=0, queue_seconds=2.0, first_token_seconds=2.1, preemptions=90, front_end=thread(1.0))
    assert {item.kind for item in pressures(past, LIMITS) if item.high} == {"queue", "preemption"}
    assert said(past, IDLE, verdict("idle", phase="prefill")).startswith("IDLE: ")
    assert said(past, BUSY).startswith("SLOW: queueing")
    for now in ({"running": 1}, {"waiting": 1}):
        assert said(dataclasses.replace(past, **now), IDLE).startswith("SLOW: queueing")


def test_requests_that_run_while_steps_are_few_are_no_idleness() -> None:
    few = "CAN'T TELL: fewer steps in the last 10 s than a verdict needs"
    assert said(load(running=16), IDLE) == f"{few}; requests: 16 running, 0 waiting."
    assert said(load(running=0, waiting=2), IDLE) == f"{few}; requests: 0 running, 2 waiting."


BEHIND = "SLOW: the front end's thread vllm used 99% of a core: tokens may reach clients late."


def test_a_front_end_without_time_is_seen_though_its_engine_has_finished() -> None:
    assert said(load(running=16, front_end=thread(0.99)), IDLE) == BEHIND


@pytest.mark.parametrize(
    ("wasted", "leads"),
    [
        (0.0, False),  # the device makes all it can
        (0.02, True),  # and 2 % more tokens than now the front end cannot pass on
        (0.5, True),
        (None, True),
    ],
)
def test_a_full_front_end_leads_where_it_caps_what_the_device_could_give(
    wasted: float | None, leads: bool
) -> None:
    seconds = None if wasted is None else wasted / 100
    slow = verdict("sync_bound", headroom_seconds=seconds, steps_per_second=100.0, share_ratio=1.0)
    text = said(load(front_end=thread(0.99)), slow)
    assert text.startswith(BEHIND if leads else "Decode sync-bound")


def test_how_late_tokens_are_is_what_counts_where_it_is_known() -> None:
    """A thread without time left that hands tokens on at once costs nobody anything yet."""
    in_time = load(front_end=thread(0.99), output_lag_seconds=0.004)
    (found,) = (item for item in pressures(in_time, LIMITS) if item.kind == "front_end")
    assert (found.active, found.high, found.value) == (True, False, 0.99)
    assert found.text == "the front end's thread vllm used 99% of a core: tokens wait 4 ms in it"
    assert said(in_time, IDLE).startswith("CAN'T TELL")
    late = load(front_end=thread(0.99), output_lag_seconds=1.25)
    (found,) = (item for item in pressures(late, LIMITS) if item.kind == "front_end")
    assert (found.high, found.value, found.threshold) == (True, 1.25, LIMITS.output_lag_seconds)
    assert said(late, IDLE) == (
        "SLOW: tokens wait 1.2 s in the front end, whose thread vllm used 99% of a core."
    )
    unseen = load(front_end=None, output_lag_seconds=0.3)
    assert said(unseen, IDLE) == "SLOW: tokens wait 0.30 s in the front end."


@pytest.mark.parametrize(("lag", "leads"), [(0.2, False), (0.7, True), (1.9, True)])
def test_late_tokens_lead_where_they_cost_a_request_more_than_the_device_s_waste(
    lag: float, leads: bool
) -> None:
    """Of a request of 2 s the device wastes 30 % of what the lag leaves."""
    slow = verdict("sync_bound", headroom_seconds=0.003, steps_per_second=100.0, share_ratio=1.0)
    assert said(load(output_lag_seconds=lag), slow).startswith("SLOW: tokens wait") is leads


def test_waiting_for_a_core_is_said() -> None:
    text = said(load(front_end=thread(0.6, 0.37)), IDLE)
    assert text == (
        "SLOW: the front end's thread vllm used 60% of a core and waited for one 37% of the time: "
        "tokens may reach clients late."
    )


def test_requests_without_a_step_are_no_idleness() -> None:
    text = said(load(running=2, waiting=1, kv_usage=0.1))
    assert text == "CAN'T TELL: no step has ended yet; requests: 2 running, 1 waiting."


def test_a_step_that_runs_is_no_idleness_unless_it_is_a_short_one() -> None:
    def told(seconds: float) -> str:
        return headline({}, {}, {0: load(running=0, waiting=0)}, running_seconds=seconds)

    assert told(0.2) == "IDLE: no steps yet."
    assert told(23) == "CAN'T TELL: no step has ended yet; one has been running for 23 s."


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


@pytest.mark.parametrize(
    ("usage", "why"), [(0.3, ""), (0.95, " (KV cache 99% full with 5 requests waiting)")]
)
def test_a_full_cache_of_one_engine_is_no_reason_why_another_s_requests_queue(usage: float, why: str) -> None:
    queued = {"queue_seconds": 1.0, "first_token_seconds": 1.25, "waiting": 4}
    loads = {0: load(kv_usage=usage, **queued), 1: load(engine=1, kv_usage=0.99, waiting=5)}
    found = worst(item for one in loads.values() for item in pressures(one, LIMITS))
    assert (found["queue"].engine, found["kv_cache"].engine) == (0, 1)
    assert headline({"decode": BUSY}, found, loads).startswith(f"SLOW: queueing is 80% of TTFT, 1.0 s{why}.")


def test_what_is_high_is_active_too_whatever_the_thresholds() -> None:
    limits = Thresholds.from_mapping({"queue_share_ratio": 0.9, "queue_share_high_ratio": 0.1})
    queued = load(queue_seconds=1.0, first_token_seconds=2.0, waiting=3)
    (found,) = (item for item in pressures(queued, limits) if item.kind == "queue")
    assert (found.active, found.high) == (False, False)


@pytest.mark.parametrize(
    ("phase", "tokens", "says"),
    [
        ("decode", 4, "in step 12 (decode, 4 tokens) for"),
        (None, 4, "in step 12 (4 tokens) for"),
        (None, None, "in step 12 for"),
    ],
)
def test_a_stall_says_of_its_step_what_is_known(phase: str | None, tokens: int | None, says: str) -> None:
    hang = Stall("step", 0, 33.0, Bound(10.0, "a reason"), 12, phase, tokens, ())
    assert says in stalled(0, hang)


def test_texts_are_one_line() -> None:
    for found in pressures(load(waiting=3), LIMITS):
        assert isinstance(found, Pressure)
        assert "\n" not in found.text
