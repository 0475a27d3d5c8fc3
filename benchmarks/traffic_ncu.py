"""Whether the bytes that llmprobe says a decode step must move are those that the GPU moves, by ncu.

    python benchmarks/traffic_ncu.py                       an 8B model of 12 layers, batch 1 and 32; 3 minutes
    python benchmarks/traffic_ncu.py --layers 36 --batch 1 --cache-control all
    python benchmarks/traffic_ncu.py --model moe --nvtx --json traffic.json

Runs vLLM with made-up weights under ncu, which profiles every kernel of one decode step a batch and counts
the bytes that leave the GPU's memory. Needs an NVIDIA GPU with 30 GB, vLLM, and the right to read counters.
Exit status 1 if a step is further than 5 % off. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support import profiled_steps
from support.gpu_models import CONFIGURATIONS, make_configuration
from support.machine import machine_line
from support.table import Results, command

from llmprobe.compute.facts import ModelFacts
from llmprobe.compute.traffic import traffic, traffic_by_kind

_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_BAR = 0.05
_HEADER = (
    "decode step",
    "kernels",
    "weights",
    "KV read",
    "KV written",
    "llmprobe, all",
    "ncu, read",
    "llmprobe ÷ ncu − 1",
    "bar",
    "ncu, written",
    "in our range",
)
#: A step's own range in ncu's NVTX columns: domain, then name.
_RANGE = "llmprobe:decode"


class NcuFailed(Exception):
    """ncu or the program in it ended badly; the message says what it said last."""


@dataclass(frozen=True)
class Kernel:
    """One launch, as ncu counted it. ``in_range``: inside of our own range; None without ``--nvtx``."""

    name: str
    read_bytes: float
    written_bytes: float
    in_range: bool | None


@dataclass(frozen=True)
class Step:
    """One decode step: what llmprobe says of it, and its kernels."""

    batch: int
    context: int
    by_kind: dict[str, float]
    estimated_bytes: float
    kernels: list[Kernel]

    @property
    def read_bytes(self) -> float:
        """By ncu."""
        return sum(kernel.read_bytes for kernel in self.kernels)

    @property
    def off(self) -> float:
        """How far llmprobe is from ncu."""
        return self.estimated_bytes / self.read_bytes - 1


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ncu's processes are ended
    machine = f"{machine_line()}; {_version(options.ncu)}"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmprobe-traffic-") as folder:
        steps = _measure(options, Path(folder))
    _table(steps, options, machine, time.monotonic() - begin).show(options.markdown)
    if options.json:
        saved = {
            "machine": machine,
            "command": command("traffic_ncu.py"),
            "steps": [asdict(s) for s in steps],
        }
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    return int(any(abs(step.off) > _BAR for step in steps))


def _measure(options: argparse.Namespace, folder: Path) -> list[Step]:
    layers = options.layers
    changes: dict[str, Any] = {"num_hidden_layers": layers} if layers else {}
    if layers and (kinds := CONFIGURATIONS[options.model].get("layer_types")):
        changes["layer_types"] = kinds[:layers]
    model = make_configuration(options.model, folder / "model", **changes)
    log = folder / "ncu.csv"
    _run(options, folder, model, log)
    rows = np.load(folder / profiled_steps.STEPS)
    facts = ModelFacts.from_json(json.loads((folder / profiled_steps.FACTS).read_text())["model"])
    found = _steps_of(read_kernels(log.read_text()))
    if len(found) != len(rows) or len(rows) != len(options.batch):
        raise NcuFailed(f"{len(options.batch)} steps asked for, {len(rows)} recorded, {len(found)} profiled")
    estimated, moved = traffic(rows, facts).sum(axis=1), traffic_by_kind(rows, facts)
    steps = []
    for index, (batch, row) in enumerate(zip(options.batch, rows, strict=True)):
        if (row["requests"], row["decode_tokens"], row["prompt_tokens"]) != (batch, batch, 0):
            raise NcuFailed(f"the profiled step was no decode step of {batch} requests: {row}")
        by_kind = {name: float(values[index]) for name, values in moved.items()}
        context = int(row["context_decode"].max())
        steps.append(Step(batch, context, by_kind, float(estimated[index]), found[index]))
    return steps


def _run(options: argparse.Namespace, folder: Path, model: Path, log: Path) -> None:
    """Raises NcuFailed."""
    most = max(options.batch)
    engine = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "enforce_eager": True,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "max_model_len": options.context + 64,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(most * options.context, 2048),  # all prompts in one step
        "kv_cache_memory_bytes": 4 << 30,
        "disable_log_stats": True,
    }
    asked = {"batches": options.batch, "context": options.context, "engine": engine}
    command = [options.ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--target-processes", "all", "--profile-from-start", "off", "--replay-mode", "kernel"]
    command += ["--clock-control", "none", "--cache-control", options.cache_control]
    command += ["--metrics", ",".join(_METRICS), *(["--nvtx"] if options.nvtx else [])]
    command += [sys.executable, profiled_steps.__file__, str(model), str(folder), json.dumps(asked)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    env = {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LLMPROBE": "1",
        "LLMPROBE_DIR": str(folder / "probe"),
        "LLMPROBE_AGENT": "off",
        "LLMPROBE_KERNEL_WINDOWS": "off",  # CUPTI is ncu's now
    }
    print(" ".join(command), file=sys.stderr, flush=True)
    output = folder / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(options.at_most)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        ended = f"ended with {code}" if code is not None else f"did not end in {options.at_most:.0f} s"
        said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        raise NcuFailed(f"ncu {ended}:\n{output.read_text(errors='replace')[-4000:]}\n{said}")


def read_kernels(text: str) -> list[Kernel]:
    """The launches in ncu's ``--page raw --csv``, in order. Raises NcuFailed."""
    lines = text.splitlines()
    head = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise NcuFailed(f"ncu has profiled nothing:\n{text[-2000:]}")
    kernels = []
    for row in csv.DictReader(lines[head:]):
        if not (row["ID"] or "").isdigit():  # the line of units
            continue
        values = [float((row[name] or "nan").replace(",", "")) for name in _METRICS]
        pushed = [text or "" for name, text in row.items() if name and "Push/Pop" in name]
        inside = any(_RANGE in text for text in pushed) if pushed else None
        kernels.append(Kernel(row["Kernel Name"], *values, inside))
    return kernels


