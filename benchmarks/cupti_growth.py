"""What makes launches dearer, and memory grow, as CUPTI records more and more in one process.

    python benchmarks/cupti_growth.py
    python benchmarks/cupti_growth.py --kernels 1000000

Each row is a process of its own that launches small kernels one by one: in many short recordings, in few
long ones, in one that never ends, and beside as many that see no kernel. Before and after: what a launch
takes the host while nothing records (but for the one that goes on), and the memory of the process.
Needs an NVIDIA GPU and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import torch
from support.gpm import device_memory
from support.machine import machine_line
from support.table import Results, command

from llmprobe.record.cupti import of_process

_MOST_SECONDS = 240.0
_TIMED, _AT_ONCE = 40, 200  # launches: so many times so many
_IN_FLIGHT = "many short ones that end with kernels in flight"
_CASES = {  # recordings, and whether kernels are launched while one is open
    "many short recordings": (10_000, True),
    _IN_FLIGHT: (10_000, True),
    "few long ones": (100, True),
    "as many that see no kernel": (10_000, False),
    "one that goes on": (1, True),
    "none": (0, True),
}
_SMALL, _LARGE = 256, 8 << 20  # numbers that a kernel changes; a large one runs longer than its launch takes
_HEADER = (
    "recorded",
    "kernels",
    "a launch before",
    "after a tenth",
    "after half",
    "at the end",
    "a recording closes in, first",
    "last",
    "device memory, gained",
    "host memory, gained",
)


def main() -> int:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", type=int, default=3_000_000, help="launched in each row [3000000]")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(options.one, options.kernels)))
        return 0
    if not torch.cuda.is_available():
        print("cupti_growth.py needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 1
    rows = []
    for name in _CASES:
        rows.append(_apart(name, options.kernels))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)  # whenever this is ended
    Results(
        "What CUPTI's recordings leave in a process",
        command("cupti_growth.py"),
        machine_line(),
        _HEADER,
        rows,
        [f"A launch: median of {_TIMED} times {_AT_ONCE}, nothing recorded meanwhile."],
    ).show(options.markdown)
    return 0


def _apart(name: str, kernels: int) -> list[str]:
    """In a process of its own."""
    line = [sys.executable, __file__, "--one", name, "--kernels", str(kernels)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [name, f"not over after {_MOST_SECONDS:g} s", *[""] * (len(_HEADER) - 2)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return [name, f"exit status {done.returncode}: {last}", *[""] * (len(_HEADER) - 2)]
    return [name, *json.loads(done.stdout.strip().splitlines()[-1])]


def _one(name: str, kernels: int) -> list[str]:
    recordings, seen_by_one = _CASES[name]
    in_flight = name == _IN_FLIGHT
    x = torch.zeros(_LARGE if in_flight else _SMALL, device="cuda")
    cupti = of_process()
    if recordings:  # what CUPTI takes once is not what grows
        cupti.open()
        _launch(x, 1000)
        cupti.close()
    seen, process = [_timed(x)], psutil.Process()
    device, host = device_memory(os.getpid()), process.memory_info().rss
    if name == "one that goes on":
        cupti.open()
    turns = max(recordings, 100)
    closing, recorded = [], 0
    for turn in range(1, turns + 1):
        if recordings > 1:
            cupti.open()
        if seen_by_one:
            _launch(x, kernels // turns, wait=not in_flight)
        if recordings > 1:
            begin = time.perf_counter()
            recorded += len(cupti.close().activities)
            closing.append(time.perf_counter() - begin)
        elif recordings:
            recorded = cupti.drain()
        if not seen_by_one:
            _launch(x, kernels // turns)
        if turn in (turns // 10, turns // 2, turns):
            seen.append(_timed(x))
    gained = device_memory(os.getpid()) - device, process.memory_info().rss - host
    tenth = max(len(closing) // 10, 1)
    parts = [part for part in (closing[:tenth], closing[-tenth:]) if part]
    return [
        f"{recorded}",
        *(f"{value:.2f} µs" for value in seen),
        *([f"{np.median(part) * 1e3:.2f} ms" for part in parts] or ["", ""]),
        *(f"{value / 2**20:+.0f} MiB" for value in gained),
    ]


def _launch(x: torch.Tensor, count: int, wait: bool = True) -> None:
    for index in range(count):
        x.add_(1.0)
        if index % 500 == 499:
            torch.cuda.synchronize()
    if wait:
        torch.cuda.synchronize()


def _timed(x: torch.Tensor) -> float:
    """Microseconds of one launch on the host."""
    found, x = [], x[:_SMALL]
    for _ in range(_TIMED):
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(_AT_ONCE):
            x.add_(1.0)
        found.append((time.perf_counter_ns() - begin) / _AT_ONCE / 1e3)
    torch.cuda.synchronize()
    return float(np.median(found))


if __name__ == "__main__":
    sys.exit(main())
