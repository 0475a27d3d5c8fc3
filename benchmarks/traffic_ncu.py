"""Whether the bytes that llmprobe says a decode step must move are those that the GPU moves, by ncu.

    python benchmarks/traffic_ncu.py                       an 8B model of 12 layers, batch 1 and 32; 3 minutes
    python benchmarks/traffic_ncu.py --layers 36 --batch 1 --cache-control all
    python benchmarks/traffic_ncu.py --model moe --nvtx --json traffic.json
    python benchmarks/traffic_ncu.py --data traffic        keeps what was recorded; once there, reads it again

Runs vLLM with made-up weights under ncu, which profiles every kernel of one decode step a batch and counts
the bytes that leave the GPU's memory. Needs an NVIDIA GPU with 30 GB, vLLM, and the right to read counters.
Exit status 1 if a step is further than 5 % off or was not measured. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
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
from support.ncu_output import METRICS, Kernel, NcuFailed, complaints, most_passes, read_kernels, steps_of
from support.table import Results, command

from llmprobe.compute.facts import ModelFacts
from llmprobe.compute.traffic import traffic, traffic_by_kind

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
#: A step's own NVTX range: domain, then name.
_RANGE = "llmprobe:decode"
_LOG, _OUTPUT, _ASKED = "ncu.csv", "output.txt", "asked.json"


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
    with contextlib.ExitStack() as stack:
        if options.data:
            folder = options.data.resolve()
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmprobe-traffic-")))
        return _show(_record(options, folder), folder, options)


def _show(recorded: dict[str, Any], folder: Path, options: argparse.Namespace) -> int:
    failed = [recorded["failed"]] if recorded["failed"] else []
    steps: list[Step] = []
    try:
        steps = _steps(folder)
    except (NcuFailed, OSError) as error:
        failed.append(str(error))
    measured = [step.batch for step in steps]
    if not failed and measured != options.batch:
        failed.append(f"asked for steps of {options.batch} requests, got them of {measured}")
    for one in failed:
        print(one, file=sys.stderr, flush=True)
    log = folder / _LOG
    passes = most_passes(log.read_text(errors="replace")) if log.exists() else None
    _table(steps, options, recorded, passes, failed).show(options.markdown)
    if options.json:
        saved = {
            "machine": recorded["machine"],
            "passes": passes,
            "command": command("traffic_ncu.py"),
            "steps": [asdict(s) for s in steps],
            "failed": failed,
        }
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    return int(bool(failed) or not all(abs(step.off) <= _BAR for step in steps))


def _record(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run what is asked for, unless it was and lies in ``folder``; returns on what, and how it ended."""
    names = ("batch", "context", "model", "layers", "cache_control", "nvtx")
    asked = {name: getattr(options, name) for name in names}
    file = folder / _ASKED
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["asked"] != asked:
            raise SystemExit(f"{folder} holds other settings ({kept['asked']}): choose another folder")
        return kept
    machine = f"{machine_line()}; {_version(options.ncu)}"
    for name in (_LOG, profiled_steps.STEPS, profiled_steps.FACTS):
        (folder / name).unlink(missing_ok=True)  # of a run that failed
    begin = time.monotonic()
    failed = ""
    try:
        _run(options, folder)
    except NcuFailed as error:
        failed = str(error)
    done = {"asked": asked, "machine": machine, "seconds": time.monotonic() - begin, "failed": failed}
    if not failed:
        file.write_text(json.dumps(done, indent=1) + "\n")
    return done


