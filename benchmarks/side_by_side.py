"""What llmprobe and other tools cost the same server under the same load.

    python benchmarks/side_by_side.py                                        all of them, 3 to 15 minutes
    python benchmarks/side_by_side.py --only plain llmprobe --json side.json
    python benchmarks/side_by_side.py --only torch plain --json side.json    adds to the file, shows all in it
    python benchmarks/side_by_side.py --model dense --seconds 60 -- --max-model-len 4096

One server after another. Restarts of the same server differ by some 2 % in time per token: give ``plain``
more than once to see by how much here. What llmprobe itself costs is measured without that by
``overhead.py``. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.alternatives import ALTERNATIVES, AlternativeFailed, Served
from support.gpu_models import CONFIGURATIONS, served
from support.load import Load, LoadFailed
from support.machine import machine_line
from support.serving import NAME, with_flags
from support.table import Results, command

from llmprobe.demo.server import ServerFailed

_PLAIN = "vLLM alone"
_HEADER = ("", "starts", "TPOT", "to vLLM alone", "throughput", "to vLLM alone", "TTFT", "seconds")
#: One of these ends the measurement of one server, and the next begins.
_FAILURES = (ServerFailed, LoadFailed, AlternativeFailed, OSError, subprocess.SubprocessError)
_SHAPE = ("model", "concurrency", "prompt_tokens", "output_tokens", "flags")


@dataclass(frozen=True)
class Run:
    """One stretch of load on one start of a server; medians of what the client saw."""

    name: str
    seconds: float
    requests: int
    tpot_seconds: float
    ttft_seconds: float
    tokens_per_second: float


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped
    saved = _saved(options)
    failed: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="llmprobe-side-by-side-") as folder:
            # One directory for all starts: vLLM keeps what it compiled for a model by its path.
            model, flags = served(options.model, Path(folder)) if options.model else (None, [])
            for name in options.only:
                _measure(name, model, [*flags, *options.flags], options, saved, failed)
    finally:
        _table(saved, options, failed).show(options.markdown)
    return int(bool(failed))


def _measure(
    name: str,
    model: Path | None,
    flags: Sequence[str],
    options: argparse.Namespace,
    saved: dict[str, Any],
    failed: list[str],
) -> None:
    """Start one server and measure it; every stretch is saved at once."""
    print(
        f"{name}: up to {options.warm_up_seconds + options.seconds + 15:.0f} s once it is up",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="llmprobe-side-by-side-") as folder:
        try:
            with ALTERNATIVES[name](model, flags, Path(folder)) as found:
                for run in _runs(found, options):
                    saved["runs"].append(asdict(run))
                    _save(saved, options.json)
                    print(run, file=sys.stderr, flush=True)
        except _FAILURES as error:
            failed.append(f"{name}: {error}"[:2000])
            print(failed[-1], file=sys.stderr, flush=True)


def _runs(found: Served, options: argparse.Namespace) -> Iterator[Run]:
    load = Load(found.server.port, NAME, options.concurrency, options.prompt_tokens, options.output_tokens)
    with load:
        load.wait(options.warm_up_seconds)
        for name, meanwhile, most in found.stretches:
            seconds = min(options.seconds, most)
            with meanwhile():
                begin = time.monotonic_ns()
                load.wait(seconds)
                end = time.monotonic_ns()
                load.wait(load.longest_seconds())  # the last requests
                seen = load.seen(begin, end)
                # Before the profiler is stopped, which may fail.
                yield Run(
                    name, seconds, seen.requests, seen.tpot_seconds, seen.ttft_seconds, seen.tokens_per_second
                )


def _saved(options: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls wrote into the file, or a new beginning."""
    shape = {name: getattr(options, name) for name in _SHAPE}
    new = {"machine": machine_line(), "command": command("side_by_side.py"), "shape": shape, "runs": []}
    if not options.json or not options.json.exists():
        return new
    old: dict[str, Any] = json.loads(options.json.read_text())
    if old.get("shape") != shape:
        raise SystemExit(f"{options.json} holds other settings ({old.get('shape')}): choose another file")
    if _without_load(old["machine"]) != _without_load(new["machine"]):
        raise SystemExit(f"{options.json} comes from another machine ({old['machine']}): choose another file")
    return old


def _without_load(machine: str) -> str:
    return machine.rpartition("; load before")[0]


def _save(saved: dict[str, Any], path: Path | None) -> None:
    if path:
        written = path.with_name(f".{path.name}")
        written.write_text(json.dumps(saved, indent=1) + "\n")
        written.replace(path)  # never half a file, whenever this is ended


def _table(saved: dict[str, Any], options: argparse.Namespace, failed: list[str]) -> Results:
    by_name: dict[str, list[Run]] = {}
    for run in saved["runs"]:
        by_name.setdefault(run["name"], []).append(Run(**run))
    plain = by_name.get(_PLAIN)
    notes = [
        f"{options.concurrency} requests of {options.prompt_tokens} + {options.output_tokens} tokens at a "
        "time; medians of what the client saw, and of the starts where there are several.",
        "Each row but those of one tool is another start of the server: differences within some 2 % are "
        "none. overhead.py says what llmprobe costs, without restarts.",
        "Graphsignal, the nearest product, needs an account and its service: not measured.",
        *_spread(plain),
        *(f"FAILED: {one}" for one in failed),
    ]
    return Results(
        "llmprobe and others beside the same server",
        command("side_by_side.py"),
        saved["machine"],
        _HEADER,
        [_row(name, runs, plain) for name, runs in by_name.items()],
        notes,
    )


def _spread(plain: list[Run] | None) -> list[str]:
    if plain is None or len(plain) < 2:
        return []
    times = [run.tpot_seconds for run in plain]
    apart = max(times) / min(times) - 1
    return [f"{len(plain)} starts of vLLM alone were up to {apart:.1%} apart in time per token."]


def _row(name: str, runs: list[Run], plain: list[Run] | None) -> list[str]:
    def middle(of: list[Run] | None, field: str) -> float:
        return statistics.median(getattr(run, field) for run in of or ())

    def change(field: str) -> str:
        if plain is None or runs is plain:
            return "–"
        return f"{middle(runs, field) / middle(plain, field) - 1:+.1%}"

    return [
        name,
        str(len(runs)),
        f"{middle(runs, 'tpot_seconds') * 1e3:.3f} ms",
        change("tpot_seconds"),
        f"{middle(runs, 'tokens_per_second'):.0f}/s",
        change("tokens_per_second"),
        f"{middle(runs, 'ttft_seconds') * 1e3:.1f} ms",
        f"{sum(run.seconds for run in runs):g}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="What follows -- goes to vllm serve: side_by_side.py --model dense -- --max-model-len 4096",
    )
    names = list(ALTERNATIVES)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"of {', '.join(names)} [all; nsys where it is on PATH]",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"a model directory, or a configuration without weights: {', '.join(CONFIGURATIONS)} "
        "[the demo's tiny Llama]",
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of load on each [30]")
    parser.add_argument("--warm-up-seconds", type=float, default=5.0, help="of load before [5]")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time [16]")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each request [128]")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each request [128]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add every figure to it as it comes")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    options = with_flags(parser)
    options.only = options.only or [one for one in names if one != "nsys" or shutil.which(one)]
    if options.seconds <= 0 or options.concurrency < 1 or options.output_tokens < 2:
        parser.error("--seconds above 0, --concurrency from 1, --output-tokens from 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
