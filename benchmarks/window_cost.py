"""What a kernel window leaves behind: how long a CUDA graph takes, on the device and to launch.

    python benchmarks/window_cost.py

Replays a graph of about 470 kernels, the linear parts of an 8B decoder at batch 1, before CUPTI was ever used
in the process, while a window is open, and after. Needs an NVIDIA GPU with 20 GB and torch.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import numpy as np
import torch
from support.decode_graph import decode_graph
from support.machine import machine_line
from support.table import Results, command

from llmprobe.record.cupti import of_process

_REPLAYS, _SKIPPED = 60, 5


def main() -> int:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    options = parser.parse_args()
    machine = machine_line()
    graph = decode_graph()
    rows = [_row("before CUPTI was used", graph) for _ in range(3)]
    cupti = of_process()
    cupti.open()
    cupti.close()
    rows += [_row("after an empty window", graph) for _ in range(3)]
    kernels = 0
    for _ in range(3):
        cupti.open()
        rows.append(_row("in a window", graph, 20))
        kernels = len(cupti.close().activities) // 20
        rows.append(_row("after it", graph))
    Results(
        "A CUDA graph before, in and after kernel windows",
        command("window_cost.py"),
        machine,
        ("", "replay on the device, median", "launch on the host, median"),
        rows,
        [f"{kernels} kernels a graph, {_REPLAYS} replays a row."],
    ).show(options.markdown)
    return 0


def _row(name: str, graph: Any, replays: int = _REPLAYS) -> list[str]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    host = []
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        begin = time.perf_counter_ns()
        graph.replay()
        host.append((time.perf_counter_ns() - begin) / 1e3)
        event.record()
    torch.cuda.synchronize()
    device = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)][_SKIPPED:]
    return [name, f"{np.median(device):.0f} µs", f"{np.median(host):.0f} µs"]


if __name__ == "__main__":
    sys.exit(main())