def _steps(folder: Path) -> list[Step]:
    """Those that were recorded; of a program that ended early, the ones before. Raises NcuFailed."""
    found = steps_of(read_kernels((folder / _LOG).read_text(errors="replace"), _RANGE), profiled_steps.MARK)
    rows = np.load(folder / profiled_steps.STEPS)
    facts = ModelFacts.from_json(json.loads((folder / profiled_steps.FACTS).read_text())["model"])
    estimated, moved = traffic(rows, facts).sum(axis=1), traffic_by_kind(rows, facts)
    steps = []
    for index, (row, kernels) in enumerate(zip(rows, found, strict=False)):
        batch = int(row["requests"])
        if (row["decode_tokens"], row["prompt_tokens"]) != (batch, 0):
            raise NcuFailed(f"a profiled step is no decode step: {row}")
        if not sum(kernel.read_bytes for kernel in kernels):
            raise NcuFailed(f"ncu saw no byte read in the step of {batch} requests, {len(kernels)} kernels")
        by_kind = {name: float(values[index]) for name, values in moved.items()}
        context = int(row["context_decode"].max())
        steps.append(Step(batch, context, by_kind, float(estimated[index]), kernels))
    return steps


def _run(options: argparse.Namespace, folder: Path) -> None:
    """Raises NcuFailed."""
    model, per_token = _model(options, folder)
    log, output = folder / _LOG, folder / _OUTPUT
    most, length = max(options.batch), options.context + 64
    engine = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "enforce_eager": True,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "max_model_len": length,
        "max_num_seqs": most,
        "max_num_batched_tokens": max(most * options.context, 2048),  # all prompts in one step
        "kv_cache_memory_bytes": max(4 << 30, 2 * most * length * per_token),
        "disable_log_stats": True,
    }
    asked = {"batches": options.batch, "context": options.context, "engine": engine}
    command = [options.ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--target-processes", "all", "--profile-from-start", "off", "--replay-mode", "kernel"]
    command += ["--clock-control", "none", "--cache-control", options.cache_control]
    command += ["--metrics", ",".join(METRICS), *(["--nvtx"] if options.nvtx else [])]
    command += [sys.executable, profiled_steps.__file__, str(model), str(folder), json.dumps(asked)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    env = {
        **kept,
        "LC_ALL": "C.UTF-8",  # ncu writes numbers as the locale does
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LLMPROBE": "1",
        "LLMPROBE_DIR": str(folder / "probe"),
        "LLMPROBE_AGENT": "off",
        "LLMPROBE_KERNEL_WINDOWS": "off",  # CUPTI is ncu's now
    }
    print(" ".join(command), file=sys.stderr, flush=True)
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
        said = complaints(log.read_text(errors="replace")) if log.exists() else ""
        raise NcuFailed(f"ncu {ended}\n{said}\n{output.read_text(errors='replace')[-4000:]}")


def _model(options: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """The model's directory, and the most bytes of keys and values that a token of it needs."""
    layers = options.layers
    changes: dict[str, Any] = {"num_hidden_layers": layers} if layers else {}
    if layers and (kinds := CONFIGURATIONS[options.model].get("layer_types")):
        changes["layer_types"] = kinds[:layers]
    config = {**CONFIGURATIONS[options.model], **changes}
    per_token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return make_configuration(options.model, folder / "model", **changes), per_token


def _table(
    steps: Sequence[Step],
    options: argparse.Namespace,
    recorded: dict[str, Any],
    passes: int | None,
    failed: Sequence[str],
) -> Results:
    layers = options.layers or CONFIGURATIONS[options.model]["num_hidden_layers"]
    notes = [
        f"{options.model}, {layers} layers, bfloat16, eager; --cache-control {options.cache_control}.",
        f"llmprobe: weights once, keys and values read and written. Took {recorded['seconds']:.0f} s.",
        f"ncu ran a kernel {passes or '?'} times at most.",
        *(f"FAILED: {' '.join(one.splitlines()[:2])}" for one in failed),
    ]
    return Results(
        "Bytes of a decode step, llmprobe against ncu",
        command("traffic_ncu.py"),
        recorded["machine"],
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
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="keep there what was recorded; if it is there, only read it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there, kernel by kernel")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/accuracy.md")
    options = parser.parse_args()
    if min(options.batch) < 1 or options.context < 16:
        parser.error("--batch from 1, --context from 16")
    return options


if __name__ == "__main__":
    sys.exit(main())
