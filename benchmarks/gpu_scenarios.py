"""Whether the verdict is right on GPU runs whose truth is known.

    python benchmarks/gpu_scenarios.py                                  every scenario; 20 minutes
    python benchmarks/gpu_scenarios.py --server graphs --server eager --seconds 30
    python benchmarks/gpu_scenarios.py --list

Serves configurations of known size with made-up weights, loads them so that one thing binds them, and holds
what llmprobe says twice a second against a label that comes from elsewhere: a client's times, sizes,
published peaks, the hardware's own counters, and what was injected. Needs an NVIDIA GPU with 80 GB and vLLM.
Exit status 1 if a verdict is wrong, late or wavers, 2 if a label did not hold, so that nothing was scored.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from support import gpm, gpu_labels
from support.gpu_labels import Facts
from support.gpu_scenario_servers import KINDS, Workshop
from support.journals import live_journals
from support.labels import Client
from support.load import Load, LoadFailed
from support.machine import machine_line
from support.outcomes import HEADER, Outcome, bars, json_of, status, table_rows
from support.serving import NAME
from support.switch import NotSwitched, wait_known
from support.table import Results, command
from support.watching import Watching, classes, score

from llmprobe.compute.hardware import lookup
from llmprobe.demo.server import ServerFailed, VllmServer

_BETWEEN_SECONDS = 1.0
_STEADY_AFTER_SECONDS = 5.0
_BURN = "while True: pass"


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


Disturb = Callable[[VllmServer], AbstractContextManager[None]]


@dataclass(frozen=True)
class Scenario:
    """A run that is bound by one thing.

    Attributes:
        kind: of its server, in `KINDS`.
        rule: gives the label.
        phase: the one judged; None for all.
        load: None for none.
        reference: the scenario that ran before on the same load, without what this one adds.
        slow_steps: the host sleeps for so many times the reference's time per token between two steps.
        slow_seconds: or for so long.
        disturb: goes on meanwhile.
    """

    name: str
    kind: str
    rule: gpu_labels.Rule
    phase: str | None
    load: Requests | None
    reference: str | None = None
    slow_steps: float = 0.0
    slow_seconds: float = 0.0
    disturb: Disturb | None = None


@contextlib.contextmanager
def _one_busy_core(server: VllmServer) -> Iterator[None]:
    """The engine's threads may use one core, and two programs that never wait use it too."""
    (engine,) = {int(reader.facts()["pid"]) for reader in live_journals(server.directory, "worker")}
    threads = [int(path.name) for path in Path(f"/proc/{engine}/task").iterdir()]
    before = os.sched_getaffinity(engine)
    core = {min(before)}
    burners = [subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(2)]
    try:
        for pid in (*threads, *(burner.pid for burner in burners)):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(pid, core)
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, before)


_ONE = Requests(1, 128, 256)
#: In this order: each begins with the load of the one before it just gone, which is the change of load.
SCENARIOS = (
    Scenario("decode, batch 1, graphs", "graphs", gpu_labels.reads_memory, "decode", _ONE),
    Scenario("decode, batch 128", "graphs", gpu_labels.reads_memory, "decode", Requests(128, 64, 512)),
    Scenario("prefill, 8000 tokens", "graphs", gpu_labels.multiplies, "prefill", Requests(1, 8000, 1)),
    Scenario(
        "decode, 16 x 9000 tokens", "graphs", gpu_labels.reads_cache, "decode", Requests(16, 8800, 1000)
    ),
    Scenario("idle", "graphs", gpu_labels.runs_nothing, None, None),
    Scenario("light load", "graphs", gpu_labels.lightly_loaded, "decode", Requests(1, 128, 100, 1.5)),
    Scenario("bursts", "graphs", gpu_labels.lightly_loaded, "decode", Requests(4, 128, 300, 4.0)),
    Scenario(
        "host between steps, async", "graphs", gpu_labels.waits_for_host, "decode", _ONE,
        "decode, batch 1, graphs", slow_steps=1.5,
    ),
    Scenario(
        "engine on one busy core", "graphs", gpu_labels.starved, "decode", _ONE, "decode, batch 1, graphs",
        disturb=_one_busy_core,
    ),
    Scenario("decode, batch 1, no async", "sync", gpu_labels.reads_memory, "decode", _ONE),
    Scenario(
        "host between steps, 3 ms", "sync", gpu_labels.waits_for_host, "decode", _ONE,
        "decode, batch 1, no async", slow_seconds=0.003,
    ),
    Scenario(
        "decode, batch 1, eager", "eager", gpu_labels.launches_one_by_one, "decode", _ONE,
        "decode, batch 1, graphs",
    ),
    Scenario(
        "eager, windows off", "blind", gpu_labels.launches_unseen, "decode", _ONE, "decode, batch 1, graphs"
    ),
    Scenario("a clock that lies", "liar", gpu_labels.is_lied_to, "decode", _ONE),
    Scenario("tiny model, graphs", "tiny", gpu_labels.leaves_it_idle, "decode", _ONE),
    Scenario(
        "prefill, float32", "float32", gpu_labels.multiplies_plainly, "prefill", Requests(1, 3500, 1)
    ),
    Scenario(
        "one request, small cache", "small cache", gpu_labels.reads_memory, "decode", Requests(1, 512, 512)
    ),
    Scenario(
        "KV cache too small", "small cache", gpu_labels.waits_for_cache, "decode", Requests(32, 512, 512),
        "one request, small cache",
    ),
    Scenario("another model, batch 1", "other", gpu_labels.reads_memory, "decode", _ONE),
    Scenario("another model, prefill", "other", gpu_labels.multiplies, "prefill", Requests(1, 8000, 1)),
    Scenario(
        "another model, host", "other", gpu_labels.waits_for_host, "decode", _ONE, "another model, batch 1",
        slow_steps=1.5,
    ),
)  # fmt: skip


