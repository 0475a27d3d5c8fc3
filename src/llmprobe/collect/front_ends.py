"""Engines as their front ends see them: requests, tokens, latencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmprobe.collect.process import Process
from llmprobe.collect.recent import Recent
from llmprobe.collect.views import EngineView, HistogramView
from llmprobe.compute.host import HostSignals
from llmprobe.record import layout

LATENCIES = (
    "time_to_first_token",
    "time_per_output_token",
    "inter_token_latency",
    "request_duration",
    "request_queue",
    "output_lag",
)
#: What only vLLM's front ends have.
_OF_FRONT_ENDS = ("output_lag",)
_JUST_BEGAN_SECONDS = 5.0


@dataclass(frozen=True)
class FrontTotals:
    """Cumulative totals of several front ends of one engine."""

    counters: dict[str, int]
    latency: dict[str, HistogramView]

    @classmethod
    def of(cls, fronts: Iterable[Process], more: FrontTotals | None) -> FrontTotals:
        """The sum over ``fronts``, and ``more``."""
        parts = [cls(front.counters, {name: front.histogram(name) for name in LATENCIES}) for front in fronts]
        if more is not None:
            parts.append(more)
        return cls(
            {name: sum(part.counters[name] for part in parts) for name in layout.COUNTERS},
            {name: _merge([part.latency[name] for part in parts]) for name in LATENCIES},
        )

    def save(self) -> dict[str, Any]:
        """As JSON."""
        latency = {name: [view.counts.tolist(), view.sum] for name, view in self.latency.items()}
        return {"counters": self.counters, "latency": latency}

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> FrontTotals:
        """From `save`."""
        nothing = [np.zeros(layout.BUCKETS, dtype=np.uint64), 0.0]
        latency = {
            name: HistogramView(np.array(counts, dtype=np.uint64), total)
            for name, (counts, total) in {**dict.fromkeys(LATENCIES, nothing), **saved["latency"]}.items()
        }
        return cls({**dict.fromkeys(layout.COUNTERS, 0), **saved["counters"]}, latency)


class FrontEnds:
    """The engines of every view; keeps the totals of front ends that left, and the last 30 s."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, int], FrontTotals] = {}  # of front ends no longer read
        self._recent: dict[tuple[str, int], Recent] = {}

    def leave(self, key: str, process: Process) -> None:
        """A front end is no longer read: totals never fall while the server lives."""
        at = key, process.engine
        self._left[at] = FrontTotals.of([process], self._left.get(at))

    def keep(self, living: set[str]) -> None:
        """Forget the views that are gone."""
        self._left = {at: left for at, left in self._left.items() if at[0] in living}
        self._recent = {at: seen for at, seen in self._recent.items() if at[0] in living}

    def save(self) -> list[Any]:
        """As JSON."""
        return [[*at, totals.save()] for at, totals in self._left.items()]

    def restore(self, saved: Iterable[Any]) -> None:
        """From `save`."""
        for key, engine, totals in saved:
            self._left[key, engine] = FrontTotals.restore(totals)

    def engines(
        self,
        key: str,
        fronts: list[Process],
        dead: list[Process],
        capacity: dict[int, int],
        now: int,
        program_kv: Callable[[Process], int | None],
        host: Callable[[Process], HostSignals | None],
    ) -> list[EngineView]:
        """The engines of one view.

        Args:
            fronts: its front ends, or its program.
            dead: front ends that died and are still read: their part stays in the totals.
            capacity: bytes of KV cache by engine, where known.
            now: CLOCK_MONOTONIC nanoseconds.
            program_kv: bytes in a program's cache.
            host: signals of a front end's process, where it does nothing else.
        """
        engines: list[EngineView] = []
        for engine in sorted({front.engine for front in fronts}):
            of = [front for front in fronts if front.engine == engine]
            all_of = of + [front for front in dead if front.engine == engine]
            known = FrontTotals.of(all_of, self._left.get((key, engine)))
            began = min(float(front.facts.get("started", 0.0)) for front in all_of)
            # Every front end hears of the whole engine's load; the one that heard last knows best.
            told = [front.load for front in of if front.load and front.load.armed and not front.load.inert]
            load = max(told, key=lambda seen: seen.time, default=None)  # none while nobody tells
            # Whoever had a token waits for something else: room to go on, more of the client's input.
            starving = min(load.waiting, sum(seen.tokenless for seen in told)) if load else 0
            just_began = 0 <= time.time() - began < _JUST_BEGAN_SECONDS
            recent = self._recent.setdefault((key, engine), Recent())
            usage = load.kv_usage if load is not None and load.kv_usage == load.kv_usage else None
            waited_for = usage if load is not None and load.waiting else None
            recent.update(now, known.counters, known.latency, just_began, starving, waited_for)
            used = None
            if usage is not None and engine in capacity:
                used = round(usage * capacity[engine])
            elif of[0].role == "program":
                used = program_kv(of[0])
            view = _view(engine, known, recent, of[0].role == "frontend", load, usage, used)
            view.front_end = _busiest(map(host, of))
            engines.append(view)
        return engines


def _busiest(signals: Iterable[HostSignals | None]) -> HostSignals | None:
    """Of several front ends the one that has least time left: each serves requests of its own."""
    known = [(seen.fullest.taken_ratio, seen) for seen in signals if seen is not None and seen.fullest]
    return max(known, key=lambda item: item[0])[1] if known else None


def _view(
    engine: int,
    known: FrontTotals,
    recent: Recent,
    frontend: bool,
    load: Any,
    usage: float | None,
    used: int | None,
) -> EngineView:
    totals = known.counters
    return EngineView(
        engine=engine,
        requests_running=load.running if load is not None else None,
        requests_waiting=load.waiting if load is not None else None,
        kv_usage=usage,
        kv_used_bytes=used,
        prompt_tokens=totals["prompt_tokens"],
        generated_tokens=totals["generated_tokens"],
        cached_tokens=totals["cached_tokens"],
        preemptions=totals["preemptions"],
        requests=totals["requests"],
        requests_aborted=totals["requests_aborted"],
        latency={
            name: seen for name, seen in known.latency.items() if frontend or name not in _OF_FRONT_ENDS
        },
        recent_latency=recent.latency,
        recent_counts=recent.counts,
        first_tokens_queued=totals["first_tokens_queued"],
        first_token_queue_seconds=totals["sum_ns_first_token_queue"] / 1e9,
        recent_queue_seconds=recent.queue_seconds,
        starved_seconds=recent.starved_seconds if load is not None else None,
        backlog_seconds=recent.backlog_seconds if load is not None else None,
        kv_peak=recent.kv_peak,
        own_seconds=totals["own_ns_request"] / 1e9,
        own_thread_seconds=totals["thread_ns_request"] / 1e9,
        errors=totals["errors"] if frontend else 0,
    )


def _merge(views: list[HistogramView]) -> HistogramView:
    if len(views) == 1:
        return views[0]
    counts = np.stack([view.counts for view in views]).sum(axis=0)
    return HistogramView(counts, sum(view.sum for view in views))
