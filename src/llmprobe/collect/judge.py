"""Judges servers: what each phase is bound by, what presses, what to do, and the headline. Once a second.

Keeps what hysteresis needs, and for how long each verdict stood.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from llmprobe.collect.peaks import measurable
from llmprobe.collect.process import Rank
from llmprobe.collect.verdict_window import VerdictWindow
from llmprobe.collect.views import EngineView, RankView, ServerView
from llmprobe.compute.advice import Advice, Target, advise, advise_pressure, advise_stall
from llmprobe.compute.attribution import attribute
from llmprobe.compute.classify import classify
from llmprobe.compute.evidence import CounterEvidence
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.graphs import launched_whole
from llmprobe.compute.headline import headline, in_its_order, leading, stalled
from llmprobe.compute.pressure import EngineLoad, pressures, worst
from llmprobe.compute.routing import by_counter
from llmprobe.compute.servers import combine
from llmprobe.compute.stall import RunningStep
from llmprobe.compute.steady import SHORT_SECONDS, WINDOW_SECONDS, Steady
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import Observation, Verdict
from llmprobe.record import layout

_WINDOW_NS, _SHORT_NS = round(WINDOW_SECONDS * 1e9), round(SHORT_SECONDS * 1e9)
_LOAD_NS = 30 * 10**9
#: Half of its share of the steps makes a short window worth judging: steps do not come evenly.
_SHORT_STEPS = SHORT_SECONDS / WINDOW_SECONDS / 2
_LONGEST_LOOK_SECONDS = 5.0  # between two looks; beyond it nobody knows what was so
_LOOK_SECONDS = 1.0  # between two looks at the counters
_NOT_JUDGED = ("dummy",)
_PROMPT_PHASES = (layout.PHASES.index("prefill"), layout.PHASES.index("mixed"))


class Judge:
    """Fills in what `ServerView` says beyond figures. Not thread-safe.

    Args:
        limits: thresholds.
    """

    def __init__(self, limits: Thresholds) -> None:
        self._limits = limits
        self._states: dict[tuple[str, str], Steady] = {}
        self._stood: dict[str, dict[str, dict[str, dict[str, float]]]] = {}  # view, phase, class, cause
        self._looked: dict[str, int] = {}
        self._led: dict[str, frozenset[str]] = {}  # kinds of pressure that took the headline

    def judge(self, key: str, view: ServerView, ranks: list[tuple[RankView, Rank]], now_ns: int) -> None:
        """Judge one server.

        Args:
            key: the server's, for its life.
            view: gets verdicts, pressure, advice and headline; its ranks get their attribution.
            ranks: the view of each rank and where it comes from.
            now_ns: CLOCK_MONOTONIC nanoseconds.
        """
        if not view.armed or view.inert:
            self._states = {at: state for at, state in self._states.items() if at[0] != key}
            self._led.pop(key, None)
            why = "the probe gave up after internal errors" if view.inert else "the probe is switched off"
            view.headline = f"OFF: {why}."
        else:
            figures = self._verdicts(key, view, ranks, now_ns)
            self._press(key, view, ranks, now_ns)
            self._advise(view, figures)
            hanging = [rank for rank in view.ranks if rank.stall is not None]
            if hanging:
                longest = max(hanging, key=lambda rank: rank.stall.seconds if rank.stall else 0.0)
                assert longest.stall is not None
                view.headline = stalled(longest.rank, longest.stall)
                # What would make steps faster helps nobody whose step does not end.
                view.advice = {"stall": advise_stall(longest.stall, _target(view, longest))}
        self._count(key, view.verdicts, now_ns)
        view.bottleneck_seconds = copy.deepcopy(self._stood.get(key, {}))  # views are read by other threads

    def keep(self, living: set[str]) -> None:
        """Forget the views that are gone."""
        self._states = {at: state for at, state in self._states.items() if at[0] in living}
        self._stood = {key: stood for key, stood in self._stood.items() if key in living}
        self._looked = {key: at for key, at in self._looked.items() if key in living}
        self._led = {key: led for key, led in self._led.items() if key in living}

    def save(self) -> dict[str, Any]:
        """For how long each verdict stood, as JSON."""
        return self._stood

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`."""
        self._stood = saved

    def _verdicts(
        self, key: str, view: ServerView, ranks: list[tuple[RankView, Rank]], now_ns: int
    ) -> dict[str, PhaseFigures]:
        """Judge every phase that was ever seen; returns its figures on the rank it took most time on."""
        phases = {phase for shown, _ in ranks for phase in _phases(shown) if phase not in _NOT_JUDGED}
        whole: dict[str, list[tuple[float, Verdict]]] = {phase: [] for phase in phases}
        short: list[Callable[[str], tuple[float, Verdict]]] = []
        largest: dict[str, PhaseFigures] = {}
        known = bool(view.engines)
        for shown, rank in ranks:
            long = VerdictWindow(rank, now_ns, _WINDOW_NS)
            lately = functools.cache(functools.partial(VerdictWindow, rank, now_ns, _SHORT_NS))
            observed: dict[str, tuple[float, Observation]] = {}
            shown.attribution = attribute(long.steps, shown.kernels)
            for phase in phases:
                state = self._states.get((key, phase), Steady())
                long_seconds, found = long.seconds(phase), long.figures(phase, known, operators=True)
                tokens = functools.partial(
                    rank.tokens, long.since(phase), now_ns, (layout.PHASES.index(phase),)
                )
                seen = Observation(
                    phase,
                    long_seconds,
                    found,
                    shown.clock,
                    rank.peaks,
                    rank.attainable,
                    kernels=shown.kernels.get(phase),
                    windows_on=shown.windows_on,
                    counters=_counters_within(shown, long_seconds),
                    host=shown.host,
                    one_graph=launched_whole(shown.facts.get("flags") or {}, phase, tokens),
                    no_model=shown.no_model,
                    no_peaks=shown.no_peaks,
                    experts=shown.experts,
                    expert_parallel=shown.expert_parallel,
                    running=_running(shown, phase),
                )
                seen = by_counter(seen, self._limits)
                found = seen.figures
                weight = found.seconds if found else 0.0
                if seen.running is not None:
                    weight += seen.running.pending_seconds
                whole[phase].append((weight, classify(seen, self._limits, state.standing)))
                observed[phase] = weight, seen
                if found and (phase not in largest or found.seconds > largest[phase].seconds):
                    largest[phase] = found
            short.append(functools.partial(self._lately, key, shown, observed, lately, known))
        for phase in layout.PHASES:
            if phase in phases:
                state = self._states.get((key, phase), Steady())
                brief = found_now = combine(whole[phase])
                if not _stands(state, found_now):  # else nothing depends on the last seconds
                    brief = combine([of_rank(phase) for of_rank in short])
                state = state.observe(now_ns / 1e9, found_now, brief)
                self._states[key, phase] = state
                if state.shown is not None:
                    view.verdicts[phase] = state.shown
        return largest

    def _lately(
        self,
        key: str,
        shown: RankView,
        observed: Mapping[str, tuple[float, Observation]],
        window: Callable[[], VerdictWindow],
        known_gaps: bool,
        phase: str,
    ) -> tuple[float, Verdict]:
        """The weight of a rank, and the verdict on its last seconds."""
        weight, seen = observed[phase]
        lately = dataclasses.replace(
            seen,
            window_seconds=window().seconds(phase),
            figures=window().figures(phase, known_gaps, operators=seen.experts is not None),
            counters=shown.counters_lately,
            routing=None,
        )
        standing = self._states.get((key, phase), Steady()).standing
        return weight, classify(
            by_counter(lately, self._limits), self._limits, standing, self._limits.idle_steps * _SHORT_STEPS
        )

    def _press(self, key: str, view: ServerView, ranks: list[tuple[RankView, Rank]], now_ns: int) -> None:
        full = {
            engine.engine: self._full_steps(
                [rank for shown, rank in ranks if shown.engine == engine.engine], view.flags, now_ns
            )
            for engine in view.engines
        }
        loads = {
            engine.engine: _load(engine, full[engine.engine], view.flags.get("max_num_seqs"))
            for engine in view.engines
        }
        view.pressure = worst(found for load in loads.values() for found in pressures(load, self._limits))
        view.headline = headline(
            view.verdicts,
            view.pressure,
            loads,
            recorded=bool(view.ranks),
            running_seconds=max(map(_runs_for, view.ranks), default=0.0),
            led=(led := self._led.get(key, frozenset())),
        )
        lead = leading(view.verdicts, view.pressure, loads, led)
        self._led[key] = frozenset(pressure.kind for pressure in lead)
        target = _target(view)
        for kind, pressure in view.pressure.items():
            if pressure.active:
                view.advice[kind] = advise_pressure(pressure, loads[pressure.engine], target)

    def _full_steps(self, ranks: list[Rank], flags: Mapping[str, Any], now_ns: int) -> float | None:
        """Share of steps with prompts that filled the scheduler's token budget; None if that is not known."""
        budget = flags.get("max_num_batched_tokens")
        if not ranks or not isinstance(budget, int) or isinstance(budget, bool):
            return None
        # Every rank runs the same steps.
        tokens = ranks[0].tokens(now_ns - _LOAD_NS, now_ns, _PROMPT_PHASES)
        if not len(tokens):
            return None
        return float((tokens >= self._limits.token_budget_ratio * budget).mean())

    def _advise(self, view: ServerView, figures: Mapping[str, PhaseFigures]) -> None:
        target = _target(view)
        found: dict[str, tuple[Advice, ...]] = {
            phase: advise(verdict, figures.get(phase), target) for phase, verdict in view.verdicts.items()
        }
        view.advice = in_its_order(view.headline, found, view.advice)

    def _count(self, key: str, verdicts: Mapping[str, Verdict], now_ns: int) -> None:
        before = self._looked.get(key)
        self._looked[key] = now_ns
        if before is None:
            return
        seconds = min(max(now_ns - before, 0) / 1e9, _LONGEST_LOOK_SECONDS)
        for phase, verdict in verdicts.items():
            of_class = (
                self._stood.setdefault(key, {}).setdefault(phase, {}).setdefault(verdict.bottleneck, {})
            )
            cause = verdict.cause or ""
            of_class[cause] = of_class.get(cause, 0.0) + seconds


