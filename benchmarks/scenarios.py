"""Whether the verdict is right on runs whose truth is known.

    python benchmarks/scenarios.py
    python benchmarks/scenarios.py --only prefill --seconds 75

Serves models of known size on this machine's processor, loads them so that one thing binds them, and holds
what llmprobe says twice a second against a label that comes from elsewhere. Exit status 1 if a verdict is
wrong, late or wavers, 2 if a label did not hold, so that nothing was scored. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support import labels
from support.labels import Client, Facts, Machine
from support.load import Load
from support.machine import machine_line
from support.outcomes import HEADER, Outcome, Run, append, bars, line, status, table_rows
from support.scenario_servers import CHUNK_TOKENS, KINDS, Workshop
from support.serving import NAME
from support.switch import until, wait_known
from support.table import Results, command
from support.waited import Waited
from support.watching import Watching, classes, engine_figures, score

from llmprobe.demo.server import VllmServer

_ALONE_SECONDS = 12.0
_BETWEEN_SECONDS = 1.0
_AGAIN_SECONDS = 2.0
_MOST_SECONDS = 60.0


@dataclass(frozen=True)
class Requests:
    """A closed loop of the client's."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    pause_seconds: float = 0.0

    def on(self, server: VllmServer) -> Load:
        return Load(
            server.port, NAME, self.concurrency, self.prompt_tokens, self.output_tokens, self.pause_seconds
        )


@dataclass(frozen=True)
class Scenario:
    """A run that is bound by one thing.

    Attributes:
        kind: of its server, in `KINDS`.
        rule: gives the label.
        phase: the one judged; None for all.
        load: None for none.
        alone: a load that goes before, without what this one adds, and is timed.
        slow_steps: the host sleeps for so many steps' time between two steps.
        clock_ratio: the step clock tells that share of every span; 0: the truth.
    """

    name: str
    kind: str
    rule: labels.Rule
    phase: str | None
    load: Requests | None
    alone: Requests | None = None
    slow_steps: float = 0.0
    clock_ratio: float = 0.0


_DECODE = Requests(1, 32, 48)
#: In this order: each begins with the load of the one before it just gone, which is the change of load. The
#: load that one is compared with need not run again where it ran just before.
SCENARIOS = (
    Scenario("decode", "large", labels.reads_weights, "decode", _DECODE),
    Scenario(
        "host between steps", "large", labels.waits_for_host, "decode", _DECODE, _DECODE, slow_steps=1.5
    ),
    Scenario("prefill", "large", labels.multiplies, "prefill", Requests(1, 1024, 1)),
    Scenario("idle", "large", labels.runs_nothing, None, None),
    Scenario("light load", "large", labels.lightly_loaded, "decode", Requests(1, 32, 32, 2.5)),
    Scenario("bursts", "large", labels.reads_weights, "decode", Requests(3, 32, 64, 4.0)),
    Scenario("a clock that lies", "large", labels.is_lied_to, "decode", _DECODE, clock_ratio=0.5),
    Scenario("tiny model", "small", labels.by_client_alone, "decode", Requests(1, 32, 96)),
    Scenario(
        "KV cache too small",
        "small",
        labels.waits_for_cache,
        "decode",
        Requests(8, 96, 96),
        Requests(1, 96, 96),
    ),
    Scenario("no peaks", "blind", labels.knows_no_peaks, "decode", _DECODE),
)


def main() -> int:
    """Run the scenarios; returns the exit status."""
    options = _options()
    machine = machine_line()
    chosen = [item for item in SCENARIOS if not options.only or item.name in options.only]
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="llmprobe-scenarios-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        workshop = Workshop(folder)
        peaks = workshop.calibrate(options.calibrate)
        runs: list[Run] = []
        for kind in dict.fromkeys(item.kind for item in chosen):
            with workshop.server(KINDS[kind]) as server:
                wait_known(server.directory)
                bench = Bench(server, workshop, peaks, options.seconds, options.patience)
                for scenario in (item for item in chosen if item.kind == kind):
                    outcome = bench.run(scenario)
                    runs.append(outcome.as_run(machine))
                    append(options.json, runs[-1])
                    print(line(runs[-1]), file=sys.stderr, flush=True)
    _table(runs, machine, peaks, options.seconds, time.monotonic() - begin).show(options.markdown)
    return status(runs)


