"""Who waits for whom in the steps of a loaded server, by nsys, with llmprobe off and on.

    python benchmarks/idle_nsys.py --concurrency 128 --spread-seconds 5
    python benchmarks/idle_nsys.py --concurrency 16 --pairs 6 --markdown --json idle.json
    python benchmarks/idle_nsys.py --env LLMPROBE_NVTX=0 --nsys-option=--cuda-event-trace=false
    python benchmarks/idle_nsys.py --concurrency 128 -- --max-num-seqs 128 --max-model-len 2048

Says why a server loses time to what its host does: where the engine's thread waits for the GPU, that hides
it; where the GPU waits for that thread nothing does. llmprobe's clock is not asked: idle is when nsys has no
kernel, copy, set or graph, and the thread waits while it is in a call that does nothing else. Also what a
server under nsys takes longer with the probe on, before anything is recorded. Needs an NVIDIA GPU, vLLM, and
nsys on PATH. Exit status 1 if nothing could be told. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from support.gpu_models import CONFIGURATIONS, make_configuration
from support.journals import Polling, StepLog, live_journals
from support.load import Load, LoadFailed
from support.machine import machine_line
from support.nsys_host import HostSteps, host_steps
from support.nsys_server import NsysFailed, NsysServer, nsys_version
from support.serving import NAME, variable, with_flags
from support.switch import switch, wait_known
from support.table import Results, command

_SETTLE_SECONDS, _WARM_UP_SECONDS = 1.0, 12.0
_MOST_LOST = 0.1
_ENDED = 143  # as a shell says of a process that SIGTERM ended


@dataclass(frozen=True)
class Kind:
    """Means of a recorded step of one kind, milliseconds."""

    steps: int
    took: float
    waited: float  # of it, the engine's thread for the GPU
    idle: float  # of it, the GPU


@dataclass(frozen=True)
class Stretch:
    """Some seconds without recording, and a recording right after them.

    The last four are without what a recording that cannot be told would say.
    """

    on: bool
    step: float  # milliseconds by the clients' rate, not recorded: so many requests, one token each a step
    own: float | None  # microseconds that llmprobe takes in a step, median; None while it is off
    once: Kind | None  # steps that are one launch, or few: of decode
    often: Kind | None  # steps of many
    calls: dict[str, tuple[float, float]]  # CUDA call of the engine's thread → how many a step, nanoseconds
    lost: float | None  # share of launches that nsys did not record: they look like idle time


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))  # the server is stopped, the table shown
    watched = _Watched()
    try:
        machine = f"{machine_line()}; nsys {nsys_version()}"
        with tempfile.TemporaryDirectory(prefix="llmprobe-idle-") as folder:
            model = make_configuration(options.model, Path(folder) / options.model)
            env, more = dict(options.env), options.nsys_option
            with NsysServer(options.model, model, options.flags, env, more=more) as server:
                server.wait_ready()
                try:
                    watched.measure(server, options)
                finally:
                    watched.ended_ns = time.monotonic_ns()
                    found, dropped = watched.stretches()
                    _show(found, dropped, options, machine)
    except NsysFailed as error:
        sys.exit(str(error))
    return int(not found)


class _Watched:
    """The stretches of one load, as far as they have got."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self._log: StepLog | None = None
        self._times: list[tuple[bool, int, int, HostSteps | str]] = []
        self.ended_ns = 0

    def measure(self, server: NsysServer, options: argparse.Namespace) -> None:
        """Load it, switch, look and record, in turns."""
        directory = server.server.directory
        wait_known(directory)
        self._log = log = StepLog(live_journals(directory, "worker")[0])
        tokens = (options.prompt_tokens, options.output_tokens)
        load = Load(
            server.server.port, NAME, options.concurrency, *tokens, spread_seconds=options.spread_seconds
        )
        self._load = load
        with load, Polling(log):
            load.wait(_WARM_UP_SECONDS)
            for pair in range(options.pairs):
                for on in (False, True) if pair % 2 == 0 else (True, False):
                    switch(directory, on)
                    load.wait(_SETTLE_SECONDS)
                    begin = time.monotonic_ns()
                    load.wait(options.seconds)
                    end = time.monotonic_ns()
                    recording = server.record(f"{pair}-{on}", options.record_seconds)
                    self._times.append((on, begin, end, _read(recording)))
                    recording.unlink()
                print(f"pair {pair + 1} of {options.pairs}", file=sys.stderr, flush=True)
            # What ran in the last stretch is known once it is over.
            load.wait(load.longest_seconds() + _SETTLE_SECONDS)

    def stretches(self) -> tuple[list[Stretch], list[str]]:
        """Those that can be told, and why the others cannot."""
        found, dropped = [], []
        for number, (on, begin, end, steps) in enumerate(self._times, 1):
            assert self._load is not None
            assert self._log is not None
            if self.ended_ns - end < 1e9 * self._load.longest_seconds():
                dropped.append(f"stretch {number}: its last requests were not over yet")
                continue
            try:
                tokens = self._load.seen(begin, end).tokens_per_second
            except LoadFailed as error:
                dropped.append(f"stretch {number}: {error}")
                continue
            told, why = recorded(steps)
            if why:
                dropped.append(f"stretch {number}, its recording: {why}")
            own = self._log.own_ns([(begin, end)])
            found.append(
                Stretch(
                    on=on,
                    step=1e3 * self._load.concurrency / tokens,
                    own=float(np.median(own)) / 1e3 if on and len(own) else None,
                    once=told and _kind(told, ~told.launched_often),
                    often=told and _kind(told, told.launched_often),
                    calls=told.calls if told else {},
                    lost=told and told.lost,
                )
            )
        return found, dropped


