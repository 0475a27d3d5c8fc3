"""The one line that an operator reads first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from llmprobe.compute.pressure import EngineLoad, Pressure
from llmprobe.compute.stall import Stall
from llmprobe.compute.verdict import IDLE, UNKNOWN, Verdict

_T = TypeVar("_T")
_SLOW = "SLOW: "
#: Pressure that leads goes on to, until it costs less than this part of what the device does: where the two
#: are about even, as while a queue grows, the headline would turn with every look.
_STAYS_RATIO = 0.7
_WORTH_A_WORD = 1.0  # seconds that a step runs: shorter ones come and go on idle servers too
_WORDS = {
    "idle": "idle",
    "unknown": "can't tell",
    "sync_bound": "sync-bound",
    "balanced": "balanced",
    "memory_bound": "memory-bound",
    "compute_bound": "compute-bound",
    "inefficient_kernels": "inefficient kernels",
}


def headline(
    verdicts: Mapping[str, Verdict],
    pressure: Mapping[str, Pressure],
    loads: Mapping[int, EngineLoad],
    *,
    recorded: bool = True,
    running_seconds: float = 0.0,
    led: Collection[str] = (),
) -> str:
    """Pressure first if it costs users more than the device does, else the phase that takes most time.

    Pressure costs a request its time in the queue, or what it computes anew once it was preempted. The
    device costs it what its steps take beyond their floor: that share of the time a request is not queueing.
    Where no floor is known, high pressure leads.
    Figures of requests are of the last 30 s: once nothing runs or waits, they are the past, and lead nothing.

    Args:
        verdicts: by phase.
        pressure: by kind.
        loads: by engine.
        recorded: whether any worker is; without one nobody can say that nothing goes on.
        running_seconds: for how long a step has been running, with work pending. Front ends hear of a request
            that runs only with the end of its first step.
        led: the kinds of pressure that did so a moment ago, see `leading`.
    """
    phases = sorted(verdicts.values(), key=lambda verdict: -verdict.share_ratio)
    busy = [verdict for verdict in phases if verdict.bottleneck != IDLE]
    said = "; ".join(_phase(verdict) for verdict in busy[:2])
    requests = _requests(loads)
    pressing = leading(verdicts, pressure, loads, led)
    if pressing:
        queue = next((item for item in pressing if item.kind == "queue"), None)
        if queue is not None:  # a cache without room is why, whatever it costs
            pressing += [
                item
                for item in pressure.values()
                if item.high and _explains(item, queue, loads) and item not in pressing
            ]
        parts = [item.text for item in sorted(pressing, key=_importance)]
        first = parts[0] + (f" ({', '.join(parts[1:])})" if parts[1:] else "")
        return f"{_SLOW}{first}. {_capital(said)}." if said else f"{_SLOW}{first}."
    if busy:
        return f"{_capital(said)}."
    if not recorded:
        return f"CAN'T TELL: no worker of this server is recorded{requests}."
    few = "fewer steps in the last 10 s than a verdict needs" if phases else "no step has ended yet"
    runs = f"; one has been running for {running_seconds:.0f} s" if running_seconds >= _WORTH_A_WORD else ""
    if requests or runs:
        return f"CAN'T TELL: {few}{runs}{requests}."
    return f"IDLE: {few}." if phases else "IDLE: no steps yet."


def leading(
    verdicts: Mapping[str, Verdict],
    pressure: Mapping[str, Pressure],
    loads: Mapping[int, EngineLoad],
    led: Collection[str] = (),
) -> list[Pressure]:
    """The pressure that takes the headline.

    Args:
        led: the kinds that did so a moment ago: they do until they are no pressure any more, or cost clearly
            less than the device does.
    """
    busy = [verdict for verdict in verdicts.values() if verdict.bottleneck != IDLE]
    if not busy and not _requests(loads):
        return []
    return [
        item
        for item in pressure.values()
        if (item.high or (item.kind in led and item.active))
        and _costs_more(item, busy, loads, _STAYS_RATIO if item.kind in led else 1.0)
    ]


def in_its_order(said: str, phases: Mapping[str, _T], pressing: Mapping[str, _T]) -> dict[str, _T]:
    """What belongs to phases and to kinds of pressure, as the headline ``said`` ranks the two."""
    return {**pressing, **phases} if said.startswith(_SLOW) else {**phases, **pressing}


def stalled(rank: int, stall: Stall) -> str:
    """A headline above all others: a rank that has stopped getting on, and what it last did."""
    if stall.where == "step":
        known = [stall.phase] if stall.phase is not None else []
        if stall.tokens is not None:
            known.append(f"{stall.tokens} tokens")
        doing = f"in step {stall.step}" + (f" ({', '.join(known)})" if known else "")
    else:
        doing = f"without a step since step {stall.step}, with requests unfinished"
    last = f"; the last step took {stall.last_steps[-1].seconds:.3g} s" if stall.last_steps else ""
    who = f"rank {rank}" if stall.engine is None else f"engine {stall.engine}, rank {rank}"
    return f"STALLED: {who} has been {doing} for {stall.seconds:.0f} s{last}."


def _requests(loads: Mapping[int, EngineLoad]) -> str:
    """How many requests the engines have, as the end of a sentence; empty if none."""
    running = sum(load.running or 0 for load in loads.values())
    waiting = sum(load.waiting or 0 for load in loads.values())
    return f"; requests: {running} running, {waiting} waiting" if running or waiting else ""


def _importance(pressure: Pressure) -> int:
    """Queueing is what users feel; a full cache is why."""
    return {"queue": 0, "preemption": 1, "kv_cache": 2}.get(pressure.kind, 3)  # then the front end


def _explains(item: Pressure, queue: Pressure, loads: Mapping[int, EngineLoad]) -> bool:
    """Whether requests may queue for lack of room in the cache: in that of their own engine."""
    if item.kind not in ("preemption", "kv_cache"):
        return False
    usage = loads[queue.engine].kv_most if queue.engine in loads else None
    full = item.kind == "kv_cache" and usage is not None and usage >= item.threshold
    return item.engine == queue.engine or full


def _costs_more(
    pressure: Pressure, busy: list[Verdict], loads: Mapping[int, EngineLoad], least: float
) -> bool:
    """Whether it costs at least the part ``least`` of what the device does."""
    load = loads.get(pressure.engine)
    wasted = wasted_share(busy)
    if load is None or wasted is None:
        return True
    if pressure.kind == "preemption":
        again = load.recompute_seconds
        if again is None or not load.request_seconds:
            return True
        lost = min(pressure.value * again, load.request_seconds)
        return lost >= least * wasted * (load.request_seconds - lost)
    if pressure.kind == "front_end" and load.output_lag_seconds is not None:
        lag = load.output_lag_seconds
        return not load.request_seconds or lag >= least * wasted * max(load.request_seconds - lag, 0.0)
    if pressure.kind == "front_end":
        # It can pass on 1 / value times the tokens that it does. Where the device without its waste would
        # make more than that, users gain nothing from the device alone.
        return pressure.value >= 1 - wasted
    waited = load.waited_seconds
    # For how long nobody had a first token does not say how long those queued that had one.
    if load.queue_seconds is None or waited is None or not load.request_seconds:
        return True
    return waited >= least * wasted * max(load.request_seconds - waited, 0.0)


def wasted_share(busy: list[Verdict]) -> float | None:
    """Share of the phases' time beyond their floor; None where the floor of one is not known."""
    total = wasted = 0.0
    for verdict in busy:
        if verdict.headroom_seconds is None:
            return None
        total += verdict.share_ratio
        wasted += min(verdict.headroom_seconds * verdict.steps_per_second, verdict.share_ratio)
    return wasted / total if total > 0 else None


def _phase(verdict: Verdict) -> str:
    words = _WORDS[verdict.bottleneck]
    if verdict.bottleneck == UNKNOWN:
        return f"{verdict.phase}: can't tell: {verdict.reason}"
    sure = f"confidence {verdict.confidence:.2f}"
    if verdict.healthy:
        near = f"{verdict.attained_ratio:.2f} of attainable" if verdict.attained_ratio else verdict.reason
        return f"{verdict.phase} healthy: {near}, {words}, {sure}"
    return f"{verdict.phase} {words}, {sure}: {verdict.reason}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
