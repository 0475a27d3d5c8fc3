"""Whether the hardware's counter of activity sees the gaps between small kernels.

    python benchmarks/counter_gaps.py
    python benchmarks/counter_gaps.py --kernel 5 --gap 5 --seconds 5

Launches kernels of a known length at a known pace and reads NVML's "graphics engine active" meanwhile. What
a kernel takes is timed in a graph of many, pauses between two of its nodes (about a microsecond) included.
Needs an NVIDIA GPU that has these counters, and torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from support.gpm import Counters
from support.machine import machine_line
from support.table import Results, command

_NODES = 200
#: Lengths of kernels and gaps between them, in microseconds: those of decoders that are launched one by one.
_KERNELS, _GAPS = (5.0, 20.0), (3.0, 5.0, 10.0, 30.0)


def main() -> int:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--kernel", type=float, action="append", metavar="US", help="length of a kernel; repeatable")
    add("--gap", type=float, action="append", metavar="US", help="between two kernels; repeatable")
    add("--seconds", type=float, default=2.0, help="of each pair [2]")
    add("--markdown", action="store_true", help="print the table as in docs/verdicts.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("counter_gaps.py needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 1
    cycles_per_us = 1e4 / _kernel_us(10_000)
    rows = []
    for wanted in options.kernel or _KERNELS:
        cycles = round(wanted * cycles_per_us)
        kernel = _kernel_us(cycles)
        for gap in options.gap or _GAPS:
            pace, counters = _paced(cycles, kernel + gap, options.seconds)
            idle, counted = max(1 - kernel / pace, 0.0), 1 - counters.ratios.get("graphics", float("nan"))
            row = [f"{kernel:.1f} us", f"{pace - kernel:.1f} us", f"{idle:.2f}", f"{counted:.2f}"]
            rows.append([*row, f"{counted - idle:+.2f}"])
    Results(
        "Gaps between kernels, and what the counter of activity leaves over",
        command("counter_gaps.py"),
        machine_line(),
        ("kernel", "gap", "idle by the clock", "not active by the counter", "difference"),
        rows,
    ).show(options.markdown)
    return 0


def _kernel_us(cycles: int) -> float:
    """Microseconds from one such kernel's begin to the next one's, in a graph."""
    graph: Any = torch.cuda.CUDAGraph()
    torch.cuda._sleep(cycles)
    with torch.cuda.graph(graph):
        for _ in range(_NODES):
            torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):  # clocks go up
        graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / _NODES


def _paced(cycles: int, pace_us: float, seconds: float) -> tuple[float, Counters]:
    """Launch one kernel every ``pace_us``; the pace that was kept, and the counters over the same time."""
    clock, step = time.perf_counter_ns, round(pace_us * 1e3)
    launched = 0
    torch.cuda.synchronize()
    with Counters() as counters:
        begin = due = clock()
        until = begin + round(seconds * 1e9)
        while due < until:
            while clock() < due:
                pass
            torch.cuda._sleep(cycles)
            launched += 1
            due = max(due + step, clock())  # one that comes late is not made up for
        torch.cuda.synchronize()
        took = clock() - begin
    return took / launched / 1e3, counters


if __name__ == "__main__":
    sys.exit(main())
