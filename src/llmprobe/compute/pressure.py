"""Pressure: what makes requests wait besides the device: the KV cache, the queue, the front end, limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmprobe.compute.host import ThreadLoad
from llmprobe.compute.thresholds import Thresholds

KINDS = ("kv_cache", "queue", "preemption", "token_budget", "sequence_limit", "front_end")

_TELLING_WAIT_RATIO = 0.05  # from which waiting for a core is worth a word


@dataclass(frozen=True)
class EngineLoad:
    """One engine over the last window. What is not known is None.

    Attributes:
        kv_usage: share of the KV cache in use, now.
        kv_peak: the most of it in the last 10 s while requests waited. A full cache is emptied by what it
            does: it preempts, and admits nobody.
        queue_seconds: mean time in the queue of requests that had their first token in the window, and
            told it. Requests that ended without one are not among them.
        first_token_seconds: mean TTFT of requests that had their first token in the window.
        request_seconds: mean duration of requests that finished in the window.
        requests: how many finished.
        full_steps_ratio: share of prefill and mixed steps that filled `max_num_batched_tokens`.
        max_num_seqs: the scheduler's limit.
        starved_seconds: for how long requests have been waiting while none had its first token.
        backlog_seconds: how long a request waits for its first token by Little's law, those that still wait
            included.
        front_end: the thread of its front ends that has least time left.
        output_lag_seconds: mean time that outputs waited in a front end in the window, detokenizing included.
        prompt_tokens: of requests in the window, all together.
        generated_tokens: likewise.
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
    starved_seconds: float | None = None
    front_end: ThreadLoad | None = None
    output_lag_seconds: float | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    backlog_seconds: float | None = None
    kv_peak: float | None = None

    @property
    def recompute_seconds(self) -> float | None:
        """What a preemption costs its request besides the wait for room, which is the queue's.

        None if not known. The prefill again, which took what of TTFT was not the queue, and in proportion for
        every token generated: at most so much, as it may have come at the first of them, and blocks may
        still be cached.
        """
        if self.first_token_seconds is None or self.queue_seconds is None:
            return None
        longer = 1 + (self.generated_tokens or 0) / self.prompt_tokens if self.prompt_tokens else 1.0
        return max(self.first_token_seconds - self.queue_seconds, 0.0) * longer

    @property
    def waited_seconds(self) -> float | None:
        """How long requests wait: those that had their first token, or those that still have none.

        The mean of the former falls short while a queue grows: whoever waits longest is not among them yet.
        """
        waits = (self.queue_seconds, self.starved_seconds, self.backlog_seconds)
        return max((seconds for seconds in waits if seconds is not None), default=None)

    @property
    def kv_most(self) -> float | None:
        """The most of the KV cache that was in use of late, if requests wait; else what is in use."""
        if self.kv_usage is None or not self.waiting:
            return self.kv_usage
        return max(self.kv_usage, self.kv_peak or 0.0)

    @property
    def requests_now(self) -> int:
        """How many run or wait, as far as is known."""
        return (self.running or 0) + (self.waiting or 0)

    @property
    def queue_share(self) -> float | None:
        """Share of TTFT spent in the queue, by requests that had their first token in the window.

        At most 1: a few of them may not have told their time in the queue, and the two means differ by those.
        """
        if self.queue_seconds is None or not self.first_token_seconds:
            return None
        return min(self.queue_seconds / self.first_token_seconds, 1.0)


@dataclass(frozen=True)
class Pressure:
    """One kind of pressure on one engine.

    Attributes:
        high: it may take the headline.
        value: of ``quantity``, in the unit that stands in its name.
        quantity: what is held against ``threshold``: the name of that threshold, where it has one.
    """

    kind: str
    engine: int
    active: bool
    high: bool
    value: float
    threshold: float
    text: str
    quantity: str


def pressures(load: EngineLoad, limits: Thresholds) -> tuple[Pressure, ...]:
    """Every kind that is known about one engine, active or not."""
    found = (
        _kv(load, limits),
        _queue(load, limits),
        _preemption(load, limits),
        _budget(load, limits),
        _seqs(load),
        _front_end(load, limits),
    )
    return tuple(pressure for pressure in found if pressure is not None)


def worst(found: Iterable[Pressure]) -> dict[str, Pressure]:
    """By kind, the engine under most of it."""
    result: dict[str, Pressure] = {}
    for pressure in found:
        known = result.get(pressure.kind)
        if known is None or _badness(pressure) > _badness(known):
            result[pressure.kind] = pressure
    return {kind: result[kind] for kind in KINDS if kind in result}