def _steps_of(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Divided where a mark is, without the marks."""
    steps: list[list[Kernel]] = []
    for kernel in kernels:
        if profiled_steps.MARK in kernel.name:
            steps.append([])
        elif steps:
            steps[-1].append(kernel)
    return steps


def _table(steps: Sequence[Step], options: argparse.Namespace, machine: str, took: float) -> Results:
    layers = options.layers or CONFIGURATIONS[options.model]["num_hidden_layers"]
    notes = [
        f"{options.model}, {layers} layers, bfloat16, eager; --cache-control {options.cache_control}.",
        f"llmprobe: weights once, keys and values read and written. Took {took:.0f} s.",
    ]
    return Results(
        "Bytes of a decode step, llmprobe against ncu",
        command("traffic_ncu.py"),
        machine,
        _HEADER,
        [_row(step) for step in steps],
        notes,
    )


def _row(step: Step) -> list[str]:
    inside = [kernel.in_range for kernel in step.kernels]
    return [
        f"{step.batch} x {step.context / step.batch:.0f}",
        str(len(step.kernels)),
        *(_megabytes(step.by_kind[kind]) for kind in ("weights", "kv_read", "kv_write")),
        _megabytes(step.estimated_bytes),
        _megabytes(step.read_bytes),
        f"{step.off:+.2%}",
        f"± {_BAR:.0%}: {'held' if abs(step.off) <= _BAR else 'MISSED'}",
        _megabytes(sum(kernel.written_bytes for kernel in step.kernels)),
        "–" if None in inside else f"{sum(map(bool, inside))} of {len(inside)}",
    ]


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def _version(ncu: str) -> str:
    """Raises SystemExit if there is no ncu."""
    if shutil.which(ncu) is None:
        raise SystemExit(
            f"no {ncu} on PATH: it is part of CUDA's toolkit (Nsight Compute), or give --ncu PATH"
        )
    said = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False).stdout
    return "ncu " + next((line.split()[1] for line in said.splitlines() if line.startswith("Version")), "?")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="requests in a step [1 32]")
    parser.add_argument("--context", type=int, default=512, help="tokens of each request [512]")
    parser.add_argument("--model", choices=list(CONFIGURATIONS), default="dense", help="[dense]")
    parser.add_argument(
        "--layers", type=int, default=12, help="of the model, in full width [12]; 0: all that it has"
    )
    parser.add_argument(
        "--cache-control",
        choices=("none", "all"),
        default="none",
        help="none: caches as the kernel before left them; all: emptied before each kernel [none]",
    )
    parser.add_argument("--nvtx", action="store_true", help="also look which kernels lie in our own range")
    parser.add_argument("--ncu", default="ncu", metavar="PATH", help="[the one on PATH]")
    parser.add_argument("--at-most", type=float, default=500.0, metavar="SECONDS", help="for ncu [500]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there, kernel by kernel")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/accuracy.md")
    options = parser.parse_args()
    if min(options.batch) < 1 or options.context < 16:
        parser.error("--batch from 1, --context from 16")
    return options


if __name__ == "__main__":
    sys.exit(main())
