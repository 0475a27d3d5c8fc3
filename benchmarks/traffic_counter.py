"""Bytes that decode steps move by the model of the work, beside the GPU's own DRAM counter.

    python benchmarks/traffic_counter.py                           every kind; 3 minutes each
    python benchmarks/traffic_counter.py --only fp8-weights --only drafts --markdown
    python benchmarks/traffic_counter.py --only two-gpus           needs two GPUs
    python benchmarks/traffic_counter.py --list

Serves models whose weights, cache or split over GPUs is of another kind than a plain dense model's, keeps a
steady number of requests decoding, and holds llmprobe's MBU against what NVML counted over the same seconds.
With made-up weights the routers of `latent-experts` send every token to the same experts: there the model,
which takes routing for even, has to miss, and what is shown is the verdict that the counter puts right.
Needs NVIDIA GPUs of 80 GB that have the counters (Hopper on), and vLLM. Exit status 1 if a bar is missed, a
server does not come up, or nothing was counted. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.accuracy_table import Shape, counter_bar
from support.counted import counted, ranks, wait_steady
from support.families import integers
from support.gpu_models import make_configuration
from support.journals import Polling, StepLog, live_journals
from support.load import Load
from support.machine import machine_line
from support.serving import NAME, running_server
from support.switch import wait_known
from support.table import Results, command

from llmprobe.agent.client import LocalAgent
from llmprobe.collect.collector import Collector
from llmprobe.collect.views import RankView
from llmprobe.demo.server import VllmServer
from llmprobe.record.layout import Phase

_ENDED = 143  # as a shell says of a process that SIGTERM ended
_UNCOUNTED = "not counted"
_OUTPUT_TOKENS, _LONG_OUTPUT_TOKENS = 1600, 4000
_BETWEEN_SECONDS = 2.0
_VERDICT_SECONDS = 40.0  # for a window of 10 s of one load's decode, and what it takes to stand
_SHAPES = (Shape(1, 512), Shape(32, 512), Shape(32, 4000))
_COMMON = ("--load-format", "dummy", "--max-model-len", "8192", "--max-num-seqs", "32")
_GRAPHS = ("--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16,32]}')
_NGRAMS = '{"method":"ngram","num_speculative_tokens":4,"prompt_lookup_max":3,"prompt_lookup_min":1}'
_TWO = ("--tensor-parallel-size", "2")


@dataclass(frozen=True)
class Kind:
    """A configuration of `support.gpu_models`, what is changed in it, and how it is served.

    ``uneven``: its routers favour some experts.
    """

    model: str
    flags: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    gpus: int = 1
    uneven: bool = False


_LATENT = ("--attention-backend", "TRITON_MLA")
KINDS = {
    "plain": Kind("dense"),
    "fp8-weights": Kind("dense", ("--quantization", "fp8")),
    "8-bit-weights": Kind("dense", changes={"quantization_config": integers(8, True)}),
    "4-bit-weights": Kind("dense", changes={"quantization_config": integers(4, False, 128)}),
    "fp8-cache": Kind("dense", ("--kv-cache-dtype", "fp8", "--attention-backend", "TRITON_ATTN")),
    "latent": Kind("latent", _LATENT, {"first_k_dense_replace": 14}),  # no layer of it has experts
    # The scores of its experts are softmax values in bfloat16, which made-up weights leave equal: a tie at
    # each token, and the same ones win it.
    "latent-experts": Kind("latent", _LATENT, uneven=True),
    "drafts": Kind("dense", ("--speculative-config", _NGRAMS)),
    "two-gpus": Kind("dense", _TWO, gpus=2),
    "experts-on-two-gpus": Kind("moe", (*_TWO, "--enable-expert-parallel"), gpus=2),
}


@dataclass(frozen=True)
class Found:
    """One rank under one load; bytes and tokens are means of a step."""

    kind: str
    load: str
    rank: int
    steps: int
    tokens: float
    weights: float
    kv_read: float
    kv_write: float
    mbu: float | None
    counter: float | None
    verdict: str | None = None  # of an uneven kind, after a while


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))  # the server is stopped, the table shown
    found: list[Found] = []
    failed: list[str] = []
    machine = machine_line()
    try:
        with tempfile.TemporaryDirectory(prefix="llmprobe-traffic-") as folder:
            for name in options.only or list(KINDS):
                try:
                    for row in _measured(name, Path(folder)):
                        found.append(row)
                        _save(found, failed, machine, options.json)
                        print(row, file=sys.stderr, flush=True)
                except Exception as error:  # noqa: BLE001 - the others are worth measuring
                    failed.append(f"{name}: {type(error).__name__}: {error}"[:600])
                    print(failed[-1], file=sys.stderr, flush=True)
    finally:
        _save(found, failed, machine, options.json)
        table = _table(found, failed, machine)
        table.show(options.markdown)
    cells = [cell for row in table.rows for cell in row]
    return int(bool(failed) or any("MISSED" in cell or cell == _UNCOUNTED for cell in cells))


def _save(found: list[Found], failed: list[str], machine: str, path: Path | None) -> None:
    if path:
        saved = {"machine": machine, "found": [asdict(row) for row in found], "failed": failed}
        written = path.with_name(f".{path.name}")
        written.write_text(json.dumps(saved, indent=1) + "\n")
        written.replace(path)  # never half a file, whenever this is ended


def _measured(name: str, folder: Path) -> Iterator[Found]:
    kind = KINDS[name]
    model = make_configuration(kind.model, folder / name, **kind.changes)
    with running_server(model, [*_COMMON, *_GRAPHS, *kind.flags]) as server:
        wait_known(server.directory)
        log = StepLog(live_journals(server.directory, "worker")[0])
        collector = Collector(server.directory)
        for shape in _SHAPES:
            sizes = shape.context, _LONG_OUTPUT_TOKENS if kind.uneven else _OUTPUT_TOKENS
            with Load(server.port, NAME, shape.batch, *sizes) as load, Polling(log):
                wait_steady(load, log, shape.batch)
                before = [_totals(rank) for rank in ranks(collector)]
                begin = time.monotonic_ns()
                pairs = counted(collector, load)
                end = time.monotonic_ns()
                after = [_totals(rank) for rank in ranks(collector)]
                verdict = _verdict(server, load) if kind.uneven and shape.batch > 1 else None
            log.poll()
            rows = log.steps()
            rows = rows[(rows["time"] >= begin) & (rows["time"] < end) & (rows["phase"] == Phase.DECODE)]
            tokens = float(rows["decode_tokens"].mean()) if len(rows) else 0.0  # the same at every rank
            for number, (mbu, counter) in enumerate(pairs):
                steps = after[number][0] - before[number][0]
                if not steps:
                    raise RuntimeError(f"rank {number} decoded nothing in {shape.label}")
                means = [
                    (last - first) / steps
                    for first, last in zip(before[number][1], after[number][1], strict=True)
                ]
                yield Found(name, shape.label, number, steps, tokens, *means, mbu, counter, verdict)
            time.sleep(_BETWEEN_SECONDS)  # what is left of this load ends
        collector.close()


def _verdict(server: VllmServer, load: Load) -> str:
    """What the agent says of decode, once it knows and goes by the counter; or at last, and MISSED."""
    until = time.monotonic() + _VERDICT_SECONDS
    while True:
        load.wait(1.0)
        status = LocalAgent(server.directory).request("GET", "/api/status", timeout=30)[1]
        verdict = status["servers"][0]["verdicts"]["decode"]
        held = "experts_read_ratio" in {item["quantity"] for item in verdict["evidence"]}
        if (held and verdict["bottleneck"] != "unknown") or time.monotonic() > until:
            said = f"{verdict['bottleneck']} ({verdict['confidence']:.2f}): {verdict['reason']}"
            return said if held else f"MISSED, not by the counter: {said}"


def _totals(rank: RankView) -> tuple[int, list[float]]:
    """Decode steps so far, and their bytes: of weights, of the cache read and written."""
    kinds = rank.bytes.get("decode", {})
    return rank.steps.get("decode", 0), [kinds.get(kind, 0.0) for kind in ("weights", "kv_read", "kv_write")]


def _table(found: list[Found], failed: list[str], machine: str) -> Results:
    header = ("server", "load", "rank", "steps", "query tokens", "weights", "cache read", "cache written")
    header = (*header, "MBU", "DRAM counter", "DRAM counter − MBU", "bar")
    rows = []
    for row in found:
        sizes = [f"{size / 1e6:.1f} MB" for size in (row.weights, row.kv_read, row.kv_write)]
        cells = [row.kind, row.load, str(row.rank), str(row.steps), f"{row.tokens:.1f}", *sizes]
        if row.mbu is None or row.counter is None:
            cells += ["", "", "", _UNCOUNTED]
        else:
            over = row.counter - row.mbu
            bar = counter_bar(over)
            if row.verdict is not None:
                bar = "MISSED" if row.verdict.startswith("MISSED") else "verdict by the counter: held"
            cells += [f"{row.mbu:.3f}", f"{row.counter:.3f}", f"{over:+.3f}", bar]
        rows.append(cells)
    notes = [f"{problem}: not measured" for problem in failed]
    notes += [f"{row.kind}, {row.load}: {row.verdict}" for row in found if row.verdict is not None]
    title = "Bytes of decode steps, beside the DRAM counter"
    return Results(title, command("traffic_counter.py"), machine, header, rows, notes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python benchmarks/traffic_counter.py --only fp8-cache --only latent --markdown",
    )
    parser.add_argument("--only", action="append", choices=list(KINDS), help="this kind; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/accuracy.md")
    parser.add_argument("--list", action="store_true", help="name the kinds and end")
    options = parser.parse_args()
    if options.list:
        for name, kind in KINDS.items():
            print(f"{name} ({kind.gpus} GPU{'s' if kind.gpus > 1 else ''}):", kind.model, *kind.flags)
        raise SystemExit(0)
    return options


if __name__ == "__main__":
    sys.exit(main())
