"""How true the figures of a GPU server are, beside what nsys recorded of the same steps.

    python benchmarks/accuracy.py                            every configuration, a short list of loads
    python benchmarks/accuracy.py --full --only dense-v2 --only moe
    python benchmarks/accuracy.py --together 3 --markdown    three servers start at once, where memory allows
    python benchmarks/accuracy.py --data DIR             keep the recordings
    python benchmarks/accuracy.py --recordings DIR       compare kept ones again, without a GPU
    python benchmarks/accuracy.py --list

Needs an NVIDIA GPU with 80 GB, vLLM, and nsys on PATH. Exit status 1 if a bar is missed. See README.md beside
this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.accuracy_table import ELAPSED_SECONDS, Measured, Shape, holds, table
from support.counted import counted, wait_steady
from support.gpu_models import make_configuration
from support.journals import Polling, StepLog, live_journals
from support.load import Load
from support.machine import machine_line
from support.nsys_server import GRAPHS, NsysFailed, NsysServer, nsys_version
from support.nsys_truth import read_truth
from support.serving import NAME
from support.step_agreement import Agreement, NoMatch, agreement

from llmprobe.collect.collector import Collector

_MACHINE = "machine.txt"
#: Once more, and longer, where nsys lost too much of the first: of thousands of launches a second it does.
_RECORD_SECONDS = (0.6, 1.2, 2.4)
_FRESH_SECONDS = 1.5
_COMMON = ("--max-model-len", "10240", "--max-num-seqs", "128", "--max-num-batched-tokens", "2048")
_GRAPHS = ("--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16,32,64,128]}')


@dataclass(frozen=True)
class Server:
    """A configuration of `support.gpu_models` and how it is served."""

    model: str
    eager: bool = False
    runner: str = ""  # "v1" or "v2"; empty: vLLM's choice
    flags: tuple[str, ...] = ()

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Of ``vllm serve``."""
        return (*_COMMON, *(("--enforce-eager",) if self.eager else _GRAPHS), *self.flags)

    @property
    def env(self) -> dict[str, str]:
        """Beside those of this process."""
        return {"VLLM_USE_V2_MODEL_RUNNER": "1" if self.runner == "v2" else "0"} if self.runner else {}


SERVERS = {
    "dense-v2": Server("dense", runner="v2"),
    "dense-v1": Server("dense", runner="v1"),
    "dense-v2-eager": Server("dense", eager=True, runner="v2"),
    "dense-v1-eager": Server("dense", eager=True, runner="v1"),
    "dense-v2-sync": Server("dense", runner="v2", flags=("--no-async-scheduling",)),
    "dense-v1-sync": Server("dense", runner="v1", flags=("--no-async-scheduling",)),
    "moe": Server("moe"),
    "moe-eager": Server("moe", eager=True),
    "sliding": Server("sliding"),
    "sliding-eager": Server("sliding", eager=True),
}


_PREFILL = Shape(4, 2000, prefill=True)
_SHORT = (Shape(1, 512), Shape(32, 512), Shape(128, 512), Shape(1, 8000), _PREFILL)
_FULL = (*_SHORT[:-1], Shape(32, 8000), Shape(128, 8000), _PREFILL)


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    names = options.only or list(SERVERS)
    runs: list[Measured] = []
    failed: list[str] = []
    if options.recordings:
        machine = (options.recordings / _MACHINE).read_text().strip()
        _again(names, options.recordings, runs, failed)
        return _finish(runs, failed, machine, options)
    try:
        machine = f"{machine_line()}; nsys {nsys_version()}"
    except NsysFailed as error:
        sys.exit(str(error))
    if options.data:
        (options.data / _MACHINE).write_text(machine + "\n")
    with tempfile.TemporaryDirectory(prefix="llmprobe-accuracy-models-") as folder:
        for start in range(0, len(names), options.together):
            group = names[start : start + options.together]
            with _running(group, Path(folder), options) as servers:
                for name, server in servers.items():
                    _measure(name, server, options, runs, failed)
    return _finish(runs, failed, machine, options)


def _finish(runs: list[Measured], failed: list[str], machine: str, options: argparse.Namespace) -> int:
    """Print and save; returns the exit status."""
    table(runs, machine, failed, options.cuda_graph_trace).show(options.markdown)
    if options.json:
        saved = {"machine": machine, "runs": [asdict(run) for run in runs], "failed": failed}
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    return int(bool(failed) or not all(holds(run) for run in runs))


def _again(names: Sequence[str], folder: Path, runs: list[Measured], failed: list[str]) -> None:
    """What ``--data`` kept."""
    for name in names:
        for shape in _FULL:
            recording = folder / f"{name}-{shape.file}.sqlite"
            if recording.exists():
                try:
                    found = agreement(np.load(folder / f"{name}.npy"), read_truth(recording))
                except (NoMatch, ValueError) as error:
                    failed.append(f"{name}, {shape.label}: {error}")
                    continue
                runs.append(Measured(name, shape, SERVERS[name].eager, found, None, None, None))


