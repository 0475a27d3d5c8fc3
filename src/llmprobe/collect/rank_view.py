"""What is shown of one rank: put together from its journal, its GPU's counters and its process."""

from __future__ import annotations

import dataclasses

from llmprobe.collect.peaks import why_no_peaks
from llmprobe.collect.process import Rank
from llmprobe.collect.stalls import find_stall, running_step
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.views import RankView
from llmprobe.collect.watches import Watches
from llmprobe.compute import intervals
from llmprobe.compute.graphs import launched_whole
from llmprobe.compute.steps import Floats
from llmprobe.record import layout

WINDOW_NS = 30 * 10**9


def rank_view(
    rank: Rank,
    now: int,
    watches: Watches,
    telemetry: Telemetry | None,
    pending: intervals.Intervals | None,
    several_engines: bool,
) -> RankView:
    """What is shown of one rank.

    Args:
        now: CLOCK_MONOTONIC nanoseconds.
        watches: looks at the engine's process.
        telemetry: looks at its GPU; None if nobody does.
        pending: when its engine had unfinished requests, None if that is not known.
        several_engines: its server has more than this rank's.
    """
    process = rank.process
    facts, counters = process.facts, process.counters
    # A rate over time in which nobody looked would be too low.
    since_ns = min(max(now - WINDOW_NS, rank.first_ns or 0), now - 1)
    model = facts.get("model") or {}
    since = rank.running_since()
    armed = bool(process.load.armed) if process.load is not None else True
    inert = bool(process.load.inert) if process.load is not None else False
    gpu = telemetry.gpu(facts) if telemetry else None
    steps = {phase: counters[f"steps_{phase}"] for phase in layout.PHASES if counters[f"steps_{phase}"]}
    return RankView(
        engine=process.engine,
        rank=int(facts.get("rank", 0)),
        facts=facts,
        clock=str(facts.get("clock", "")),
        runner=str(facts.get("runner", "")),
        armed=armed,
        inert=inert,
        device_time={phase: dict(parts) for phase, parts in rank.device_time.items()},
        bytes={phase: dict(parts) for phase, parts in rank.bytes.items()},
        flops=dict(rank.flops),
        work_seconds={phase: (seconds, busy) for phase, (seconds, busy) in rank.work_seconds.items()},
        steps=steps,
        figures=rank.figures(since_ns, now),
        step_duration={
            phase: process.histogram(f"step_{phase}")
            for phase in steps
            if f"step_{phase}" in layout.HISTOGRAM_INDEX
        },
        peaks=rank.peaks,
        weights_bytes=model.get("weights_bytes"),
        kv_capacity_bytes=(model.get("kv") or {}).get("capacity_bytes"),
        step_running_seconds=None if since is None else max(now - since, 0) / 1e9,
        own_seconds=counters["own_ns_step"] / 1e9,
        own_thread_seconds=counters["thread_ns_step"] / 1e9,
        errors=counters["errors"],
        dropped=counters["dropped"],
        lost=process.lost,
        attainable=rank.attainable,
        no_model="" if rank.model is not None else f"no model of the work: {rank.model_problem}",
        no_peaks="" if rank.peaks is not None else why_no_peaks(facts, mig=gpu is not None and gpu.mig),
        experts=None if rank.model is None else rank.model.experts,
        one_graph=frozenset(phase for phase in steps if _one_graph(rank, phase, since_ns, now)),
        operator_floors={
            phase: {name: list(sums) for name, sums in of_phase.items()}
            for phase, of_phase in rank.operator_floors.items()
        },
        counters=telemetry.counters(facts) if telemetry else None,
        counters_lately=telemetry.counters_lately(facts) if telemetry else None,
        gpu=gpu,
        host=watches.signals(process),
        host_totals=watches.totals(process),
        kernels=rank.windows.evidence(now),
        top_kernels=rank.windows.top(now),
        kernel_totals=rank.windows.totals(),
        running=running_step(rank, pending, now) if armed and not inert else None,
        stall=find_stall(rank, pending, now, process.engine if several_engines else None)
        if armed and not inert
        else None,
        journal=process.path,
    )


def _one_graph(rank: Rank, phase: str, since_ns: int, now: int) -> bool:
    def tokens() -> Floats:
        return rank.tokens(since_ns, now, (layout.PHASES.index(phase),))

    return launched_whole(rank.process.facts.get("flags") or {}, phase, tokens)


def without_gaps(rank: RankView) -> RankView:
    """``rank`` without what only a front end can tell: which idle time was a wait for the host."""

    def known(parts: dict[str, float]) -> dict[str, float]:
        return {name: seconds for name, seconds in parts.items() if name != "host_gap" or seconds}

    return dataclasses.replace(
        rank,
        device_time={phase: known(parts) for phase, parts in rank.device_time.items()},
        figures={
            phase: dataclasses.replace(found, sync_gap_ratio=None, components=known(found.components))
            for phase, found in rank.figures.items()
        },
    )
