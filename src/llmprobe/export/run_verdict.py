"""The verdict on a finished run: the rules of the live one, over all its time with work pending."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmprobe.collect.peaks import measurable
from llmprobe.collect.views import EngineView, RankView, ServerView
from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS
from llmprobe.compute.advice import Advice, Target, advise, advise_pressure
from llmprobe.compute.classify import classify
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.headline import headline, in_its_order
from llmprobe.compute.pressure import EngineLoad, pressures, worst
from llmprobe.compute.routing import by_counter
from llmprobe.compute.servers import combine
from llmprobe.compute.steady import WINDOW_SECONDS
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import IDLE, Observation, Verdict
from llmprobe.export.run_seen import RankSeen, ServerSeen, rank_key
from llmprobe.export.summary import plain

#: Fewer steps are no load: the first ones compile, capture and allocate.
_FEWEST_STEPS = 10


def run_verdict(
    view: ServerView, ranks: list[Any], engines: list[Any], before: ServerView | None, seen: ServerSeen
) -> dict[str, Any]:
    """Headline, verdicts, pressure and advice, JSON-ready.

    Args:
        view: the server at the end.
        ranks: its ranks as `llmprobe.export.report` tells them, in the order of ``view.ranks``.
        engines: its engines, likewise.
        before: the server at the beginning, if it was there.
        seen: what was seen of it while the run went on.
    """
    earlier = {rank_key(rank): rank for rank in before.ranks} if before else {}
    limits = view.thresholds
    told: dict[str, list[tuple[float, Verdict, PhaseFigures]]] = {}
    for rank, document in zip(view.ranks, ranks, strict=True):
        old, looked = earlier.get(rank_key(rank)), seen.ranks[rank_key(rank)]
        # Idle time is no reason to call a load something else: only time with work pending counts.
        seconds = sum(figures["seconds"] for figures in document["phases"].values())
        seconds += document["idle_seconds"]["blocked"]
        for phase, of_phase in document["phases"].items():
            if phase == "dummy":
                continue
            figures = _figures(phase, rank, old, of_phase, seconds, looked)
            observed = by_counter(_observation(phase, rank, figures, seconds, looked), limits)
            figures = observed.figures or figures
            told.setdefault(phase, []).append((figures.seconds, _judge(observed, figures, limits), figures))
    verdicts = {phase: combine([(time, verdict) for time, verdict, _ in of]) for phase, of in told.items()}
    engines_before = {engine.engine: engine for engine in before.engines} if before else {}
    loads = {
        engine.engine: _load(engine, engines_before.get(engine.engine), document, view.flags)
        for engine, document in zip(view.engines, engines, strict=True)
    }
    pressure = worst(
        [*seen.pressure.values(), *(found for load in loads.values() for found in pressures(load, limits))]
    )
    recorded = bool(view.ranks)
    pid = view.ranks[0].facts.get("pid") if recorded else None
    target = Target(
        view.server,
        view.framework,
        view.flags,
        pid if isinstance(pid, int) else None,
        running=False,
        clock=view.ranks[0].clock if recorded else "",
        measurable=not recorded or measurable(view.ranks[0].facts),
    )
    advice: dict[str, tuple[Advice, ...]] = {
        phase: advise(verdict, max(told[phase], key=lambda item: item[0])[2], target)
        for phase, verdict in verdicts.items()
        if verdict.bottleneck != IDLE  # of too few steps nobody can say that they are healthy
    }
    relief: dict[str, tuple[Advice, ...]] = {}
    for kind, pressing in pressure.items():
        if pressing.active and pressing.engine in loads:
            # Preemptions are of the whole run; what ran when the cache was fullest is what it could not hold.
            moment = seen.moments.get("kv_cache" if kind == "preemption" else kind)
            if moment is not None and moment.engine != pressing.engine:
                moment = None
            load = _at_worst(loads[pressing.engine], moment)
            relief[kind] = advise_pressure(pressing, load, target)
    said = _no_verdict(verdicts, recorded) or headline(verdicts, pressure, loads, recorded=recorded)
    return {
        "headline": said,
        "verdicts": plain(verdicts),
        "pressure": plain(pressure),
        "advice": plain(in_its_order(said, advice, relief)),
    }


def _observation(
    phase: str, rank: RankView, figures: PhaseFigures, seconds: float, looked: RankSeen
) -> Observation:
    return Observation(
        phase,
        seconds,
        figures,
        rank.clock,
        rank.peaks,
        rank.attainable,
        kernels=looked.kernels.get(phase),
        windows_on=rank.windows_on,
        counters=looked.counters,
        host=looked.host,
        one_graph=phase in looked.one_graph,
        no_model=rank.no_model,
        no_peaks=rank.no_peaks,
        experts=rank.experts,
        expert_parallel=rank.expert_parallel,
    )


def _judge(observed: Observation, figures: PhaseFigures, limits: Thresholds) -> Verdict:
    """As live. A phase that fills its run may all the same be a handful of steps: those tell nothing."""
    long = figures.seconds >= limits.idle_share_ratio * WINDOW_SECONDS
    if figures.steps >= min(_FEWEST_STEPS, limits.idle_steps) or long:
        verdict = classify(observed, limits)
        if verdict.bottleneck != IDLE:
            return verdict
    steps, are = figures.steps, "step in this run is" if figures.steps == 1 else "steps in this run are"
    return Verdict(
        observed.phase,
        IDLE,
        None,
        1.0,
        f"{steps} {are} too few for a verdict",
        steps_per_second=figures.steps_per_second,
        share_ratio=figures.seconds / observed.window_seconds if observed.window_seconds > 0 else 0.0,
        clock=observed.clock,
    )


def _no_verdict(verdicts: Mapping[str, Verdict], recorded: bool) -> str:
    """The headline where no phase is judged; else empty."""
    if not verdicts:
        return "IDLE: no steps in this run." if recorded else ""
    longest = max(verdicts.values(), key=lambda verdict: verdict.share_ratio)
    few = all(verdict.bottleneck == IDLE for verdict in verdicts.values())
    return f"CAN'T TELL: {longest.phase}: {longest.reason}." if few else ""


def _at_worst(load: EngineLoad, moment: EngineView | None) -> EngineLoad:
    """What advice on pressure of a moment asks for, as it was then; over a run there is no such thing."""
    if moment is None:
        return load
    return replace(
        load,
        running=moment.requests_running,
        waiting=moment.requests_waiting,
        kv_usage=moment.kv_usage,
        kv_peak=moment.kv_peak,
        front_end=moment.front_end.fullest if moment.front_end is not None else None,
    )


def _figures(
    phase: str,
    rank: RankView,
    before: RankView | None,
    document: Mapping[str, Any],
    run_seconds: float,
    looked: RankSeen,
) -> PhaseFigures:
    """A phase of the report as figures. ``document`` leaves out the host gap where nobody tells it."""
    told = document["components_seconds"]
    components = {name: told.get(name, 0.0) for name in COMPONENTS if name not in IDLE_COMPONENTS}
    # What is no step's (an encoder, lost ones) is no headroom of those that are judged.
    seconds, steps = work_seconds(phase, rank, before)[0] or document["seconds"], document["steps"]
    # Figures have gaps as the step clock saw them, and `classify` takes out what windows saw in them. Totals
    # have had that taken out: it is put back, so that it is not taken out twice.
    taken = min(looked.prepared.get(phase, 0.0), components["inefficiency"])
    gap = components["host_gap"] + taken
    step = document.get("step_seconds") or {}
    prompt, decode = looked.tokens.get(phase, (0.0, 0.0))
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
        prompt_tokens=round(prompt * steps),
        decode_tokens=round(decode * steps),
        steps_per_second=steps / run_seconds if run_seconds > 0 else 0.0,
        step_seconds_p50=step.get("p50", 0.0),
        step_seconds_p99=step.get("p99", 0.0),
        floor_seconds=document.get("floor_step_seconds"),
        mbu_step=document.get("mbu_step"),
        mbu_busy=document.get("mbu_busy"),
        mfu_step=document.get("mfu_step"),
        mfu_busy=document.get("mfu_busy"),
        sync_gap_ratio=document["sync_gap_ratio"],
        # Windows have been applied to a part of the totals, mostly: `classify` applies them to all of it.
        sync_gap_is_lower_bound=True,
        intensity=document.get("intensity_flops_per_byte"),
        components=components,
        operator_floors={name: pair for name, pair in by_operator.items() if pair[0] > 0 or pair[1] > 0},
    )


def work_seconds(phase: str, rank: RankView, before: RankView | None) -> tuple[float, float]:
    """What the run's work of a phase took: seconds with the gaps before steps, and busy ones."""
    seconds, busy = rank.work_seconds.get(phase, (0.0, 0.0))
    old, old_busy = before.work_seconds.get(phase, (0.0, 0.0)) if before else (0.0, 0.0)
    return seconds - old, busy - old_busy


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
        output_lag_seconds=mean("output_lag_seconds"),
        full_steps_ratio=None,
        max_num_seqs=limit if isinstance(limit, int) else None,
        prompt_tokens=document["prompt_tokens"],
        generated_tokens=document["generated_tokens"],
    )
