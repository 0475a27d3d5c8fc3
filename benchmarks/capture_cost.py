"""What a capture costs a live vLLM server under load, and how far its gaps agree with the live ones.

    python benchmarks/capture_cost.py                              the demo's tiny model
    python benchmarks/capture_cost.py --model dense --in-a-row 50 -- --max-model-len 4096
    python benchmarks/capture_cost.py --nsys --model dense         the same under llmprobe run --nsys
    python benchmarks/capture_cost.py --tools kernels torch --seconds 2 --torch-cpu

One server lives through the whole measurement. Exit status 1 if a capture failed, or if the gap ratio of a
report's phase and the live one of the same seconds are further apart than 0.03; where the live one is a
lower bound for want of kernel windows (`--env LLMPROBE_KERNEL_WINDOWS=0.1/5` opens some), if it is that far
above. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.capturing import (
    TOLERANCE,
    CaptureFailed,
    Captures,
    Flood,
    Gap,
    Look,
    Row,
    Stretch,
    profiler_flags,
)
from support.gpu_models import CONFIGURATIONS, served
from support.load import Load
from support.machine import machine_line
from support.nsys_server import GRAPHS
from support.serving import NAME, running_server, variable, with_flags
from support.switch import wait_known
from support.table import Results, command

_LOOKS = (
    "",
    "TPOT before",
    "while recorded",
    "while analysed",
    "longest gap between tokens before",
    "while recorded",
    "while analysed",
    "engine rid of it",
    "done",
    "files",
)
_GAPS = (
    *("", "trust", "kernels", "idle", "phase", "sync gap, report", "less what recording added"),
    *("live", "live − report", "bar"),
)
_ROWS = (
    "",
    "captures",
    "each",
    "TPOT before",
    "after",
    "resident before",
    "after the first",
    "after the last",
    "GPU",
)


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    machine = machine_line()
    looks: list[Look] = []
    rows: list[Row] = []
    failed: list[str] = []
    tpot: list[Stretch] = []
    floods: list[Flood] = []
    with tempfile.TemporaryDirectory(prefix="llmprobe-capture-cost-") as name:
        folder = Path(name)
        try:
            _measure(options, folder, looks, rows, failed, tpot, floods)
        finally:  # also what was seen before it broke
            tables = _tables(options, machine, looks, rows, failed, tpot)
            tables += [_flood_table(one, machine) for one in floods]
            if options.json:
                saved = {
                    "machine": machine,
                    "command": command("capture_cost.py"),
                    "looks": [asdict(look) for look in looks],
                    "in_a_row": [asdict(row) for row in rows],
                    "plain": [asdict(stretch) for stretch in tpot],
                    "floods": [asdict(one) for one in floods],
                    "failed": failed,
                }
                options.json.write_text(json.dumps(saved, indent=1) + "\n")
            for table in tables:
                table.show(options.markdown)
    apart = any(not gap.held for look in looks for gap in look.gaps)
    return int(bool(failed) or apart or any(row.failed for row in rows))


def _measure(
    options: argparse.Namespace,
    folder: Path,
    looks: list[Look],
    rows: list[Row],
    failed: list[str],
    plain: list[Stretch],
    floods: list[Flood],
) -> None:
    traces = folder / "vllm-traces"
    traces.mkdir()
    model, flags = (None, []) if options.model is None else served(options.model, folder)
    if options.vllm:
        flags += profiler_flags(traces)
    env = {"LLMPROBE_CAPTURE_DIR": str(folder / "captures"), **dict(options.env)}
    with running_server(model, [*flags, *options.flags], env, _prefix(options)) as server:
        wait_known(server.directory)
        load = Load(server.port, NAME, options.concurrency, options.prompt_tokens, options.output_tokens)
        with load:
            load.wait(options.warm_up_seconds)
            captures = Captures(server, load, options.output_tokens, options.before_seconds)
            plain.append(captures.stretch(*captures.quiet()))
            there = captures.tools()
            wanted = options.tools or [tool for tool in reversed(there) if there[tool] is None]
            for tool in wanted:
                print(f"capture by {tool}", file=sys.stderr, flush=True)
                try:
                    looks.append(captures.take(tool, options.seconds, **_extra(tool, options)))
                    if options.twice:
                        looks.append(captures.take(tool, options.seconds, **_extra(tool, options)))
                except CaptureFailed as error:
                    failed.append(str(error))
            if options.in_a_row and options.none_seconds:
                rows.append(captures.none_in_a_row(options.none_seconds))
            for tool in wanted if options.in_a_row else ():
                try:
                    rows.append(captures.in_a_row(tool, options.in_a_row, options.row_seconds))
                except CaptureFailed as error:
                    failed.append(f"in a row: {error}")
            plain.append(captures.stretch(*captures.quiet()))
            if options.flood:
                try:
                    floods.append(captures.flood(options.flood, options.before_seconds))
                except CaptureFailed as error:
                    failed.append(str(error))
            if options.vllm:  # the last: what it leaves behind is none of our captures'
                print("vLLM's own profiler", file=sys.stderr, flush=True)
                try:
                    looks.append(captures.take_vllm(options.seconds, traces))
                except CaptureFailed as error:
                    failed.append(str(error))


def _prefix(options: argparse.Namespace) -> list[str]:
    if options.nsys is None:
        return []
    program = str(Path(sys.executable).with_name("llmprobe"))
    nsys = f"--nsys={options.nsys}" if options.nsys else "--nsys"
    return [program, "run", nsys, "--cuda-graph-trace", options.cuda_graph_trace, "--no-summary", "--"]


def _extra(tool: str, options: argparse.Namespace) -> dict[str, Any]:
    return {"torch_cpu": True} if tool == "torch" and options.torch_cpu else {}


def _tables(
    options: argparse.Namespace,
    machine: str,
    looks: Sequence[Look],
    rows: Sequence[Row],
    failed: Sequence[str],
    plain: Sequence[Stretch],
) -> list[Results]:
    said = [
        f"{options.concurrency} requests of {options.prompt_tokens} + {options.output_tokens} tokens at a "
        f"time; captures of {options.seconds:g} s. TPOT: median of the requests that ran in part in that "
        "time, and how many. While recorded: from the ask until the engine is rid of what it recorded."
    ]
    if plain:
        said.append(f"TPOT before the first capture {_tpot(plain[0])}, after the last {_tpot(plain[-1])}.")
    said += [f"{look.tool}: {note}." for look in looks for note in look.notes]
    said += [f"FAILED: {one}" for one in failed]
    title = "Captures of a server under load" + (", started under nsys" if options.nsys is not None else "")
    run = command("capture_cost.py")
    tables = [Results(title, run, machine, _LOOKS, [_look_row(look) for look in looks], said)]
    if compared := [look for look in looks if look.trust]:
        reasons = [f"{look.tool}: {reason}" for look in compared for reason in look.trust_reasons]
        tables.append(
            Results(
                f"{title}: gaps",
                run,
                machine,
                _GAPS,
                [row for look in compared for row in _gap_rows(look)],
                reasons,
            )
        )
    if rows:
        notes = [
            f"Captures of {options.row_seconds:g} s. Resident: the engine's processes. GPU: memory in use. "
            "None: the same server so long without a capture; its memory half way and at the end."
        ]
        notes += [f"FAILED: {row.tool} {one}" for row in rows for one in row.failed]
        tables.append(Results(f"{title}: in a row", run, machine, _ROWS, [_row(row) for row in rows], notes))
    return tables


def _flood_table(one: Flood, machine: str) -> Results:
    cells = [
        f"{one.calls_per_second:.0f}",
        ", ".join(f"{status}: {count}" for status, count in sorted(one.statuses.items())),
        _tpot(one.before),
        _tpot(one.during, one.before),
        f"{one.before.longest_gap_seconds * 1e3:.0f} ms",
        f"{one.during.longest_gap_seconds * 1e3:.0f} ms",
    ]
    header = ("calls a second", "answers", "TPOT before", "meanwhile", "longest gap before", "meanwhile")
    return Results("A flood of calls to the agent", command("capture_cost.py"), machine, header, [cells])


def _look_row(look: Look) -> list[str]:
    stretches = (look.before, look.recording, look.after)
    return [
        look.tool,
        *(_tpot(one, look.before) for one in stretches),
        *(f"{one.longest_gap_seconds * 1e3:.0f} ms" if one.requests else "–" for one in stretches),
        f"{look.engine_seconds:.1f} s",
        f"{look.done_seconds:.1f} s",
        f"{look.file_bytes / 1e6:.1f} MB",
    ]


def _tpot(one: Stretch, before: Stretch | None = None) -> str:
    if one.tpot_seconds is None:
        return "–"
    change = ""
    if before is not None and before is not one and before.tpot_seconds:
        change = f", {one.tpot_seconds / before.tpot_seconds - 1:+.1%}"
    return f"{one.tpot_seconds * 1e3:.3f} ms ({one.requests}{change})"


def _gap_rows(look: Look) -> list[list[str]]:
    seen = [
        look.tool,
        look.trust,
        "–" if look.kernels is None else str(look.kernels),
        _ratio(look.idle_report),
    ]
    return [[*seen, *_gap(gap)] for gap in look.gaps] or [[*seen, *"–––––", ""]]


def _gap(gap: Gap) -> list[str]:
    bar = f"lower bound, + {TOLERANCE}" if gap.bound else f"± {TOLERANCE}"
    held = "held" if gap.held else "MISSED"
    ratios = (_ratio(one) for one in (gap.report, gap.undisturbed, gap.live))
    return [gap.phase, *ratios, f"{gap.apart:+.4f}", f"{bar}: {held}"]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _row(row: Row) -> list[str]:
    memory = (row.memory_before, row.memory_first, row.memory_after)
    gpu = "–"
    if row.memory_before.gpu_bytes is not None:
        gpu = " → ".join(f"{(one.gpu_bytes or 0) >> 20}" for one in memory) + " MiB"
    return [
        row.tool,
        str(row.count),
        f"{row.seconds_each:.1f} s",
        _tpot(row.before),
        _tpot(row.after, row.before),
        *(f"{one.resident_bytes >> 20} MiB" for one in memory),
        gpu,
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="What follows -- goes to vllm serve: capture_cost.py --model dense -- --max-model-len 4096",
    )
    names = ", ".join(CONFIGURATIONS)
    parser.add_argument(
        "--model",
        metavar="DIR",
        help=f"a model directory, or one of {names} with made-up weights [the demo's tiny Llama]",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a capture [2]")
    parser.add_argument("--tools", nargs="+", choices=("nsys", "torch", "kernels"), help="[all there are]")
    parser.add_argument(
        "--nsys", nargs="?", const="", metavar="PATH", help="start the server under `llmprobe run --nsys`"
    )
    parser.add_argument(
        "--cuda-graph-trace",
        choices=GRAPHS,
        default=GRAPHS[0],
        help="of --nsys: CUDA graphs as one each, or by kernel, which can hang the server [graph]",
    )
    parser.add_argument("--torch-cpu", action="store_true", help="torch: operators on the host too")
    parser.add_argument("--twice", action="store_true", help="each tool twice: the first sets it up")
    parser.add_argument(
        "--no-vllm", dest="vllm", action="store_false", help="leave vLLM's own /start_profile out"
    )
    parser.add_argument(
        "--in-a-row", type=int, default=5, metavar="N", help="then N captures by each tool [5]"
    )
    parser.add_argument(
        "--none-seconds", type=float, default=60.0, help="before them, so long without any; 0: not [60]"
    )
    parser.add_argument("--row-seconds", type=float, default=1.0, help="length of each of those [1]")
    parser.add_argument(
        "--flood", type=float, default=1000.0, metavar="N", help="calls a second to the agent; 0: none [1000]"
    )
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time [16]")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each request [32]")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each request [64]")
    parser.add_argument("--warm-up-seconds", type=float, default=5.0, help="before the first capture [5]")
    parser.add_argument("--before-seconds", type=float, default=4.0, help="of plain load before each [4]")
    parser.add_argument(
        "--env", type=variable, action="append", default=[], metavar="NAME=VALUE", help="of the server"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the tables as in docs/captures.md")
    options = with_flags(parser)
    if min(options.seconds, options.row_seconds) <= 0 or options.in_a_row < 0 or options.output_tokens < 2:
        parser.error("--seconds and --row-seconds above 0, --in-a-row from 0, --output-tokens from 2")
    if options.nsys is not None:
        options.vllm = False  # torch's profiler sees nothing under nsys
    return options


if __name__ == "__main__":
    sys.exit(main())