@contextlib.contextmanager
def _running(
    names: Sequence[str], folder: Path, options: argparse.Namespace
) -> Iterator[dict[str, NsysServer]]:
    """Servers that answer; those of a group start together, because a start keeps the GPU idle."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in names:
            spec = SERVERS[name]
            model = make_configuration(spec.model, folder / spec.model)
            flags = [*spec.all_flags]
            if options.kv_gib:
                # vLLM then takes what it needs besides, and the share is only compared with what is free.
                flags += ["--kv-cache-memory-bytes", str(int(options.kv_gib * 2**30))]
                flags += ["--gpu-memory-utilization", "0.1"]
            print(f"starting {name}", file=sys.stderr, flush=True)
            servers[name] = stack.enter_context(
                NsysServer(name, model, flags, spec.env, options.cuda_graph_trace)
            )
        ready = {}
        for name, server in servers.items():
            try:
                server.wait_ready()
                ready[name] = server
            except Exception as error:  # noqa: BLE001 - the others are worth measuring
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            if options.data:
                shutil.copy(server.server.log, options.data / f"{name}.log")
        if not ready:
            raise SystemExit("no server came up")
        yield ready


def _measure(
    name: str, server: NsysServer, options: argparse.Namespace, runs: list[Measured], failed: list[str]
) -> None:
    (journal,) = live_journals(server.server.directory, "worker")
    room = _cache_tokens(journal.facts())
    log = StepLog(journal)
    collector = Collector(server.server.directory)
    for shape in _FULL if options.full else _SHORT:
        if shape.batch * (shape.context + 200) > room and not shape.prefill:
            print(f"{name}, {shape.label}: the KV cache has room for {room} tokens", file=sys.stderr)
            continue
        try:
            with Polling(log):
                runs.append(_run(name, server, log, shape, collector, options))
            print(f"{name}, {shape.label}: {runs[-1]}", file=sys.stderr, flush=True)
        except Exception as error:  # noqa: BLE001 - a load that fails is named, the others go on
            failed.append(f"{name}, {shape.label}: {error!r}"[:300])
            print(failed[-1], file=sys.stderr, flush=True)
    collector.close()
    if options.data:
        np.save(options.data / f"{name}.npy", log.steps())
        (options.data / f"{name}.facts.json").write_text(json.dumps(journal.facts(), indent=1))
        shutil.copy(server.server.log, options.data / f"{name}.log")


def _run(
    name: str,
    server: NsysServer,
    log: StepLog,
    shape: Shape,
    collector: Collector,
    options: argparse.Namespace,
) -> Measured:
    """One load."""
    output = 4 if shape.prefill else 1600
    load = Load(server.server.port, NAME, shape.batch, shape.context, output)
    traffic = (None, None)
    with load:
        if shape.prefill:
            load.wait(3.0)
        else:
            wait_steady(load, log, shape.batch)
        if not shape.prefill:
            (traffic,) = counted(collector, load)
        found = _recorded(name, server, log, shape, load, options.data)
        # Last: it may have prompts in it, when the first requests are over.
        error = _elapsed_error(collector, load)
    return Measured(name, shape, SERVERS[name].eager, found, error, *traffic)


def _recorded(
    name: str, server: NsysServer, log: StepLog, shape: Shape, load: Load, kept: Path | None
) -> Agreement:
    """What nsys says of a moment of this load, of as many moments as it takes. Raises NoMatch."""
    for attempt, seconds in enumerate(_RECORD_SECONDS, 1):
        sqlite = server.record(shape.file, seconds)
        load.wait(0.5)
        log.poll()
        if kept:
            shutil.copy(sqlite, kept / f"{name}-{sqlite.name}")
        try:
            return agreement(log.steps(), read_truth(sqlite))
        except NoMatch as error:
            if attempt == len(_RECORD_SECONDS):
                raise
            print(f"{name}, {shape.label}: once more, {error}", file=sys.stderr, flush=True)
    raise AssertionError


def _elapsed_error(collector: Collector, load: Load) -> float:
    """How far the growth of all components together is from the wall clock's."""
    before = _ahead(collector, load)
    load.wait(ELAPSED_SECONDS)
    after = _ahead(collector, load)
    return (after[0] - before[0]) / (after[1] - before[1])


def _ahead(collector: Collector, load: Load) -> tuple[float, float]:
    """The sum of components less the wall clock when it was freshest, and that time.

    The engine writes its steps four times a second. Right after it did, the sum lags by one step.
    """
    looks = []
    until = time.monotonic() + _FRESH_SECONDS
    while (now := time.monotonic()) < until:
        collector.tick(final=True)
        (view,) = collector.views()
        components = [c for rank in view.ranks for phase in rank.device_time.values() for c in phase.values()]
        looks.append((sum(components) - now, now))
        load.wait(0.01)
    return max(looks)


def _cache_tokens(facts: dict[str, Any]) -> int:
    model = facts.get("model") or {}
    kv = model.get("kv") or {}
    per_token = sum(group["bytes_per_token"] for group in kv.get("groups", ()))
    return int(kv["capacity_bytes"] / per_token) if per_token else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python benchmarks/accuracy.py --only dense-v2 --only moe --together 2 --kv-gib 20",
    )
    parser.add_argument("--only", action="append", choices=list(SERVERS), help="this server; may be repeated")
    parser.add_argument(
        "--cuda-graph-trace",
        choices=GRAPHS,
        default=GRAPHS[0],
        help="as of nsys: CUDA graphs as one each, or by kernel, which can hang the server [graph]",
    )
    parser.add_argument("--full", action="store_true", help="every batch and context")
    parser.add_argument("--together", type=int, default=1, help="servers that start at once [1]")
    parser.add_argument("--kv-gib", type=float, help="KV cache of each server [what vLLM finds free]")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="keep recordings, step records and logs there"
    )
    parser.add_argument("--recordings", type=Path, metavar="DIR", help="compare what --data kept there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/accuracy.md")
    parser.add_argument("--list", action="store_true", help="name the servers and end")
    options = parser.parse_args()
    if options.list:
        for name, server in SERVERS.items():
            print(name, *server.all_flags)
        raise SystemExit(0)
    if options.together < 1:
        parser.error("--together must be 1 or more")
    if options.together > 1 and not options.kv_gib:
        parser.error("--together needs --kv-gib: servers that start at once cannot see what is free")
    if options.data:
        options.data.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
