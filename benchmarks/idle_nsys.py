"""For how long the GPU of a loaded server has nothing to do, by nsys, with llmprobe off and on.

    python benchmarks/idle_nsys.py --concurrency 128 --spread-seconds 5
    python benchmarks/idle_nsys.py --concurrency 16 --pairs 6 --markdown --json idle.json
    python benchmarks/idle_nsys.py --concurrency 128 -- --max-num-seqs 128 --max-model-len 2048

Says why a server loses time to what its host does: one whose device waits for the host in each step has
nothing to hide that behind. llmprobe's clock is not asked: idle is when nsys has no kernel, copy, set or
graph. Needs an NVIDIA GPU, vLLM, and nsys on PATH. Exit status 1 if nothing could be told. See README.md
beside this file.
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
from support.journals import live_journals
from support.load import Load, LoadFailed
from support.machine import machine_line
from support.nsys_server import NsysFailed, NsysServer, nsys_version
from support.nsys_truth import device_busy
from support.serving import NAME, with_flags
from support.switch import switch, wait_known
from support.table import Results, command

_SETTLE_SECONDS, _WARM_UP_SECONDS = 1.0, 12.0
#: An idle stretch shorter than this lies between kernels, whoever launches them.
_WAIT_NS = 20_000
_MOST_LOST = 0.1
_ENDED = 143  # as a shell says of a process that SIGTERM ended


@dataclass(frozen=True)
class Stretch:
    """Some seconds without recording, and a recording right after them."""

    on: bool
    step_seconds: float  # the clients' rate: so many requests, one token each a step
    engine_seconds: float  # processor time of the engine's thread in a step
    recorded_seconds: float
    idle: float  # share of the recording in which nothing ran
    waiting: float  # of it in stretches of more than 20 µs
    waits: float  # such stretches a step
    lost: float  # share of launches that nsys did not record: they look like idle time


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))  # the server is stopped, the table shown
    watched = _Watched()
    try:
        machine = f"{machine_line()}; nsys {nsys_version()}"
        with tempfile.TemporaryDirectory(prefix="llmprobe-idle-") as folder:
            model = make_configuration(options.model, Path(folder) / options.model)
            with NsysServer(options.model, model, options.flags, {}) as server:
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
        self._times: list[tuple[bool, int, int, float, tuple[np.ndarray, float]]] = []
        self.ended_ns = 0

    def measure(self, server: NsysServer, options: argparse.Namespace) -> None:
        """Load it, switch, look and record, in turns."""
        directory = server.server.directory
        wait_known(directory)
        pid = live_journals(directory, "worker")[0].facts()["pid"]
        thread = Path(f"/proc/{pid}/task/{pid}/schedstat")  # of the worker's steps: its process's first
        tokens = (options.prompt_tokens, options.output_tokens)
        load = Load(
            server.server.port, NAME, options.concurrency, *tokens, spread_seconds=options.spread_seconds
        )
        self._load = load
        with load:
            load.wait(_WARM_UP_SECONDS)
            for pair in range(options.pairs):
                for on in (False, True) if pair % 2 == 0 else (True, False):
                    switch(directory, on)
                    load.wait(_SETTLE_SECONDS)
                    begin, used = time.monotonic_ns(), _seconds(thread)
                    load.wait(options.seconds)
                    end, used = time.monotonic_ns(), _seconds(thread) - used
                    busy = device_busy(server.record(f"{pair}-{on}", options.record_seconds))
                    self._times.append((on, begin, end, used, busy))
                print(f"pair {pair + 1} of {options.pairs}", file=sys.stderr, flush=True)
            # What ran in the last stretch is known once it is over.
            load.wait(load.longest_seconds() + _SETTLE_SECONDS)

    def stretches(self) -> tuple[list[Stretch], list[str]]:
        """Those that can be told, and why the others cannot."""
        found, dropped = [], []
        for number, (on, begin, end, used, (busy, lost)) in enumerate(self._times, 1):
            assert self._load is not None
            if self.ended_ns - end < 1e9 * self._load.longest_seconds():
                dropped.append(f"stretch {number}: its last requests were not over yet")
            elif lost > _MOST_LOST:
                dropped.append(f"stretch {number}: nsys lost {lost:.0%} of the launches")
            else:
                try:
                    tokens = self._load.seen(begin, end).tokens_per_second
                except LoadFailed as error:
                    dropped.append(f"stretch {number}: {error}")
                    continue
                step = self._load.concurrency / tokens
                found.append(_stretch(on, step, used / ((end - begin) / 1e9) * step, busy, lost))
        return found, dropped


def _show(found: list[Stretch], dropped: list[str], options: argparse.Namespace, machine: str) -> None:
    if options.json:
        saved = {"machine": machine, "stretches": [asdict(one) for one in found], "dropped": dropped}
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    _table(found, dropped, options, machine).show(options.markdown)


def _stretch(on: bool, step: float, engine: float, busy: np.ndarray, lost: float) -> Stretch:
    total = int(busy[-1, 1] - busy[0, 0])
    gaps = busy[1:, 0] - busy[:-1, 1]
    long = gaps[gaps > _WAIT_NS]
    seconds = total / 1e9
    waits = len(long) / (seconds / step)
    idle, waiting = float(gaps.sum() / total), float(long.sum() / total)
    return Stretch(on, step, engine, seconds, idle, waiting, waits, lost)


def _seconds(schedstat: Path) -> float:
    """Processor time of one thread, as Linux counts it."""
    return int(schedstat.read_text().split()[0]) / 1e9


def _table(found: list[Stretch], dropped: list[str], options: argparse.Namespace, machine: str) -> Results:
    sides = [[one for one in found if one.on is on] for on in (False, True)]

    def row(name: str, form: str, value: Callable[[Stretch], float]) -> list[str]:
        return [name, *(_spread([value(one) for one in side], form) for side in sides)]

    rows = [
        row("a step, by the clients' rate, ms", ".3f", lambda one: 1e3 * one.step_seconds),
        row("engine thread's processor time a step, ms", ".3f", lambda one: 1e3 * one.engine_seconds),
        row("the same, of a step, %", ".1f", lambda one: 100 * one.engine_seconds / one.step_seconds),
        row("GPU idle, of the time, %", ".2f", lambda one: 100 * one.idle),
        row("of it in stretches above 20 µs, %", ".2f", lambda one: 100 * one.waiting),
        row("GPU idle a step, µs", ".0f", lambda one: 1e6 * one.idle * one.step_seconds),
        row("GPU busy a step, µs", ".0f", lambda one: 1e6 * (1 - one.idle) * one.step_seconds),
        row("stretches above 20 µs a step", ".2f", lambda one: one.waits),
        row("launches that nsys lost, %", ".2f", lambda one: 100 * one.lost),
    ]
    notes = [
        f"Medians (least … most) of {len(sides[0])} stretches off and {len(sides[1])} on, in turns: "
        f"{options.seconds:g} s without recording for the first three rows, then {options.record_seconds:g} "
        "s recorded. Microseconds and stretches a step: the recorded shares of a step that was not recorded.",
        f"{options.concurrency} at a time, {options.prompt_tokens} + {options.output_tokens} tokens, the "
        f"first sent over {options.spread_seconds:g} s.",
        *dropped,
    ]
    header = ("median (least … most)", "off", "on")
    return Results("Idle GPU, by nsys", command("idle_nsys.py"), machine, header, rows, notes)


def _spread(values: list[float], form: str) -> str:
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = with_flags(parser)
    if min(options.concurrency, options.pairs) < 1 or options.output_tokens < 2:
        parser.error("--concurrency and --pairs from 1, --output-tokens from 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
