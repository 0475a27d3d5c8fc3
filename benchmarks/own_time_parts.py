"""Where llmprobe's own time goes in a live vLLM worker: in the engine's thread, and in llmprobe's.

    python benchmarks/own_time_parts.py
    python benchmarks/own_time_parts.py --model dense --concurrency 1 16 128 -- --max-model-len 2048

`overhead.py` says how much it is; this says of what. Clocks are read around the parts, which takes some time
of its own: some microseconds a step of the engine's thread. Decides nothing: exit status 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from support.gpu_models import CONFIGURATIONS, served
from support.journals import Polling, StepLog, live_journals
from support.load import Load
from support.machine import machine_line
from support.serving import NAME, running_server, variable, with_flags
from support.switch import wait_known
from support.table import Results, command

_PARTS = Path(__file__).resolve().parent / "support" / "parts"
_SETTLE_SECONDS = 3.0
_Sums = dict[str, list[int]]  # part → [calls, nanoseconds]
#: Part of the engine's thread → its sums in the worker.
_EVENTS = {
    "CUDA event before the forward": ("event 0",),
    "CUDA event after sampling": ("event 3",),
    "two more CUDA events in every fifth step": ("event 1", "event 2"),
}


@dataclass(frozen=True)
class Found:
    """One load: microseconds a step."""

    concurrency: int
    steps: int
    own_median: float
    own_mean: float
    #: Part → its mean.
    parts: dict[str, float]


def main() -> int:
    """Run the loads, and print one table."""
    options = _options()
    machine = machine_line()
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="llmprobe-parts-") as folder:
        for load in _measure(options, Path(folder)):
            found.append(load)
            if options.json:
                options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    _table(found, machine).show(options.markdown)
    return 0


def _measure(options: argparse.Namespace, folder: Path) -> Iterator[Found]:
    model, flags = served(options.model, folder) if options.model in CONFIGURATIONS else (options.model, [])
    sums = folder / "sums"
    sums.mkdir()
    path = os.pathsep.join(filter(None, (str(_PARTS), os.environ.get("PYTHONPATH"))))
    env = {**dict(options.env), "OWN_TIME_PARTS": str(sums), "PYTHONPATH": path}
    with running_server(Path(model) if model else None, [*flags, *options.flags], env) as server:
        wait_known(server.directory)
        worker = live_journals(server.directory, "worker")[0]
        file = sums / f"{worker.facts()['pid']}.json"
        for concurrency in options.concurrency:
            log = StepLog(worker)
            tokens = options.prompt_tokens, options.output_tokens
            load = Load(
                server.port,
                NAME,
                concurrency,
                *tokens,
                spread_seconds=_SETTLE_SECONDS if concurrency > 1 else 0,
            )
            with load, Polling(log):
                load.wait(2 * _SETTLE_SECONDS)
                before, begin = _sums(file), time.monotonic_ns()
                load.wait(options.seconds)
                after, end = _sums(file), time.monotonic_ns()
                load.wait(1.0)
            print(f"{concurrency} at a time: done", file=sys.stderr, flush=True)
            yield _found(concurrency, log.own_ns([(begin, end)]), before, after)


def _sums(file: Path) -> _Sums:
    try:
        found: _Sums = json.loads(file.read_text())
    except FileNotFoundError:
        raise SystemExit(f"{file.name}: the worker says nothing of its parts: is its probe armed?") from None
    return found


def _found(concurrency: int, own: np.ndarray, before: _Sums, after: _Sums) -> Found:
    if not len(own):
        raise SystemExit(f"{concurrency} at a time: no step was recorded")

    def a_step(*names: str) -> float:
        taken = sum(after[name][1] - before.get(name, [0, 0])[1] for name in names if name in after)
        return taken / len(own) / 1e3

    parts = {part: a_step(*names) for part, names in _EVENTS.items()}
    if not any(parts.values()):  # not a CUDA device
        parts.clear()
    parts["all but the events: Python of the hooks"] = float(own.mean()) / 1e3 - sum(parts.values())
    parts["thread: all of it"] = a_step("round")
    parts["thread: asking for events, their times"] = a_step("harvest")
    parts["thread: what each step worked on, packing"] = a_step("write") - a_step("harvest", "append")
    parts["thread: writing steps, counting them"] = a_step("append")
    parts["thread: totals and histograms"] = a_step("publish")
    return Found(concurrency, len(own), float(np.median(own)) / 1e3, float(own.mean()) / 1e3, parts)


def _table(found: list[Found], machine: str) -> Results:
    header = ["a step, mean", *(f"{load.concurrency} at a time" for load in found)]
    rows = [
        ["own host time, median", *(f"{load.own_median:.1f} µs" for load in found)],
        ["own host time", *(f"{load.own_mean:.1f} µs" for load in found)],
    ]
    rows += [[part, *(f"{load.parts[part]:.1f} µs" for load in found)] for part in found[0].parts]
    notes = [
        f"{', '.join(str(load.steps) for load in found)} steps; the thread's are of its processor time",
    ]
    return Results(
        "Where llmprobe's own time goes", command("own_time_parts.py"), machine, header, rows, notes
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="What follows -- goes to vllm serve: own_time_parts.py --model dense -- --max-model-len 2048",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1], help="requests at a time [1]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load [20]")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each request [128]")
    parser.add_argument("--output-tokens", type=int, default=256, help="of each request [256]")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"a model directory, or a configuration without weights: {', '.join(CONFIGURATIONS)} "
        "[the demo's tiny Llama]",
    )
    parser.add_argument(
        "--env", type=variable, action="append", default=[], metavar="NAME=VALUE", help="of the server"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    options = with_flags(parser)
    if min(options.concurrency) < 1 or options.seconds <= 0 or options.output_tokens < 2:
        parser.error("--concurrency from 1, --seconds above 0, --output-tokens from 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
