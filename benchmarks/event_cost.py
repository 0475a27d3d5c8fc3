"""What it takes the host to record a CUDA event, in emptied caches and again at once.

    python benchmarks/event_cost.py
    python benchmarks/event_cost.py --steps 400

A step clock records two events a step: this is the part of its cost that is the driver's. A graph like an 8B
decoder's step is launched; before each event the processor's caches are emptied, as an engine's own code does
between two steps. In turns: torch's method, torch's function below it, which the step clock calls, and the
driver's (`cuEventRecord`) giving the interpreter lock away meanwhile and keeping it.
Needs an NVIDIA GPU with 20 GB and torch.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support.decode_graph import decode_graph
from support.machine import machine_line
from support.table import Results, command

from llmprobe.record.cuda_clock import CudaClock

_now = time.perf_counter_ns
#: More than a core's own caches and its share of the last one.
_BALLAST_BYTES = 64 << 20
_HEADER = ("event recorded", "in emptied caches", "again at once", "a third time")


def main() -> int:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="launches of the graph [300]")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("event_cost.py needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 1
    machine, graph = machine_line(), decode_graph()
    ballast = np.ones(_BALLAST_BYTES // 8)
    event = torch.cuda.Event(enable_timing=True)
    event.record()  # torch makes it at its first use
    calls = {
        "by torch's method": event.record,
        "by torch's function below it": _below(event),
        "by the driver's function, without the lock": _driver(event, ctypes.CDLL),
        "by the driver's function, with it": _driver(event, ctypes.PyDLL),
    }
    times: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for step in range(options.steps):
        name = list(calls)[step % len(calls)]
        for place in ("before a graph", "after a graph"):
            if place == "after a graph":
                graph.replay()
            ballast += 1.0
            times.setdefault((place, name), []).append(_three(calls[name]))
        if step % 6 == 5:  # as an engine that runs a few steps ahead of its device
            torch.cuda.synchronize()
    rows = []
    for (place, name), found in times.items():
        medians = np.median(np.array(found[len(found) // 10 :]), axis=0) / 1e3
        rows.append([f"{place}, {name}", *(f"{value:.1f} µs" for value in medians)])
    empty = np.median([_three(lambda: None)[0] for _ in range(1000)]) / 1e3
    notes = [f"Reading the clock twice takes {empty:.1f} µs of each.", f"{options.steps} steps; medians."]
    title = "What recording a CUDA event takes the host"
    Results(title, command("event_cost.py"), machine, _HEADER, rows, notes).show(options.markdown)
    return 0


def _three(call: Callable[[], None]) -> tuple[int, int, int]:
    """Nanoseconds of three calls in a row."""
    begin = _now()
    call()
    first = _now()
    call()
    second = _now()
    call()
    return first - begin, second - first, _now() - second


def _below(event: torch.cuda.Event) -> Callable[[], None]:
    record, stream = CudaClock()._record, torch.cuda.current_stream()
    return lambda: record(event, stream)


def _driver(event: torch.cuda.Event, library: Callable[[str], Any]) -> Callable[[], None]:
    record = library("libcuda.so.1").cuEventRecord
    record.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    handle, stream = event.cuda_event, torch.cuda.current_stream().cuda_stream

    def call() -> None:
        record(handle, stream)

    return call


if __name__ == "__main__":
    sys.exit(main())
