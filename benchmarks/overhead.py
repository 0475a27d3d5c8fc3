"""What llmprobe costs the program it measures.

    python benchmarks/overhead.py                       both, one after the other
    python benchmarks/overhead.py vllm --blocks 10 --concurrency 1
    python benchmarks/overhead.py vllm --model PATH --concurrency 1 16 128 \\
        --env LLMPROBE_KERNEL_WINDOWS=0.1/5 -- --max-model-len 4096
    python benchmarks/overhead.py vllm --model dense --concurrency 1 16 128 --json cost.json
    python benchmarks/overhead.py transformers
    python benchmarks/overhead.py transformers --model small        on a GPU

One process lives through the whole measurement; ``llmprobe off`` and ``on`` take turns in it. Figures are
saved after every pair of blocks, and a run that is ended early shows what it has. Exit status 1 if a bar is
missed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import transformers_cost, vllm_cost
from support.gpu_models import CONFIGURATIONS, served
from support.machine import has_gpu, machine_line
from support.own_time import OwnTime
from support.paired import Bar, Difference
from support.serving import variable, with_flags
from support.table import Results, bar, command

_HEADER = ("", "off", "on", "on − off", "95 % interval", "bar")
_OWN_US_TRANSFORMERS = 15.0
_OWN_US_CPU = 30.0
_OWN_US_GPU, _OWN_US_GPU_LARGE, _LARGE = 25.0, 40.0, 64
_AGENT_BYTES = 150 << 20
_ENDED = 143  # as a shell says of a process that SIGTERM ended


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))  # servers are stopped, tables shown
    machine = machine_line()
    saved: dict[str, Any] = {"machine": machine, "command": command("overhead.py")}
    tables: dict[str, Results] = {}
    try:
        if options.what in ("vllm", "all"):
            with tempfile.TemporaryDirectory(prefix="llmprobe-overhead-") as folder:
                _measure_vllm(options, Path(folder), saved, tables)
        if options.what in ("transformers", "all"):
            on_a_gpu = options.model if options.what == "transformers" else None
            program = transformers_cost.measure(
                transformers_cost.Plan(
                    options.blocks, options.block_seconds, options.warm_up_seconds, on_a_gpu
                )
            )
            saved["transformers"] = asdict(program)
            tables["transformers"] = _transformers_table(program, options, machine)
            _save(saved, options)
    finally:
        for table in tables.values():
            table.show(options.markdown)
    return int(any("MISSED" in cell for table in tables.values() for row in table.rows for cell in row))


def _measure_vllm(
    options: argparse.Namespace, folder: Path, saved: dict[str, Any], tables: dict[str, Results]
) -> None:
    """Fill ``saved`` and ``tables``, pair by pair."""
    model, flags = served(options.model, folder) if options.model else (None, [])
    plan = vllm_cost.Plan(
        options.blocks,
        options.block_seconds,
        options.warm_up_seconds,
        options.concurrency,
        options.prompt_tokens,
        options.output_tokens,
        model,
        [*flags, *options.flags],
        dict(options.env),
        options.spread_seconds,
        options.most_blocks,
    )
    print(f"takes {plan.seconds:.0f} s once the server is up", file=sys.stderr, flush=True)
    costs: dict[int, vllm_cost.VllmCost] = {}
    for cost in vllm_cost.measure(plan, _decided):
        costs[cost.concurrency] = cost
        saved["vllm"] = [asdict(found) for found in costs.values()]
        tables[f"vllm, {cost.concurrency}"] = _vllm_table(cost, options, saved["machine"])
        _save(saved, options)


def _save(saved: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        written = options.json.with_name(f".{options.json.name}")
        written.write_text(json.dumps(saved, indent=1) + "\n")
        written.replace(options.json)  # never half a file, whenever this is ended


def _bars(cost: vllm_cost.VllmCost) -> tuple[Bar, Bar, Bar]:
    """Of TPOT, TTFT and throughput on a GPU."""
    return (
        cost.tpot.bar(0.5, "%", 1, 100 / cost.tpot.off),
        cost.ttft.bar(max(20 * cost.ttft.off, 1.0), "ms", 2, 1e3),
        cost.throughput.bar(0.5, "% less", 1, -100 / cost.throughput.off),
    )


def _decided(cost: vllm_cost.VllmCost) -> bool:
    return not has_gpu() or all(found.decided for found in _bars(cost))


def _vllm_table(cost: vllm_cost.VllmCost, options: argparse.Namespace, machine: str) -> Results:
    own_bar = _OWN_US_CPU
    if has_gpu():
        own_bar = _OWN_US_GPU_LARGE if cost.concurrency >= _LARGE else _OWN_US_GPU
    tpot = _difference("TPOT, client's", cost.tpot, 1e6, "µs", 1)
    ttft = _difference("TTFT, client's", cost.ttft, 1e3, "ms", 2)
    throughput = _difference("throughput, tokens/s", cost.throughput, 1, "", 1)
    if has_gpu():  # with a model this small on a CPU, even the allowed host time is more than 0.5 %
        tpot[-1], ttft[-1], throughput[-1] = map(str, _bars(cost))
    rows = [tpot, ttft, throughput, *_own_rows(cost.own, own_bar)]
    thread = f"{cost.own_thread_us_per_step:.1f} µs"
    rows.append(["llmprobe's thread in the engine, processor time a step", "0", thread, "", "", ""])
    a_step = 1e6 * cost.concurrency  # a decode step makes one token for each request
    rows.append(_difference("engine thread's processor time a step", cost.engine_cpu, a_step, "µs", 1))
    rows.append(_difference("front end's processor time a token", cost.front_end_cpu, 1e6, "µs", 1))
    rows.append(["front end's own time a step, mean", "", f"{cost.front_end_us_per_step:.1f} µs", "", "", ""])
    rows.append(
        [
            "agent, of one core",
            f"{cost.agent_core_ratio_off:.1%}",
            f"{cost.agent_core_ratio:.1%}",
            "",
            "",
            "",
        ]
    )
    mebibytes = cost.agent_resident_bytes / (1 << 20)
    rows.append(
        ["agent, resident", "", f"{mebibytes:.0f} MiB", "", "", bar(mebibytes, _AGENT_BYTES >> 20, "MiB")]
    )
    if cost.gpu_memory:
        rows.append(_difference("GPU memory in use", cost.gpu_memory, 1 / (1 << 20), "MiB", 0))
    notes = [
        f"{cost.pairs} pairs of blocks of {options.block_seconds:g} s; {cost.requests} requests of "
        f"{options.prompt_tokens} + {options.output_tokens} tokens; {cost.own.steps} steps with the "
        f"probe on, {cost.steps_per_second:.0f} a second; {cost.windows} kernel windows in them"
    ]
    if options.spread_seconds:
        notes.append(f"the first requests were sent over {options.spread_seconds:g} s")
    if cost.tpot_alike is not None:
        notes.append(
            "without any switching TPOT of neighbouring blocks (off and off, on and on) differs by "
            f"a median of {cost.tpot_alike * 1e6:.0f} µs ({cost.tpot_alike / cost.tpot.off:.1%})"
        )
    return Results(
        f"vLLM, {cost.concurrency} request{'s' if cost.concurrency > 1 else ''} at a time",
        command("overhead.py"),
        machine,
        _HEADER,
        rows,
        notes,
    )


def _transformers_table(
    cost: transformers_cost.TransformersCost, options: argparse.Namespace, machine: str
) -> Results:
    token = _difference("a token, program's clock", cost.token, 1e6, "µs", 1)
    model = options.model if options.what == "transformers" else None
    if model:
        token[-1] = str(cost.token.bar(0.5, "%", 1, 100 / cost.token.off))
    rows = [
        token,
        _difference("a generate call", cost.call, 1e3, "ms", 2),
        _difference("program's processor time a token", cost.cpu, 1e6, "µs", 1),
        *_own_rows(cost.own, _OWN_US_GPU if model else _OWN_US_TRANSFORMERS),
    ]
    return Results(
        f"transformers, greedy generate{f', {model}' if model else ''}",
        command("overhead.py"),
        machine,
        _HEADER,
        rows,
        [
            f"{options.blocks} pairs of blocks of {options.block_seconds:g} s; {cost.calls} calls; "
            f"{cost.own.steps} steps with the probe on"
        ],
    )


def _difference(name: str, found: Difference, scale: float, unit: str, digits: int) -> list[str]:
    def show(value: float, sign: str = "") -> str:
        return f"{value * scale:{sign}.{digits}f}{' ' if unit else ''}{unit}"

    interval = "–"
    if found.low is not None and found.high is not None:
        interval = f"{found.low * scale:+.{digits}f} … {show(found.high, '+')}"
    change = f"{show(found.median, '+')} ({found.relative:+.1%})"
    return [name, show(found.off), show(found.on), change, interval, ""]


def _own_rows(own: OwnTime, most: float) -> list[list[str]]:
    return [
        ["own host time a step, median", "0", f"{own.median:.1f} µs", "", "", bar(own.median, most, "µs")],
        ["own host time a step, mean", "0", f"{own.mean:.1f} µs", "", "", bar(own.mean, most, "µs")],
        ["own host time a step, p99", "0", f"{own.p99:.1f} µs", "", "", ""],
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="What follows -- goes to vllm serve: overhead.py vllm --model dense -- --max-model-len 4096",
    )
    parser.add_argument("what", nargs="?", choices=("vllm", "transformers", "all"), default="all")
    parser.add_argument("--blocks", type=int, default=10, help="pairs of blocks, off and on [10]")
    parser.add_argument("--block-seconds", type=float, default=10.0, help="length of a block [10]")
    parser.add_argument("--warm-up-seconds", type=float, default=5.0, help="before the first block [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    group = parser.add_argument_group("vllm")
    group.add_argument(
        "--concurrency", type=int, nargs="+", default=[1], help="requests at a time; several in turn [1]"
    )
    group.add_argument(
        "--most-blocks",
        type=int,
        default=0,
        help="on a GPU: go on up to so many pairs while a bar lies within its interval [as --blocks]",
    )
    group.add_argument("--prompt-tokens", type=int, default=32, help="of each request [32]")
    group.add_argument("--output-tokens", type=int, default=64, help="of each request [64]")
    group.add_argument(
        "--spread-seconds",
        type=float,
        default=0.0,
        help="send the first requests over that long: about a request's length, and they end and begin one "
        "by one, not in waves [0]",
    )
    group.add_argument(
        "--model",
        metavar="PATH",
        help=f"a model directory, or a configuration without weights: {', '.join(CONFIGURATIONS)}; a "
        "configuration is also for `transformers`, on a GPU [the demo's tiny Llama, and one layer of one]",
    )
    group.add_argument(
        "--env", type=variable, action="append", default=[], metavar="NAME=VALUE", help="of the server"
    )
    options = with_flags(parser)
    if (
        options.what == "transformers"
        and options.model
        and not (options.model in CONFIGURATIONS and has_gpu())
    ):
        parser.error(
            f"--model {options.model}: transformers runs one of {', '.join(CONFIGURATIONS)} on a GPU; "
            "without --model a tiny one on the CPU"
        )
    if (
        options.blocks < 1
        or options.block_seconds <= 0
        or min(options.concurrency) < 1
        or options.output_tokens < 2
        or options.spread_seconds < 0
    ):
        parser.error(
            "--blocks and --concurrency from 1, --block-seconds above 0, --output-tokens from 2, "
            "--spread-seconds from 0"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
