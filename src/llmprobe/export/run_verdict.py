"""The verdict on a finished run: the rules of the live one, over all of its time instead of the last 10 s."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprobe.collect.views import EngineView, RankView, ServerView
from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS
from llmprobe.compute.advice import Advice, Target, advise, advise_pressure
from llmprobe.compute.classify import classify
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.headline import headline
from llmprobe.compute.pressure import EngineLoad, pressures, worst
from llmprobe.compute.servers import combine
from llmprobe.compute.verdict import Observation, Verdict
from llmprobe.export.summary import plain


def run_verdict(
    view: ServerView, ranks: list[Any], engines: list[Any], before: ServerView | None
) -> dict[str, Any]:
    """Headline, verdicts, pressure and advice, JSON-ready.

    Args:
        view: the server at the end.
        ranks: its ranks as `llmprobe.export.report` tells them, in the order of ``view.ranks``.
        engines: its engines, likewise.
        before: the server at the beginning, if it was there.
    """
    earlier = (
        {(rank.engine, rank.rank, rank.facts.get("pid")): rank for rank in before.ranks} if before else {}
    )
    limits = view.thresholds
    told: dict[str, list[tuple[float, Verdict, PhaseFigures]]] = {}
    for rank, document in zip(view.ranks, ranks, strict=True):
        old = earlier.get((rank.engine, rank.rank, rank.facts.get("pid")))
        busy = sum(figures["seconds"] for figures in document["phases"].values())
        seconds = busy + sum(document["idle_seconds"].values())
        found = {
            phase: _figures(phase, rank, old, figures, seconds)
            for phase, figures in document["phases"].items()
        }
        for phase, figures in found.items():
            if phase == "dummy":
                continue
            seen = Observation(
                phase,
                seconds,
                figures,
                rank.clock,
                rank.peaks,
                rank.attainable,
                host=rank.host,
                no_model="" if rank.facts.get("model") else "the model of the work is not known",
            )
            told.setdefault(phase, []).append((figures.seconds, classify(seen, limits), figures))
    verdicts = {phase: combine([(time, verdict) for time, verdict, _ in of]) for phase, of in told.items()}
    engines_before = {engine.engine: engine for engine in before.engines} if before else {}
    loads = {
        engine.engine: _load(engine, engines_before.get(engine.engine), document, view.flags)
        for engine, document in zip(view.engines, engines, strict=True)
    }
    pressure = worst(found for load in loads.values() for found in pressures(load, limits))
    pid = view.ranks[0].facts.get("pid") if view.ranks else None
    target = Target(
        view.server,
        view.framework,
        view.flags,
        pid if isinstance(pid, int) else None,
        running=False,
        clock=view.ranks[0].clock if view.ranks else "",
    )
    advice: dict[str, tuple[Advice, ...]] = {
        phase: advise(verdict, max(told[phase], key=lambda item: item[0])[2], target)
        for phase, verdict in verdicts.items()
    }
    for kind, pressing in pressure.items():
        if pressing.active:
            advice[kind] = advise_pressure(pressing, loads[pressing.engine], target)
    return {
        "headline": headline(verdicts, pressure, loads, recorded=bool(view.ranks)),
        "verdicts": plain(verdicts),
        "pressure": plain(pressure),
        "advice": plain(advice),
    }


def _figures(
    phase: str, rank: RankView, before: RankView | None, document: Mapping[str, Any], run_seconds: float
) -> PhaseFigures:
    """A phase of the report as figures. ``document`` leaves out the host gap where nobody tells it."""
    told = document["components_seconds"]
    components = {name: told.get(name, 0.0) for name in COMPONENTS if name not in IDLE_COMPONENTS}
    gap = components["host_gap"]
    seconds, steps = document["seconds"], document["steps"]
    step = document.get("step_seconds") or {}
    floors = rank.operator_floors.get(phase, {})
    old = before.operator_floors.get(phase, {}) if before else {}
    by_operator = {
        name: (memory - old.get(name, (0.0, 0.0))[0], compute - old.get(name, (0.0, 0.0))[1])
        for name, (memory, compute) in floors.items()
    }
    return PhaseFigures(
        steps=steps,
        seconds=seconds,
        span_seconds=seconds - gap,
        gap_seconds=gap,
        prompt_tokens=0,
        decode_tokens=0,
        steps_per_second=steps / run_seconds if run_seconds > 0 else 0.0,
        step_seconds_p50=step.get("p50", 0.0),
        step_seconds_p99=step.get("p99", 0.0),
        floor_seconds=document.get("floor_step_seconds"),
        mbu_step=document.get("mbu_step"),
        mbu_busy=document.get("mbu_busy"),
        mfu_step=document.get("mfu_step"),
        mfu_busy=document.get("mfu_busy"),
        sync_gap_ratio=document["sync_gap_ratio"],
        sync_gap_is_lower_bound=True,
        intensity=document.get("intensity_flops_per_byte"),
        components=components,
        operator_floors={name: pair for name, pair in by_operator.items() if pair[0] > 0 or pair[1] > 0},
    )


def _load(
    engine: EngineView, before: EngineView | None, document: Mapping[str, Any], flags: Mapping[str, Any]
) -> EngineLoad:
    def mean(name: str) -> float | None:
        found = document.get(name)
        return found["mean"] if found else None

    queued = engine.first_tokens_queued - (before.first_tokens_queued if before else 0)
    seconds = engine.first_token_queue_seconds - (before.first_token_queue_seconds if before else 0.0)
    limit = flags.get("max_num_seqs")
    return EngineLoad(
        engine=engine.engine,
        running=None,  # what runs and waits at the end says nothing of the run
        waiting=None,
        kv_usage=None,
        preemptions=document["preemptions"],
        requests=document["requests"],
        queue_seconds=seconds / queued if queued else None,
        first_token_seconds=mean("ttft_seconds"),
        request_seconds=mean("duration_seconds"),
        full_steps_ratio=None,
        max_num_seqs=limit if isinstance(limit, int) else None,
        prompt_tokens=document["prompt_tokens"],
        generated_tokens=document["generated_tokens"],
    )