def _badness(pressure: Pressure) -> tuple[bool, bool, float]:
    # The value last: that of a front end may be seconds that tokens wait, or how busy a thread is.
    return pressure.active, pressure.high, pressure.value


def _kv(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    most = load.kv_most
    if load.kv_usage is None or most is None or load.waiting is None:
        return None
    active = most >= limits.kv_usage_ratio and load.waiting > 0
    full = f"{'up to ' if most > load.kv_usage else ''}{most:.0%} full"
    text = f"KV cache {full} with {load.waiting} requests waiting"
    return Pressure(
        "kv_cache", load.engine, active, active, most, limits.kv_usage_ratio, text, "kv_usage_ratio"
    )


def _queue(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    if load.waiting and (load.starved_seconds or 0.0) >= limits.starved_seconds:
        return _starved(load, limits)
    share = load.queue_share
    if share is None or load.queue_seconds is None:
        return None
    text = f"queueing is {share:.0%} of TTFT, {_seconds(load.queue_seconds)}"
    long = load.queue_seconds >= limits.queue_wait_seconds
    active = long and share >= limits.queue_share_ratio
    high = active and share >= limits.queue_share_high_ratio
    return Pressure(
        "queue", load.engine, active, high, share, limits.queue_share_ratio, text, "queue_share_ratio"
    )


def _starved(load: EngineLoad, limits: Thresholds) -> Pressure:
    """Whoever waits has had nothing but the queue so far, whatever those had that came before."""
    who = "1 request waits" if load.waiting == 1 else f"{load.waiting} requests wait"
    text = f"{who} and none had its first token for {load.starved_seconds:.0f} s"
    return Pressure(
        "queue", load.engine, True, True, 1.0, limits.queue_share_ratio, text, "queue_share_ratio"
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.0f} ms"


def _preemption(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    if not load.requests and not load.preemptions:
        return None
    ratio = load.preemptions / max(load.requests, 1)
    many = "preemption" if load.preemptions == 1 else "preemptions"
    text = f"{load.preemptions} {many} for {load.requests} finished requests"
    active = load.preemptions > 0 and ratio >= limits.preemption_ratio
    high = active and ratio >= limits.preemption_high_ratio
    return Pressure(
        "preemption", load.engine, active, high, ratio, limits.preemption_ratio, text, "preemption_ratio"
    )


def _budget(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    if load.full_steps_ratio is None or load.waiting is None:
        return None
    active = load.full_steps_ratio >= limits.token_budget_steps_ratio and load.waiting > 0
    text = f"{load.full_steps_ratio:.0%} of prefill steps fill max_num_batched_tokens"
    limit = limits.token_budget_steps_ratio
    return Pressure(
        "token_budget",
        load.engine,
        active,
        False,
        load.full_steps_ratio,
        limit,
        text,
        "token_budget_steps_ratio",
    )


def _seqs(load: EngineLoad) -> Pressure | None:
    if not load.max_num_seqs or load.running is None or load.waiting is None:
        return None
    ratio = load.running / load.max_num_seqs
    text = f"{load.running} of {load.max_num_seqs} sequences run with {load.waiting} requests waiting"
    active = load.running >= load.max_num_seqs and load.waiting > 0
    return Pressure("sequence_limit", load.engine, active, False, ratio, 1.0, text, "running_ratio")


def _front_end(load: EngineLoad, limits: Thresholds) -> Pressure | None:
    """By how late tokens are; else, and where nobody says that, by the thread that has least time left."""
    thread, lag = load.front_end, load.output_lag_seconds
    if load.running is None or load.waiting is None:
        return None
    if lag is not None and lag >= limits.output_lag_seconds and load.requests_now > 0:
        text = f"tokens wait {_seconds(lag)} in the front end"
        if thread is not None:
            text += f", whose thread {thread.name} used {thread.cpu_ratio:.0%} of a core"
        return Pressure(
            "front_end", load.engine, True, True, lag, limits.output_lag_seconds, text, "output_lag_seconds"
        )
    if thread is None:
        return None
    waited = thread.run_queue_ratio or 0.0
    text = f"the front end's thread {thread.name} used {thread.cpu_ratio:.0%} of a core"
    if waited >= _TELLING_WAIT_RATIO:
        text += f" and waited for one {waited:.0%} of the time"
    active = thread.taken_ratio >= limits.front_end_busy_ratio and load.requests_now > 0
    if lag is not None:
        text += f": tokens wait {_seconds(lag)} in it"
    elif active:
        text += ": tokens may reach clients late"
    high, limit = active and lag is None, limits.front_end_busy_ratio
    return Pressure(
        "front_end", load.engine, active, high, thread.taken_ratio, limit, text, "front_end_busy_ratio"
    )
