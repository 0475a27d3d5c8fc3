"""Whether torch's profiler sees kernels in a process in which CUPTI has recorded for llmprobe before.

    python benchmarks/torch_after_windows.py
    python benchmarks/torch_after_windows.py --windows 40 --idle 20

Each row is a process of its own, in which one thread launches kernels one by one, or as a CUDA graph: some
windows are opened and closed as kernel windows are, or torch's profiler runs once before them; then torch's
profiler records twice. Kernels in its traces beside calls that launch some. Needs an NVIDIA GPU and torch.
"""

from __future__ import annotations

import argparse
import gzip
import json
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

from llmprobe.record.cupti import Cupti
from llmprobe.record.torch_trace import TorchTrace

_WINDOW_SECONDS = 0.1
_TRACE_SECONDS = 1.0
_MOST_SECONDS = 180.0
_HEADER = ("launched", "before torch's profiler", "kernels of launches, first trace", "second trace")
_CASES = (
    ("one by one", "nothing"),
    ("one by one", "windows"),
    ("one by one", "windows, idle"),
    ("one by one", "torch, windows"),
    ("as a graph", "windows"),
    ("as a graph", "windows, idle"),
)


def main() -> int:
    """Print the table; returns 1 if a trace lost kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
    rows, lost = [], False
    for launched, before in _CASES:
        found = _apart(launched, before, options)
        if isinstance(found, str):
            rows.append([launched, before, found, ""])
            lost = True
            continue
        rows.append([launched, before, *(f"{kernels} of {launches}" for kernels, launches in found)])
        lost |= any(kernels < 0.95 * launches for kernels, launches in found)
    notes = [f"{options.windows} windows of {_WINDOW_SECONDS:g} s; traces of {_TRACE_SECONDS:g} s."]
    title, machine = "torch's profiler after kernel windows", machine_line()
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    Results(title, command("torch_after_windows.py"), machine, _HEADER, rows, notes).show(options.markdown)
    return int(lost)


def _apart(launched: str, before: str, options: argparse.Namespace) -> list[list[int]] | str:
    """In a process of its own; a text says how that ended badly."""
    line = [sys.executable, __file__, "--windows", str(options.windows), "--idle", str(options.idle)]
    line += ["--one", launched, before]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not over after {_MOST_SECONDS:g} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"exit status {done.returncode}: {last}"
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


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
            cupti = Cupti()
            for _ in range(options.windows):
                cupti.open()
                time.sleep(_WINDOW_SECONDS)
                cupti.close()
                if "idle" in before:
                    work.resting.set()
                    time.sleep(options.idle / options.windows)
                    work.resting.clear()
                time.sleep(_WINDOW_SECONDS)
        return [_traced(), _traced()]
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