class Bench:
    """One server, and one scenario after another on it.

    Args:
        seconds: of each scenario, at least.
        patience: for how long one goes on whose label holds while its verdict is not right.
    """

    def __init__(
        self, server: VllmServer, workshop: Workshop, peaks: Machine, seconds: float, patience: float
    ) -> None:
        self._server = server
        self._workshop = workshop
        self._peaks = peaks
        self._seconds = seconds
        self._patience = patience
        self._before: dict[str, str] = {}  # the class of each phase, as last said
        self._plain: tuple[Requests, Client] | None = None  # what ran last, if nothing was injected

    def run(self, scenario: Scenario) -> Outcome:
        """Run it, and hold what was said against its label."""
        print(f"{scenario.name}: {self._seconds:.0f} s", file=sys.stderr, flush=True)
        alone = self._alone(scenario)
        if scenario.slow_steps and alone is not None and alone.tpot_seconds:
            self._workshop.slow(scenario.slow_steps * alone.tpot_seconds)
        self._workshop.lie(scenario.clock_ratio)
        time.sleep(_BETWEEN_SECONDS)
        if scenario.load is None:  # the step that was cut off may be a long one
            until(lambda: engine_figures(self._server).get("running") == 0, _MOST_SECONDS)
        waited = Waited(self._server.process.pid)
        began = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                load = stack.enter_context(scenario.load.on(self._server)) if scenario.load else None
                watching = stack.enter_context(Watching(self._server))
                wait = load.wait if load is not None else time.sleep
                wait(self._seconds)
                outcome = self._outcome(scenario, load, alone, watching, waited)
                # Until a request has ended nobody can tell what the label is.
                while (
                    not (outcome.settled and (load is None or len(load.requests())))
                    and time.monotonic() - began < self._patience
                ):
                    wait(_AGAIN_SECONDS)
                    outcome = self._outcome(scenario, load, alone, watching, waited)
        finally:
            self._workshop.slow(0)
            self._workshop.lie(0)
        self._before = classes(outcome.trace)
        injected = scenario.slow_steps or scenario.clock_ratio
        client = outcome.facts.client
        self._plain = (scenario.load, client) if scenario.load and not injected else None
        return outcome

    def _alone(self, scenario: Scenario) -> Client | None:
        """What the client times without what the scenario adds."""
        if scenario.alone is None:
            return None
        if self._plain is not None and self._plain[0] == scenario.alone:  # it ran just now
            return self._plain[1]
        with Watching(self._server) as watching, scenario.alone.on(self._server) as timed:
            timed.wait(_ALONE_SECONDS)
        self._before = {**self._before, **classes(watching.trace)}
        return Client.of(timed.requests(), scenario.alone.output_tokens)

    def _outcome(
        self,
        scenario: Scenario,
        load: Load | None,
        alone: Client | None,
        watching: Watching,
        waited: Waited,
    ) -> Outcome:
        """As of now."""
        requests = scenario.load
        client = Client(0, None, None)
        if load is not None and requests is not None:
            client = Client.of(load.requests(), requests.output_tokens)
        trace = watching.so_far()
        facts = Facts(
            self._peaks,
            client,
            alone,
            self._workshop.weights_bytes(KINDS[scenario.kind]),
            requests.prompt_tokens if requests is not None else 0,
            CHUNK_TOKENS,
            trace.engine_figures(),
            trace.tokens(),
            scenario.clock_ratio or 1.0,
            waited.ratio(),
        )
        label = scenario.rule(facts)
        return Outcome(scenario.name, facts, label, score(trace, label, scenario.phase, self._before), trace)


def _table(runs: list[Run], machine: str, peaks: Machine, seconds: float, took: float) -> Results:
    notes = [
        f"Peaks: {peaks.bandwidth_bytes_per_second / 1e9:.1f} GB/s, "
        f"{peaks.flops_per_second / 1e9:.0f} GFLOP/s in float32, threads: {peaks.threads}.",
        bars(seconds),
        f"Took {took / 60:.0f} min.",
    ]
    return Results(
        "Verdicts on runs whose truth is known",
        command("scenarios.py"),
        machine,
        HEADER,
        table_rows(runs),
        notes,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [item.name for item in SCENARIOS]
    parser.add_argument("--only", action="append", choices=names, help="this scenario; may be repeated")
    parser.add_argument("--seconds", type=float, default=35.0, help="of each scenario [35]")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="go on for as long where a verdict is not right yet, on a machine that others use too [0]",
    )
    parser.add_argument(
        "--calibrate", type=float, default=2.0, metavar="SECONDS", help="for each of the machine's peaks [2]"
    )
    parser.add_argument("--folder", type=Path, help="keep models (0.8 GB) and peaks there [a temporary one]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add every figure to it, a line a run")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/verdicts.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
