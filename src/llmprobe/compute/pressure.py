"""Pressure: what makes requests wait besides the device: the KV cache, the queue, the scheduler's limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmprobe.compute.thresholds import Thresholds

KINDS = ("kv_cache", "queue", "preemption", "token_budget", "sequence_limit")


@dataclass(frozen=True)
class EngineLoad:
    """One engine over the last window. What is not known is None.

    Attributes:
        kv_usage: share of the KV cache in use, now.
        queue_seconds: mean time in the queue of requests that finished in the window.
        first_token_seconds: mean TTFT of first tokens in the window.
        request_seconds: mean duration of requests that finished in the window.
        requests: how many finished.
        full_steps_ratio: share of prefill and mixed steps that filled `max_num_batched_tokens`.
        max_num_seqs: the scheduler's limit.
    """

    engine: int
    running: int | None
    waiting: int | None
    kv_usage: float | None
    preemptions: int
    requests: int
    queue_seconds: float | None
    first_token_seconds: float | None
    request_seconds: float | None
    full_steps_ratio: float | None
    max_num_seqs: int | None

    @property
    def queue_share(self) -> float | None:
        """Share of TTFT spent in the queue; at most 1, as the two means are of different requests."""
        if self.queue_seconds is None or not self.first_token_seconds:
            return None
        return min(self.queue_seconds / self.first_token_seconds, 1.0)


@dataclass(frozen=True)
class Pressure:
    """One kind of pressure on one engine. ``high``: it may take the headline."""

    kind: str
    engine: int
    active: bool
    high: bool
    value: float
    threshold: float
    text: str


def pressures(load: EngineLoad, limits: Thresholds) -> tuple[Pressure, ...]:
    """Every kind that is known about one engine, active or not."""
    found = (
        _kv(load, limits),
        _queue(load, limits),
        _preemption(load, limits),
        _budget(load, limits),
        _seqs(load),
    )
    return tuple(pressure for pressure in found if pressure is not None)


def worst(found: Iterable[Pressure]) -> dict[str, Pressure]:
    """By kind, the engine under most of it."""
    result: dict[str, Pressure] = {}
    for pressure in found:
        known = result.get(pressure.kind)
        if known is None or (pressure.active, pressure.value) > (known.active, known.value):
            result[pressure.kind] = pressure
    return {kind: result[kind] for kind in KINDS if kind in result}


def _kv(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    if load.kv_usage is None or load.waiting is None:
        return None
    active = load.kv_usage >= limits.kv_usage_ratio and load.waiting > 0
    text = f"KV cache {load.kv_usage:.0%} full with {load.waiting} requests waiting"
    return Pressure("kv_cache", load.engine, active, active, load.kv_usage, limits.kv_usage_ratio, text)


def _queue(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    share = load.queue_share
    if share is None:
        return None
    text = f"queueing is {share:.0%} of TTFT"
    active, high = share >= limits.queue_share_ratio, share >= limits.queue_share_high_ratio
    return Pressure("queue", load.engine, active, high, share, limits.queue_share_ratio, text)


def _preemption(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    if not load.requests and not load.preemptions:
        return None
    ratio = load.preemptions / max(load.requests, 1)
    text = f"{load.preemptions} preemptions for {load.requests} finished requests"
    active = load.preemptions > 0 and ratio >= limits.preemption_ratio
    high = active and ratio >= limits.preemption_high_ratio
    return Pressure("preemption", load.engine, active, high, ratio, limits.preemption_ratio, text)


def _budget(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    if load.full_steps_ratio is None or load.waiting is None:
        return None
    active = load.full_steps_ratio >= limits.token_budget_steps_ratio and load.waiting > 0
    text = f"{load.full_steps_ratio:.0%} of prefill steps fill max_num_batched_tokens"
    limit = limits.token_budget_steps_ratio
    return Pressure("token_budget", load.engine, active, False, load.full_steps_ratio, limit, text)


def _seqs(load: EngineLoad) -> Pressure | None:
    if not load.max_num_seqs or load.running is None or load.waiting is None:
        return None
    ratio = load.running / load.max_num_seqs
    text = f"{load.running} of {load.max_num_seqs} sequences run with {load.waiting} requests waiting"
    active = load.running >= load.max_num_seqs and load.waiting > 0
    return Pressure("sequence_limit", load.engine, active, False, ratio, 1.0, text)
