"""Whether the verdict is right on GPU runs whose truth is known.

    python benchmarks/gpu_scenarios.py --json runs.jsonl                everything; an hour
    python benchmarks/gpu_scenarios.py --json runs.jsonl --missing --minutes 9
    CUDA_VISIBLE_DEVICES=1 taskset -c 16-31 python benchmarks/gpu_scenarios.py --server other --steady 61
    python benchmarks/gpu_scenarios.py --server graphs --server eager --seconds 30
    python benchmarks/gpu_scenarios.py --only "odd shapes, prefill" --nsys
    python benchmarks/gpu_scenarios.py --list                           what there is, and how long it takes
    python benchmarks/gpu_scenarios.py --report runs.jsonl              the table of what was saved
    python benchmarks/gpu_scenarios.py --rehearse --seconds 12          the machinery, on any machine

Serves configurations of known size with made-up weights, loads them so that one thing binds them, and holds
what llmprobe says twice a second against a label that comes from elsewhere: a client's times, sizes,
published peaks, the hardware's own counters, nsys, and what was injected. Needs an NVIDIA GPU with 80 GB
and vLLM. Exit status 1 if a verdict is wrong, late or wavers or a run fails, 2 if a label did not hold or
time was over, so that something was not scored. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from support import gpu_timing
from support.gpu_run import Measuring
from support.gpu_scenario_list import SCENARIOS, Scenario, rehearsed, with_references
from support.gpu_scenario_servers import KINDS, Workshop
from support.labels import Client
from support.machine import machine_line
from support.outcomes import BRIEF, HEADER, Run, append, bars, brief, line, read, status, table_rows
from support.switch import wait_known
from support.table import Results, command

from llmprobe.demo.server import ServerFailed


def main() -> int:
    """Run the scenarios; returns the exit status."""
    options = _options()
    if options.list:
        print(gpu_timing.listing(options.seconds))
        return 0
    if options.report:
        runs = read(options.report)
        _show(runs, "; ".join(dict.fromkeys(run["machine"] for run in runs)), [], options.markdown)
        return status(runs)
    begin = time.monotonic()
    machine = machine_line()
    saved = read([path for path in (*options.references, options.json) if path])
    series = _Series(options, machine, _clients(saved, machine))
    chosen = _chosen(options, series.clients)
    with tempfile.TemporaryDirectory(prefix="llmprobe-scenarios-") as folder:
        workshop = Workshop(Path(folder), options.rehearse, options.nsys)
        for kind in dict.fromkeys(item.kind for item in chosen):
            series.run(kind, [item for item in chosen if item.kind == kind], workshop)
    notes = [bars(options.seconds, options.steady), f"Took {(time.monotonic() - begin) / 60:.0f} min."]
    if series.skipped:
        notes.append(f"Not run, as {options.minutes:g} min were over: {'; '.join(series.skipped)}.")
    if options.rehearse:
        notes.append("A rehearsal: every model is tiny, so no label means anything.")
    _show(series.runs, machine, notes, options.markdown)
    return status(series.runs) or (2 if series.skipped else 0)


class _Series:
    """Scenarios in a row. Each is saved and told as it ends.

    ``clients`` are what those of earlier runs timed, by scenario; ``skipped`` are those that time was up for.
    """

    def __init__(self, options: argparse.Namespace, machine: str, clients: dict[str, Client]) -> None:
        self._options, self._machine = options, machine
        self._deadline = gpu_timing.Deadline(options.minutes)
        self.clients = clients
        self.runs: list[Run] = []
        self.skipped: list[str] = []

    def run(self, kind: str, scenarios: list[Scenario], workshop: Workshop) -> None:
        """All of one server. What fails is told, and the end of as little as can be."""
        deadline, seconds, nsys = self._deadline, self._options.seconds, self._options.nsys
        if not deadline.reaches(deadline.start_seconds + gpu_timing.needed(scenarios[0], seconds, nsys)):
            self.skipped += [item.name for item in scenarios]
            return
        left = list(scenarios)
        try:
            with contextlib.ExitStack() as stack:
                with deadline.starting():
                    served = stack.enter_context(workshop.server(KINDS[kind]))
                    wait_known(served.server.directory)
                    measuring = Measuring(served, workshop, KINDS[kind], seconds, self._options.steady)
                    measuring.warm_up([item.load for item in scenarios if item.load])
                while left:
                    scenario = left[0]
                    if not deadline.reaches(gpu_timing.needed(scenario, seconds, nsys)):
                        self.skipped.append(left.pop(0).name)
                        continue
                    self._one(left.pop(0), measuring)
                    if (ended := served.server.process.poll()) is not None:
                        raise ServerFailed(f"the server ended with exit status {ended}")
        except Exception as error:  # noqa: BLE001 - the others are worth their time
            for scenario in left:
                self._failed(scenario, error)

    def _one(self, scenario: Scenario, measuring: Measuring) -> None:
        print(f"{scenario.name} ...", file=sys.stderr, flush=True)
        try:
            outcome = measuring.run(scenario, self.clients)
        except Exception as error:  # noqa: BLE001 - the others are worth their time
            self._failed(scenario, error)
            return
        self.clients[scenario.name] = outcome.facts.client
        self._keep(outcome.as_run(self._machine))

    def _failed(self, scenario: Scenario, error: Exception) -> None:
        words = f"{type(error).__name__}: {error}"
        print(words, file=sys.stderr, flush=True)
        self._keep({"name": scenario.name, "machine": self._machine, "error": words})

    def _keep(self, run: Run) -> None:
        self.runs.append(run)
        append(self._options.json, run)
        print(line(run), file=sys.stderr, flush=True)


def _clients(saved: list[Run], machine: str) -> dict[str, Client]:
    """What clients timed in runs that were saved of this processor and GPU, by scenario."""
    here = _device(machine)
    runs = [run for run in saved if "error" not in run and _device(run["machine"]) == here]
    return {run["name"]: Client(**run["facts"]["client"]) for run in runs}


def _device(machine: str) -> list[str]:
    return machine.split("; ")[:2]


def _chosen(options: argparse.Namespace, clients: Mapping[str, Client]) -> list[Scenario]:
    every = not options.only and not options.server
    chosen = [
        item
        for item in SCENARIOS
        if every or item.name in (options.only or ()) or item.kind in (options.server or ())
    ]
    if options.missing:
        done = {run["name"] for run in read([options.json]) if "error" not in run}
        chosen = [item for item in chosen if item.name not in done]
    chosen = with_references(chosen, set(clients))
    names = {item.name for item in chosen} | set(clients)
    for item in chosen:
        if item.reference is not None and item.reference not in names:
            print(f"{item.name}: nothing to compare with: run {item.reference!r} too", file=sys.stderr)
    return [rehearsed(item) for item in chosen] if options.rehearse else chosen


def _show(runs: list[Run], machine: str, notes: list[str], markdown: bool) -> None:
    title, rows = "Verdicts on GPU runs whose truth is known", table_rows(runs)
    header, rows = (HEADER, rows) if markdown else (BRIEF, brief(rows))
    Results(title, command("gpu_scenarios.py"), machine, header, rows, notes).show(markdown)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=gpu_timing.listing(75),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [item.name for item in SCENARIOS]
    parser.add_argument("--list", action="store_true", help="print the scenarios by server, and end")
    parser.add_argument("--server", action="append", choices=sorted(KINDS), help="its scenarios; repeatable")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="this one; repeatable")
    parser.add_argument("--seconds", type=float, default=75.0, help="of each scenario [75]")
    parser.add_argument(
        "--steady",
        type=float,
        metavar="SECONDS",
        help="end one when its verdict has not changed for so long, before its time is over",
    )
    parser.add_argument("--minutes", type=float, help="begin nothing that would not be over by then")
    parser.add_argument("--missing", action="store_true", help="leave out what the --json file has")
    parser.add_argument("--nsys", action="store_true", help="servers run under nsys, which decides labels")
    parser.add_argument("--rehearse", action="store_true", help="tiny models: tries the machinery, anywhere")
    parser.add_argument(
        "--references",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="saved runs of the same machine, for rules that compare with another server; repeatable",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add every figure to it, a line a run")
    parser.add_argument(
        "--report", type=Path, action="append", metavar="FILE", help="only print what was saved; repeatable"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/verdicts.md")
    options = parser.parse_args()
    if options.missing and options.json is None:
        parser.error("--missing needs --json")
    return options


if __name__ == "__main__":
    sys.exit(main())