def _runs_for(rank: RankView) -> float:
    """For how long a step has been running, with work pending: seconds."""
    running = rank.running
    return running.seconds if running is not None and running.pending_seconds > 0 else 0.0


def _phases(rank: RankView) -> set[str]:
    """Of steps that ended, and of the one that runs: it may be the first."""
    running = rank.running
    return {*rank.steps} | ({running.phase} if running is not None and running.phase is not None else set())


def _running(rank: RankView, phase: str) -> RunningStep | None:
    """The step of a phase that has not ended; one that nobody could read may be of any."""
    running = rank.running
    return running if running is not None and running.phase in (phase, None) else None


def _counters_within(rank: RankView, seconds: float) -> CounterEvidence | None:
    """A GPU's counters over a window that does not begin before the rank's, which has lasted for ``seconds``.

    Time before its first step is idle, and would contradict what the steps say.
    """
    for counters, long in ((rank.counters, WINDOW_SECONDS), (rank.counters_lately, SHORT_SECONDS)):
        if seconds >= long - _LOOK_SECONDS:
            return counters
    return None


def _stands(state: Steady, found: Verdict) -> bool:
    shown = state.shown
    return shown is not None and (shown.bottleneck, shown.cause) == (found.bottleneck, found.cause)


def _load(engine: EngineView, full_steps: float | None, max_num_seqs: Any) -> EngineLoad:
    recent = engine.recent_latency

    def mean(name: str) -> float | None:
        return recent[name]["mean"] if name in recent else None

    front = engine.front_end
    settled = front is not None and front.window_seconds >= SHORT_SECONDS
    limit = max_num_seqs if isinstance(max_num_seqs, int) and not isinstance(max_num_seqs, bool) else None
    return EngineLoad(
        engine=engine.engine,
        running=engine.requests_running,
        waiting=engine.requests_waiting,
        kv_usage=engine.kv_usage,
        preemptions=round(engine.recent_counts.get("preemptions", 0)),
        requests=round(engine.recent_counts.get("requests", 0)),
        queue_seconds=engine.recent_queue_seconds,
        first_token_seconds=mean("time_to_first_token"),
        request_seconds=mean("request_duration"),
        full_steps_ratio=full_steps,
        max_num_seqs=limit,
        starved_seconds=engine.starved_seconds,
        backlog_seconds=engine.backlog_seconds,
        kv_peak=engine.kv_peak,
        front_end=front.fullest if front is not None and settled else None,
        output_lag_seconds=mean("output_lag"),
        prompt_tokens=round(engine.recent_counts.get("prompt_tokens", 0)),
        generated_tokens=round(engine.recent_counts.get("generated_tokens", 0)),
    )


def _target(view: ServerView, rank: RankView | None = None) -> Target:
    """``rank``: whose process is meant, if not the first's."""
    rank = rank or (view.ranks[0] if view.ranks else None)
    pid, core = (rank.facts.get(name) if rank else None for name in ("pid", "engine_core_pid"))
    return Target(
        view.server,
        view.framework,
        view.flags,
        pid if isinstance(pid, int) else None,
        core_pid=core if isinstance(core, int) else None,
        clock=rank.clock if rank else "",
        measurable=rank is None or measurable(rank.facts),
    )
