"""Whether torch's profiler sees kernels in a process in which CUPTI has recorded for llmprobe before.

    python benchmarks/torch_after_windows.py
    python benchmarks/torch_after_windows.py --times 20 --windows 40 --idle 20

Each row is so many processes, in each of which one thread launches kernels one by one, or as a CUDA graph:
some windows are opened and closed as kernel windows are, or torch's profiler runs once before them; then it
records twice. How many of these traces hold the kernels of the calls in them that launch some, and
what its log says of records that it left out because of their times. Needs an NVIDIA GPU and torch.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from support.machine import machine_line
from support.table import Results, command

from llmprobe.record.cupti import of_process
from llmprobe.record.torch_trace import TorchTrace

_WINDOW_SECONDS = 0.1
_TRACE_SECONDS = 1.0
_MOST_SECONDS = 180.0
_HEADER = (
    "launched",
    "before torch's profiler",
    "traces with all kernels",
    "with some",
    "with none",
    "records left out of these for their times",
    "processes that ended badly",
)
_CASES = (
    ("one by one", "nothing"),
    ("one by one", "windows"),
    ("one by one", "windows, idle"),
    ("one by one", "torch, windows"),
    ("as a graph", "windows"),
)
_STAGE = re.compile(r"^stage: (.*)$", re.MULTILINE)
_LEFT_OUT = re.compile(r"Out-of-range\s*=\s*(\d+)")


def main() -> int:
    """Print the table; returns 1 if a trace lost kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="processes in each row [3]")
    parser.add_argument("--windows", type=int, default=12, help="windows before torch's profiler [12]")
    parser.add_argument(
        "--idle", type=float, default=10.0, help="seconds without work, where there are some [10]"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(options.one[0], options.one[1], options)))
        return 0
    if not torch.cuda.is_available():
        print("torch_after_windows.py needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 1
    rows, saved, bad = [], [], False
    for launched, before in _CASES:
        found = [_apart(launched, before, options) for _ in range(options.times)]
        traces = [trace for one in found if not isinstance(one, str) for trace in one]
        wrong = [one for one in found if isinstance(one, str)]
        none = [trace for trace in traces if not trace[0]]  # without a launch it was no trace
        some = [trace for trace in traces if 0 < trace[0] < 0.95 * trace[1]]
        bad |= bool(none or some or wrong)
        left_out = ", ".join(f"{trace[2]} of {trace[1]}" for trace in none + some)
        rows.append(
            [
                launched,
                before,
                f"{len(traces) - len(none) - len(some)} of {len(traces)}",
                str(len(some)),
                str(len(none)),
                left_out,
                "; ".join(wrong) or "0",
            ]
        )
        saved.append({"launched": launched, "before": before, "found": found})
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)  # whenever this is ended
    notes = [
        f"{options.windows} windows of {_WINDOW_SECONDS:g} s; two traces of {_TRACE_SECONDS:g} s a process."
    ]
    title, machine = "torch's profiler after kernel windows", machine_line()
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": saved}, indent=1))
    Results(title, command("torch_after_windows.py"), machine, _HEADER, rows, notes).show(options.markdown)
    return int(bad)


def _apart(launched: str, before: str, options: argparse.Namespace) -> list[list[int]] | str:
    """In a process of its own: kernels, launches, records left out of each trace, or how badly it ended."""
    line = [sys.executable, "-X", "faulthandler", __file__]
    line += ["--windows", str(options.windows), "--idle", str(options.idle), "--one", launched, before]
    environment = {**os.environ, "KINETO_LOG_LEVEL": "1"}  # where what it leaves out is said
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"not over after {_MOST_SECONDS:g} s"
    said = done.stdout + done.stderr
    if done.returncode:
        print(said, file=sys.stderr)
        where = _STAGE.findall(done.stderr)
        return f"exit status {done.returncode} {where[-1] if where else 'before the windows'}"
    traces = [list(map(int, trace)) for trace in json.loads(done.stdout.strip().splitlines()[-1])]
    left_out = [int(count) for count in _LEFT_OUT.findall(said)][-len(traces) :]
    left_out = [0] * (len(traces) - len(left_out)) + left_out
    return [[*trace, count] for trace, count in zip(traces, left_out, strict=True)]


class _Work(threading.Thread):
    """An engine's thread: forty small products, then a moment for the host."""

    def __init__(self, as_graph: bool) -> None:
        super().__init__(daemon=True)
        self._x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
        self._graph = self._captured() if as_graph else None
        self.over, self.resting = threading.Event(), threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            if self.resting.is_set():
                time.sleep(0.01)
                continue
            if self._graph is None:
                self._products()
            else:
                self._graph.replay()
            torch.cuda.synchronize()
            time.sleep(0.0005)

    def _products(self) -> None:
        for _ in range(40):
            torch.clamp(self._x @ self._x, -1, 1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        self._products()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._products()
        return graph


def _one(launched: str, before: str, options: argparse.Namespace) -> list[tuple[int, int]]:
    work = _Work(launched == "as a graph")
    work.start()
    try:
        if before.startswith("torch"):
            _traced()
        if "windows" in before:
            print("stage: in the windows", file=sys.stderr, flush=True)
            cupti = of_process()
            for _ in range(options.windows):
                cupti.open()
                time.sleep(_WINDOW_SECONDS)
                cupti.close()
                if "idle" in before:
                    work.resting.set()
                    time.sleep(options.idle / options.windows)
                    work.resting.clear()
                time.sleep(_WINDOW_SECONDS)
        found = []
        for stage in ("in the first trace", "in the second trace"):
            print(f"stage: {stage}", file=sys.stderr, flush=True)
            found.append(_traced())
        return found
    finally:
        work.over.set()
        work.join()


def _traced() -> tuple[int, int]:
    """Kernels that a launch in the trace belongs to, and launches; of graphs, any kernel and any launch."""
    trace = TorchTrace(cuda=True, cpu=False, stacks=False)
    trace.start()
    time.sleep(_TRACE_SECONDS)
    trace.stop()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "trace.json.gz"
        trace.save(target)
        events: list[dict[str, Any]] = json.loads(gzip.decompress(target.read_bytes()))["traceEvents"]
    ids = {"kernel": set[int](), "launch": set[int]()}
    for event in events:
        name, correlation = str(event.get("name")), (event.get("args") or {}).get("correlation")
        if event.get("cat") == "kernel":
            ids["kernel"].add(correlation)
        elif "LaunchKernel" in name or "GraphLaunch" in name:
            ids["launch"].add(correlation)
    return len(ids["launch"] & ids["kernel"]), len(ids["launch"])


if __name__ == "__main__":
    sys.exit(main())
