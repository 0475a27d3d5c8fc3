"""What llmprobe costs the program it measures.

    python benchmarks/overhead.py                       both, one after the other
    python benchmarks/overhead.py vllm --blocks 10 --concurrency 1
    python benchmarks/overhead.py vllm --model PATH --concurrency 1 16 128 \\
        --env LLMPROBE_KERNEL_WINDOWS=0.1/5 -- --load-format dummy
    python benchmarks/overhead.py transformers

One process lives through the whole measurement; ``llmprobe off`` and ``on`` take turns in it. Exit status 1
if a bar is missed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import transformers_cost, vllm_cost
from support.machine import has_gpu, machine_line
from support.own_time import OwnTime
from support.paired import Difference
from support.table import Results, bar, command

_HEADER = ("", "off", "on", "on − off", "95 % interval", "bar")
_OWN_US_TRANSFORMERS = 15.0
_OWN_US_CPU = 30.0
_OWN_US_GPU, _OWN_US_GPU_LARGE, _LARGE = 25.0, 40.0, 64
_AGENT_BYTES = 150 << 20


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    machine = machine_line()
    saved: dict[str, Any] = {"machine": machine, "command": command("overhead.py")}
    tables = []
    if options.what in ("vllm", "all"):
        plan = vllm_cost.Plan(
            options.blocks,
            options.block_seconds,
            options.warm_up_seconds,
            options.concurrency,
            options.prompt_tokens,
            options.output_tokens,
            options.model,
            options.flags,
            dict(options.env),
        )
        saved["vllm"] = []
        for cost in vllm_cost.measure(plan):
            saved["vllm"].append(asdict(cost))
            tables.append(_vllm_table(cost, options, machine))
            if options.json:  # also if a later concurrency fails
                options.json.write_text(json.dumps(saved, indent=1) + "\n")
    if options.what in ("transformers", "all"):
        program = transformers_cost.measure(
            transformers_cost.Plan(options.blocks, options.block_seconds, options.warm_up_seconds)
        )
        saved["transformers"] = asdict(program)
        tables.append(_transformers_table(program, options, machine))
    for table in tables:
        table.show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    return int(any("MISSED" in cell for table in tables for row in table.rows for cell in row))


def _vllm_table(cost: vllm_cost.VllmCost, options: argparse.Namespace, machine: str) -> Results:
    own_bar = _OWN_US_CPU
    if has_gpu():
        own_bar = _OWN_US_GPU_LARGE if cost.concurrency >= _LARGE else _OWN_US_GPU
    tpot = _difference("TPOT, client's", cost.tpot, 1e6, "µs", 1)
    ttft = _difference("TTFT, client's", cost.ttft, 1e3, "ms", 2)
    throughput = _difference("throughput, tokens/s", cost.throughput, 1, "", 1)
    if has_gpu():  # with a model this small on a CPU, even the allowed host time is more than 0.5 %
        tpot[-1] = bar(cost.tpot.relative * 100, 0.5, "%", 1)
        ttft_bar = max(0.02 * cost.ttft.off, 1e-3)
        ttft[-1] = bar(cost.ttft.median * 1e3, ttft_bar * 1e3, "ms", 2)
        throughput[-1] = bar(-cost.throughput.relative * 100, 0.5, "% less", 1)
    rows = [tpot, ttft, throughput, *_own_rows(cost.own, own_bar)]
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
    return Results(
        f"vLLM, {cost.concurrency} request{'s' if cost.concurrency > 1 else ''} at a time",
        command("overhead.py"),
        machine,
        _HEADER,
        rows,
        [
            f"{options.blocks} pairs of blocks of {options.block_seconds:g} s; {cost.requests} requests of "
            f"{options.prompt_tokens} + {options.output_tokens} tokens; {cost.own.steps} steps with the "
            f"probe on, {cost.steps_per_second:.0f} a second; {cost.windows} kernel windows in them"
        ],
    )


def _transformers_table(
    cost: transformers_cost.TransformersCost, options: argparse.Namespace, machine: str
) -> Results:
    rows = [
        _difference("a token, program's clock", cost.token, 1e6, "µs", 1),
        _difference("a generate call", cost.call, 1e3, "ms", 2),
        _difference("program's processor time a token", cost.cpu, 1e6, "µs", 1),
        *_own_rows(cost.own, _OWN_US_TRANSFORMERS),
    ]
    return Results(
        "transformers, greedy generate",
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


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("vllm", "transformers", "all"), default="all")
    parser.add_argument("--blocks", type=int, default=10, help="pairs of blocks, off and on [10]")
    parser.add_argument("--block-seconds", type=float, default=10.0, help="length of a block [10]")
    parser.add_argument("--warm-up-seconds", type=float, default=5.0, help="before the first block [5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    group = parser.add_argument_group("vllm")
    group.add_argument(
        "--concurrency", type=int, nargs="+", default=[1], help="requests at a time; several take turns [1]"
    )
    group.add_argument("--prompt-tokens", type=int, default=32, help="of each request [32]")
    group.add_argument("--output-tokens", type=int, default=64, help="of each request [64]")
    group.add_argument("--model", type=Path, help="a model directory [the demo's tiny Llama]")
    group.add_argument(
        "--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="of the server"
    )
    group.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of vllm serve")
    options = parser.parse_args()
    if (
        options.blocks < 1
        or options.block_seconds <= 0
        or min(options.concurrency) < 1
        or options.output_tokens < 2
    ):
        parser.error("--blocks and --concurrency from 1, --block-seconds above 0, --output-tokens from 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