def _show(found: list[Stretch], dropped: list[str], options: argparse.Namespace, machine: str) -> None:
    if options.json:
        saved = {"machine": machine, "stretches": [asdict(one) for one in found], "dropped": dropped}
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    _table(found, dropped, options, machine).show(options.markdown)


def _read(recording: Path) -> HostSteps | str:
    """What it holds, or why that is nothing: the other stretches are worth having."""
    try:
        return host_steps(recording)
    except ValueError as error:
        return str(error)


def recorded(steps: HostSteps | str) -> tuple[HostSteps | None, str]:
    """What a recording says of its steps, and ""; or None, and why."""
    if isinstance(steps, str):
        return None, steps
    if steps.lost > _MOST_LOST:
        return None, f"nsys lost {steps.lost:.0%} of the launches"
    return steps, ""


def _kind(steps: HostSteps, chosen: np.ndarray) -> Kind | None:
    if not chosen.any():
        return None
    means = (float(values[chosen].mean()) / 1e6 for values in (steps.took, steps.waited, steps.idle))
    return Kind(int(chosen.sum()), *means)


def _table(found: list[Stretch], dropped: list[str], options: argparse.Namespace, machine: str) -> Results:
    sides = [[one for one in found if one.on is on] for on in (False, True)]

    def row(name: str, form: str, value: Callable[[Stretch], float | None]) -> list[str]:
        return [name, *(_spread([value(one) for one in side], form) for side in sides)]

    def of(kind: str, name: str) -> Callable[[Stretch], float | None]:
        return lambda one: getattr(getattr(one, kind), name, None)

    rows = [
        row("a step, by the clients' rate, ms", ".3f", lambda one: one.step),
        row("llmprobe's own host time a step, µs", ".1f", lambda one: one.own),
    ]
    for kind, words in (("once", "few launches"), ("often", "many launches")):
        rows += [
            row(f"recorded steps of {words}", ".0f", of(kind, "steps")),
            row("… each, ms", ".3f", of(kind, "took")),
            row("… of it the engine's thread waits for the GPU, ms", ".3f", of(kind, "waited")),
            row("… of it the GPU has nothing to do, ms", ".3f", of(kind, "idle")),
        ]
    rows.append(
        row("launches that nsys lost, %", ".2f", lambda one: None if one.lost is None else 100 * one.lost)
    )
    notes = [
        f"Medians (least … most) of {len(sides[0])} stretches off and {len(sides[1])} on, in turns: "
        f"{options.seconds:g} s without recording for the first two rows, then {options.record_seconds:g} s "
        "recorded. Steps of many launches are those with more than twice as many as the median: such as with "
        "a prompt.",
        f"{options.concurrency} at a time, {options.prompt_tokens} + {options.output_tokens} tokens, the "
        f"first sent over {options.spread_seconds:g} s.",
        *dropped,
    ]
    header = ("median (least … most)", "off", "on")
    return Results("Who waits for whom, by nsys", command("idle_nsys.py"), machine, header, rows, notes)


def _spread(found: list[float | None], form: str) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "–"
    return f"{np.median(values):{form}} ({min(values):{form}} … {max(values):{form}})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="What follows -- goes to vllm serve: idle_nsys.py --concurrency 16 -- --max-model-len 2048",
    )
    parser.add_argument("--model", choices=list(CONFIGURATIONS), default="dense", help="[dense]")
    parser.add_argument("--concurrency", type=int, default=128, help="requests at a time [128]")
    parser.add_argument("--pairs", type=int, default=5, help="of stretches, off and on [5]")
    parser.add_argument("--seconds", type=float, default=10.0, help="before each recording [10]")
    parser.add_argument("--record-seconds", type=float, default=1.0, help="of each recording [1]")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each request [128]")
    parser.add_argument("--output-tokens", type=int, default=512, help="of each request [512]")
    parser.add_argument("--spread-seconds", type=float, default=5.0, help="see overhead.py [5]")
    parser.add_argument(
        "--env", action="append", type=variable, default=[], metavar="NAME=VALUE", help="of the server"
    )
    parser.add_argument(
        "--nsys-option", action="append", default=[], metavar="OPTION", help="further one of nsys launch"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = with_flags(parser)
    if min(options.concurrency, options.pairs) < 1 or options.output_tokens < 2:
        parser.error("--concurrency and --pairs from 1, --output-tokens from 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
