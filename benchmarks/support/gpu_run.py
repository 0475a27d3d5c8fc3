"""One scenario on a server: its load, what goes on meanwhile, what is seen, and its label."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from llmprobe.compute.hardware import lookup
from support import gpm
from support.gpu_labels import Facts
from support.gpu_scenario_list import Requests, Scenario
from support.gpu_scenario_servers import Kind, Served, Workshop
from support.gpu_timing import BEFORE_SECONDS
from support.labels import Client, Label
from support.load import Load
from support.machine import has_gpu
from support.nsys_idle import Idle, idle
from support.nsys_server import NsysFailed
from support.nsys_truth import read_truth
from support.outcomes import Outcome
from support.serving import NAME
from support.switch import until
from support.watching import Trace, Watching, classes, score, unchanged_seconds

_BETWEEN_SECONDS, _LOOK_SECONDS = 1.0, 1.0
_STEADY_AFTER_SECONDS = 5.0
_WARM_TOKENS = 4
_WARM_SECONDS = 120.0
#: Verdicts are of the last 10 s: for so long after it, one may still be of the warm-up.
_SETTLED_SECONDS = 15.0
_TRACED_SECONDS = 0.6
_NO_CLAIM = ("unknown", "idle")


class Measuring:
    """Runs scenarios on one server, one after another.

    Args:
        seconds: of each scenario, from its first request on.
        steady: one ends when its verdict has not changed for so many seconds, if that is earlier.
    """

    def __init__(
        self, served: Served, workshop: Workshop, kind: Kind, seconds: float, steady: float | None = None
    ) -> None:
        self._served, self._server = served, served.server
        self._workshop, self._kind = workshop, kind
        self._seconds, self._steady = seconds, float("inf") if steady is None else steady
        self._before: dict[str, str] = {}
        self._recordings = 0
        self._bandwidth = gpm.bandwidth() if has_gpu() else float("inf")
        peaks = lookup(gpm.name(), kind.dtype) if has_gpu() else None
        self._flops = peaks.flops_per_second if peaks is not None else float("inf")

    def warm_up(self, loads: Iterable[Requests]) -> None:
        """Send requests of every shape once: what is compiled for them is no part of a steady load."""
        with Watching(self._server) as watching:
            for load in dict.fromkeys(replace(load, output_tokens=1, pause_seconds=0.0) for load in loads):
                short = Load(self._server.port, NAME, load.concurrency, load.prompt_tokens, _WARM_TOKENS)
                with short:
                    until(functools.partial(_answered, short), _WARM_SECONDS)
            time.sleep(_BETWEEN_SECONDS)
            # One of the warm-up that comes up once the first scenario runs would be a third class there.
            until(lambda: set(classes(watching.trace).values()) <= {"idle"}, _SETTLED_SECONDS)
        self._before = classes(watching.trace)

    def run(self, scenario: Scenario, clients: Mapping[str, Client]) -> Outcome:
        """One scenario. Raises LoadFailed and whatever a server that ends leads to.

        Args:
            clients: what those of earlier scenarios timed, by name.
        """
        reference = clients.get(scenario.reference or "")
        try:
            return self._run(scenario, reference)
        finally:
            self._workshop.slow(0)
            self._workshop.lie(0)

    def _run(self, scenario: Scenario, reference: Client | None) -> Outcome:
        server, workshop = self._server, self._workshop
        seconds = max(self._seconds, scenario.least_seconds)
        with contextlib.ExitStack() as stack:
            old, before = None, self._before
            if scenario.before is None:
                time.sleep(_BETWEEN_SECONDS)
            else:
                workshop.slow(_sleep(scenario.before.slow_steps, 0.0, reference))
                old = stack.enter_context(scenario.before.load.on(server))
                with Watching(server) as earlier:
                    old.wait(BEFORE_SECONDS)
                before = {**before, **classes(earlier.trace)}
            if scenario.disturb is not None:
                stack.enter_context(scenario.disturb(server))
            workshop.lie(scenario.clock_ratio)
            workshop.slow(_sleep(scenario.slow_steps, scenario.slow_seconds, reference))
            begin_ns = time.monotonic_ns()
            goes_on = scenario.before is not None and scenario.before.load == scenario.load
            load: Load | None = old
            if not goes_on:
                load = stack.enter_context(scenario.load.on(server)) if scenario.load else None
                if old is not None:
                    old.__exit__(None, None, None)
            wait = load.wait if load else time.sleep
            steady = min(_STEADY_AFTER_SECONDS, seconds / 2)
            counters = gpm.Counters()
            with Watching(server) as watching:
                wait(steady)
                with counters:
                    until_ns = begin_ns + round(seconds * 1e9)
                    least_ns = begin_ns + round(scenario.least_seconds * 1e9)
                    while (now := time.monotonic_ns()) < until_ns:
                        if now >= least_ns and self._is_steady(watching.trace, scenario):
                            break
                        wait(min(_LOOK_SECONDS, (until_ns - now) / 1e9))
            traced = self._traced() if load is not None else None
            rows = load.requests() if load is not None else None
        requests, client = scenario.load or Requests(0, 0, 0), Client(0, None, None)
        if rows is not None:
            rows = rows[rows["sent"] >= begin_ns]
            client = Client.of(rows, requests.output_tokens)
        trace = watching.trace
        facts = Facts(
            workshop.sizes(self._kind),
            self._bandwidth,
            self._flops,
            counters.ratios,
            client,
            reference,
            requests.concurrency,
            requests.prompt_tokens,
            requests.output_tokens,
            trace.engine_figures(),
            trace.tokens(),
            trace.prompt_tokens_per_second(steady),
            scenario.clock_ratio or 1.0,
            traced,
        )
        label = _changed(scenario.rule(facts), scenario, before)
        self._before = classes(trace)
        steady_at = 0.0 if goes_on else _steady_at(rows, begin_ns, requests.concurrency)
        scored = score(trace, label, scenario.phase, before, steady_at)
        return Outcome(scenario.name, facts, label, scored, trace)

    def _is_steady(self, trace: Trace, scenario: Scenario) -> bool:
        return unchanged_seconds(trace, scenario.phase) >= self._steady

    def _traced(self) -> Idle | None:
        """What nsys says while the load goes on, after the verdicts were taken down."""
        if self._served.record is None:
            return None
        self._recordings += 1
        try:
            return idle(read_truth(self._served.record(f"scenario-{self._recordings}", _TRACED_SECONDS)))
        except (
            NsysFailed,
            ValueError,
            sqlite3.Error,
        ) as error:
            print(f"no trace: {error}", file=sys.stderr, flush=True)
            return None


def _answered(load: Load) -> bool:
    """Whether as many requests are over as run at a time. Raises LoadFailed."""
    load.wait(0)
    return len(load.requests()) >= load.concurrency


def _changed(label: Label, scenario: Scenario, before: Mapping[str, str]) -> Label:
    """A change of load can be scored if there was a verdict before it, and another one has to follow."""
    if scenario.before is None:
        return label
    stood = before.get(scenario.before.phase, "unknown")
    same = scenario.before.phase == scenario.phase and stood in label.classes
    if stood not in _NO_CLAIM and not same:
        return label
    return replace(label, rule=f"{label.rule}; before the change: {stood}", holds=False)


def _steady_at(rows: np.ndarray | None, begin_ns: int, concurrency: int) -> float:
    """Seconds until each of the first requests had its first token, at most until counters are read.

    While long prompts are read at the start, a load that decodes has not begun.
    """
    if rows is None or not len(rows):
        return 0.0
    first = np.sort(rows["first"])[:concurrency]
    return min((int(first[-1]) - begin_ns) / 1e9, _STEADY_AFTER_SECONDS)


def _sleep(steps: float, seconds: float, reference: Client | None) -> float:
    if steps and reference is not None and reference.tpot_seconds:
        return steps * reference.tpot_seconds
    return seconds