def main() -> int:
    """Run the scenarios; returns the exit status."""
    options = _options()
    if options.list:
        print("\n".join(f"{item.kind:12} {item.name}" for item in SCENARIOS))
        return 0
    machine = machine_line()
    chosen = [item for item in SCENARIOS if item.kind in (options.server or KINDS)]
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    clients = _earlier_clients(options.references)
    with tempfile.TemporaryDirectory(prefix="llmprobe-scenarios-") as folder:
        workshop = Workshop(Path(folder))
        for kind in dict.fromkeys(item.kind for item in chosen):
            try:
                with workshop.server(KINDS[kind]) as server:
                    wait_known(server.directory)
                    before: dict[str, str] = {}
                    for scenario in (item for item in chosen if item.kind == kind):
                        outcome = _run(scenario, server, workshop, clients, before, options.seconds)
                        outcomes.append(outcome)
                        clients[scenario.name] = outcome.facts.client
                        before = classes(outcome.trace)
                        _save(outcomes, machine, options.json)
            except (ServerFailed, LoadFailed, NotSwitched, OSError, ValueError) as error:
                print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    _table(outcomes, machine, options.seconds, time.monotonic() - begin).show(options.markdown)
    return 1 if len(outcomes) < len(chosen) else status(outcomes)


def _run(
    scenario: Scenario,
    server: VllmServer,
    workshop: Workshop,
    clients: Mapping[str, Client],
    before: dict[str, str],
    seconds: float,
) -> Outcome:
    print(f"{scenario.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    reference = clients.get(scenario.reference or "")
    slow = scenario.slow_seconds
    if scenario.slow_steps and reference is not None and reference.tpot_seconds:
        slow = scenario.slow_steps * reference.tpot_seconds
    workshop.slow(slow)
    time.sleep(_BETWEEN_SECONDS)
    rows, counters = None, gpm.Counters()
    try:
        with contextlib.ExitStack() as stack:
            if scenario.disturb is not None:
                stack.enter_context(scenario.disturb(server))
            load = stack.enter_context(scenario.load.on(server)) if scenario.load else None
            watching = stack.enter_context(Watching(server))
            steady = min(_STEADY_AFTER_SECONDS, seconds / 2)
            (load.wait if load else time.sleep)(steady)
            with counters:
                (load.wait if load else time.sleep)(seconds - steady)
            if load is not None:
                rows = load.requests()
    finally:
        workshop.slow(0)
    requests, client = scenario.load or Requests(0, 0, 0), Client(0, None, None)
    if rows is not None:
        client = Client.of(rows, requests.output_tokens)
    kind, trace = KINDS[scenario.kind], watching.trace
    facts = Facts(
        workshop.sizes(kind),
        gpm.bandwidth(),
        _published_flops(kind.dtype),
        counters.ratios,
        client,
        reference,
        requests.concurrency,
        requests.prompt_tokens,
        requests.output_tokens,
        trace.engine_figures(),
        trace.tokens(),
    )
    label = scenario.rule(facts)
    return Outcome(scenario.name, facts, label, score(trace, label, scenario.phase, before), trace)


def _earlier_clients(files: Sequence[Path]) -> dict[str, Client]:
    """What clients timed in runs that were saved, by scenario."""
    runs = [run for path in files for run in json.loads(path.read_text())["runs"]]
    return {run["name"]: Client(**run["facts"]["client"]) for run in runs}


def _published_flops(dtype: str) -> float:
    import torch

    peaks = lookup(torch.cuda.get_device_properties(0).name, dtype)
    return peaks.flops_per_second if peaks is not None else float("inf")


def _save(outcomes: list[Outcome], machine: str, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(json_of(outcomes, machine), indent=1))


def _table(outcomes: list[Outcome], machine: str, seconds: float, took: float) -> Results:
    notes = [
        bars(seconds),
        f"Took {took / 60:.0f} min.",
    ]
    return Results(
        "Verdicts on GPU runs whose truth is known",
        command("gpu_scenarios.py"),
        machine,
        HEADER,
        table_rows(outcomes),
        notes,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the scenarios by server, and end")
    parser.add_argument(
        "--server", action="append", choices=sorted(KINDS), help="scenarios of this one; may be repeated"
    )
    parser.add_argument("--seconds", type=float, default=75.0, help="of each scenario [75]")
    parser.add_argument(
        "--references",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a saved run of the same machine, for rules that compare with another server; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/verdicts.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
