"""Whether bytes and FLOPs of a step are right, for each architecture that is modelled.

    python benchmarks/work_model.py
    python benchmarks/work_model.py --engine transformers --only "latent attention"
    python benchmarks/work_model.py --device cuda         on a GPU, with transformers

Makes a tiny model of each kind, runs it with transformers and with vLLM's CPU build under llmprobe, and holds
what llmprobe says against safetensors files, formulas on the configuration, torch's FlopCounterMode and the
masks of attention. Exit status 1 if a figure is off by more than its bar. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.families import FAMILIES, Family
from support.machine import machine_line
from support.table import Results, command

from llmprobe.compute.facts import ATTENTION, EXPERTS, HEAD, LINEAR, ModelFacts
from llmprobe.compute.traffic import work
from llmprobe.record.layout import STEP

BAR = 0.01
#: Kernels on CPUs keep sums of rows beside integer weights, which count for much in rows of 128.
PACKED_BAR = 0.10
QUANTITIES = (
    "weights",
    "weights by operator",
    "KV a token",
    "prefill",
    "its attention",
    "decode",
    "its attention",
)
PROMPTS, TOKENS = (40, 24), 6


@dataclass
class Found:
    """One quantity of one model: what llmprobe says and what is so."""

    family: str
    engine: str
    quantity: str
    ours: float
    truth: float
    bar: float = BAR

    @property
    def error(self) -> float:
        """Relative; 0 where both are nothing."""
        return (self.ours - self.truth) / self.truth if self.truth else float(self.ours != 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), help="only with this one")
    parser.add_argument("--only", metavar="NAME", help="only this kind of model")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="of transformers; vLLM is its CPU build [cpu]",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in the docs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure")
    arguments = parser.parse_args()
    families = [family for family in FAMILIES if arguments.only in (None, family.name)]
    if arguments.device != "cpu":
        if arguments.engine == "vllm":
            parser.error(f"--device {arguments.device}: --engine transformers alone runs there")
        arguments.engine = "transformers"
    if not families:
        parser.error(f"--only {arguments.only!r}: one of {', '.join(family.name for family in FAMILIES)}")
    results = Results(
        "The model of the work, by kind of model",
        command("work_model.py"),
        machine_line(),
        (
            "model",
            "engine",
            "weights",
            "by operator",
            "KV a token",
            "prefill",
            "attention",
            "decode",
            "attention",
        ),
    )
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            path = family.make(Path(folder) / family.name.replace(" ", "-"))
            truth = Truth(family, path, arguments.device)
            for engine, check in (("transformers", in_transformers), ("vllm", in_vllm)):
                if arguments.engine in (None, engine) and (engine == "vllm" or not family.engine):
                    print(f"{family.name}, {engine}", file=sys.stderr, flush=True)
                    rows = list(check(family, path, truth, results.notes))
                    found += rows
                    if rows:
                        results.rows.append(_row(family, engine, rows))
    results.notes.insert(0, _READING)
    results.show(arguments.markdown)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) | {"error": one.error} for one in found], indent=1))
    return int(any(abs(one.error) > one.bar for one in found))


_READING = (
    "Each cell: what llmprobe says in bytes or FLOPs, and how far that is from the truth. Prefill: a prompt "
    "of 40 and one of 24 tokens; decode: the step after it; matrix products first, then attention."
)


def _line(failure: str) -> str:
    return failure.strip().splitlines()[0].rstrip(".")


def _row(family: Family, engine: str, rows: list[Found]) -> list[str]:
    cells = []
    for index, name in enumerate(QUANTITIES):
        same = [row for row in rows if row.quantity == f"{index} {name}"]
        worst = max(same, key=lambda row: abs(row.error), default=None)
        if worst is None:
            cells.append("")
            continue
        missed = " MISSED" if abs(worst.error) > worst.bar else ""
        cells.append(f"{_short(sum(row.ours for row in same))} ({worst.error:+.2%}){missed}")
    return [family.name, engine, *cells]


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


class Truth:
    """What is true of one model, found without llmprobe."""

    def __init__(self, family: Family, path: Path, device: str) -> None:
        import torch
        from support.work_truth import counted

        self.path, self.device = path, device
        model = family.model().to(device)
        self.config = model.config
        self.prefill, self.decode = [], []
        for length in PROMPTS:
            ids = torch.tensor([[10 + token % 7 for token in range(length)]], device=device)
            with counted(model) as steps:
                model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
            self.prefill.append(steps[0])
            self.decode.append(steps[1])


def in_transformers(family: Family, path: Path, truth: Truth, notes: list[str]) -> Iterator[Found]:
    """Ours from ``generate`` with the hooks installed."""
    from support.work_truth import file_bytes, kv_bytes_per_token

    said = _program("transformers_facts.py", path, {"device": truth.device})
    (worker,) = said["workers"]
    model = ModelFacts.from_json(worker["facts"]["model"])
    stored = file_bytes(path)
    yield from _weights(family, "transformers", [model], stored, BAR)
    cached = kv_bytes_per_token(truth.config, 2, latent=True)
    yield Found(
        family.name, "transformers", "2 KV a token", sum(g.bytes_per_token for g in model.kv_groups), cached
    )
    flops = work(_steps(worker["steps"]), model)
    for index, (steps, first) in enumerate(((truth.prefill, 3), (truth.decode, 5))):
        # Each prompt is generated from on its own; its steps follow each other.
        ours = flops[index] + flops[index + TOKENS]
        true = steps[0] + steps[1]
        yield from _flops(
            family, "transformers", first, ours, true.linear + true.experts + true.head, true.attention
        )


def in_vllm(family: Family, path: Path, truth: Truth, notes: list[str]) -> Iterator[Found]:
    """Ours from a vLLM worker, or from all of its shards together."""
    from support.work_truth import (
        absorbed_flops_per_pair,
        file_bytes,
        kv_bytes_per_token,
        replicated,
        stored_bytes,
    )

    said = _program("vllm_facts.py", path, dict(family.engine))
    models = [ModelFacts.from_json(worker["facts"]["model"]) for worker in said["workers"]]
    if not models:
        notes.append(f"{family.name}: vLLM cannot load it on this processor ({_line(said['failure'])}).")
        return
    stored = file_bytes(path)
    again, matrices = (size * (len(models) - 1) for size in replicated(path))
    stored["all"] += again
    stored["linear"] += again
    bar = BAR
    if family.quantization:
        bits, group = (8, None) if "int-quantized" in str(family.quantization) else (4, 32)
        packed = stored_bytes(path, bits, group)
        stored["all"] += packed - stored["linear"]
        stored["linear"], bar = packed, PACKED_BAR
    yield from _weights(family, "vllm", models, stored, bar)
    cached = kv_bytes_per_token(truth.config, 2, latent=True)
    ours = sum(group.bytes_per_token for model in models for group in model.kv_groups)
    yield Found(family.name, "vllm", "2 KV a token", ours, cached)
    if said["failure"]:
        notes.append(
            f"{family.name}: loaded, but vLLM cannot run it on this processor ({_line(said['failure'])})."
        )
        return
    flops = sum(
        work(_steps(worker["steps"]), model) for worker, model in zip(said["workers"], models, strict=True)
    )
    rows = said["workers"][0]["steps"]
    true = truth.prefill[0] + truth.prefill[1]
    products = true.linear + true.experts + true.head + 2 * matrices * sum(PROMPTS)
    yield from _flops(family, "vllm", 3, flops[0], products, true.attention)
    # What a token costs in decoding is what it costs in a prompt; the head sees every token.
    token = (true.linear + true.experts) / sum(PROMPTS) + true.head / len(PROMPTS) + 2 * matrices
    attention = sum(step.attention for step in truth.decode)
    if getattr(truth.config, "kv_lora_rank", None):
        attention = absorbed_flops_per_pair(truth.config) * sum(step.pairs for step in truth.decode)
    if any(row["draft_tokens"] for row in rows):
        for row, flop in zip(rows[1:], flops[1:], strict=True):
            products = token * row["decode_tokens"]
            yield Found(family.name, "vllm", "5 decode", flop.sum() - flop[ATTENTION], products)
        drafted = sum(row["draft_tokens"] for row in rows)
        notes.append(
            f"{family.name}: {drafted} drafts in {len(rows) - 1} steps, each held against its tokens."
        )
        return
    yield from _flops(family, "vllm", 5, flops[1], token * len(PROMPTS), attention)
    if engine := said["engine_flops"]:
        estimate = sum(engine.values()) * len(models)
        notes.append(
            f"{family.name}: vLLM's perf.py has {estimate / (token * len(PROMPTS) + attention):.3f} of the "
            "FLOPs of that decode step."
        )


def _weights(
    family: Family, engine: str, models: list[ModelFacts], stored: dict[str, int], bar: float
) -> Iterator[Found]:
    yield Found(
        family.name, engine, "0 weights", sum(model.weights_bytes for model in models), stored["all"], bar
    )
    head = stored["head"] or stored["embedding"]
    for ours, true in (
        (sum(model.linear.bytes for model in models), stored["linear"]),
        (sum(model.experts.bytes for model in models if model.experts), stored["experts"]),
        (sum(model.head.bytes for model in models), head),
    ):
        yield Found(family.name, engine, "1 weights by operator", ours, true, bar)


def _flops(
    family: Family, engine: str, first: int, ours: Any, products: float, attention: float
) -> Iterator[Found]:
    multiplied = float(ours[LINEAR] + ours[EXPERTS] + ours[HEAD])
    expanded = float(ours[ATTENTION])
    yield Found(family.name, engine, f"{first} {QUANTITIES[first]}", multiplied, products)
    yield Found(family.name, engine, f"{first + 1} {QUANTITIES[first + 1]}", expanded, attention)


def _steps(rows: list[dict[str, Any]]) -> np.ndarray:
    steps = np.zeros(len(rows), STEP)
    for index, row in enumerate(rows):
        for name, value in row.items():
            steps[name][index] = value
    return steps


def _program(name: str, path: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """What one of the programs in ``support`` prints about the model at ``path``."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LLMPROBE")} | {
            "LLMPROBE": "1",
            "LLMPROBE_AGENT": "off",
            "LLMPROBE_DIR": directory,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if arguments.get("tensor_parallel_size", 1) > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        program = [sys.executable, str(Path(__file__).parent / "support" / name)]
        done = subprocess.run(
            [*program, str(path), json.dumps(arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("JSON ")]
    if not lines:
        raise SystemExit(f"{name} {path.name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("JSON "))
    return found


if __name__ == "__main__":
    sys.exit(main())
