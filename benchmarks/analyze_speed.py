"""How long `llmprobe analyze` takes, and how much memory, for recordings of many kernels.

    python benchmarks/analyze_speed.py
    python benchmarks/analyze_speed.py --kernels 4000000

The files have the form of real ones and made-up content: kernels of 300 names in steps of 32. Of nsys, an
export where each is launched by a call of its own (eager mode), one where several are by one (CUDA graphs
traced by node), and llmprobe's NVTX ranges around each step. Of torch's profiler, a trace of a fourth as many
kernels: each with its launch, the operator around that, the arrow from one to the other, and vLLM's range
around each step. They are written to a temporary folder, which takes about 300 MB for a million. The figures
are those of the run in the middle of three. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from support.machine import machine_line
from support.table import Results, bar, command

_PROCESS = (1 << 56) | (4321 << 24)
_THREAD = _PROCESS | 4330
_STEP_KERNELS = 32
_NAMES = 300
_KINDS = (
    "flash_fwd_splitkv_kernel",
    "nvjet_hsh",
    "triton_red_fused_add_rms_norm",
    "vllm::act_and_mul_kernel",
)
#: For a million kernels of an nsys export on two cores.
_MOST_SECONDS = 5.0
_MOST_BYTES = 1_000_000_000
_RUNS = 3
_TORCH = "torch, JSON"

_SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE TARGET_INFO_GPU (vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL,
  deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL,
  correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL,
  mangledName INTEGER, launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER NOT NULL,
  gridX INTEGER NOT NULL, gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL,
  blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL,
  dynamicSharedMemory INTEGER NOT NULL, localMemoryPerThread INTEGER NOT NULL,
  localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, sharedMemoryExecuted INTEGER,
  graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL,
  eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL,
  returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
  category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
  domainId INTEGER, uint64Value INTEGER, int64Value INTEGER);
"""


def build(path: Path, kernels: int, per_launch: int) -> None:
    """Write the file."""
    data = sqlite3.connect(path)
    data.execute("PRAGMA synchronous = OFF")
    data.executescript(_SCHEMA)
    strings = [(number, f"{_KINDS[number % len(_KINDS)]}<{number}>") for number in range(_NAMES)]
    strings += [(_NAMES, "cudaLaunchKernel_v7000"), (_NAMES + 1, "prefill"), (_NAMES + 2, "decode")]
    data.executemany("INSERT INTO StringIds VALUES (?, ?)", strings)
    data.execute("INSERT INTO TARGET_INFO_GPU VALUES (0, 0, 'NVIDIA H100 80GB HBM3')")
    marks = ",".join("?" * 28)
    data.executemany(
        f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({marks})", _kernels(kernels, per_launch)
    )
    calls = (
        (_begin(first) - 40_000, _begin(first) - 37_000, 0, _THREAD, first // per_launch, _NAMES, 0, None)
        for first in range(0, kernels, per_launch)
    )
    data.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?,?,?,?,?,?,?,?)", calls)
    data.execute(
        "INSERT INTO NVTX_EVENTS (start, eventType, text, globalTid, domainId) "
        "VALUES (1, 75, 'llmprobe', ?, 1)",
        (_THREAD,),
    )
    ranges = (
        (
            _begin(first) - 41_000,
            _begin(first + _STEP_KERNELS) - 41_500,
            59,
            _THREAD,
            _NAMES + 1 + (first % 640 > 0),
            1,
            8,
        )
        for first in range(0, kernels, _STEP_KERNELS)
    )
    data.executemany(
        "INSERT INTO NVTX_EVENTS (start, end, eventType, globalTid, textId, domainId, int64Value) "
        "VALUES (?,?,?,?,?,?,?)",
        ranges,
    )
    data.commit()
    data.close()


def build_trace(path: Path, kernels: int) -> None:
    """Write a trace of torch's profiler."""
    with path.open("w") as file:
        file.write('{"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3"}],\n')
        file.write('"traceEvents": [\n')
        for number in range(kernels):
            for event in _events(number):
                file.write(f"  {json.dumps(event, indent=2)},\n")
        file.write('  {"ph": "M", "name": "process_sort_index", "pid": 0, "tid": 0}\n]}\n')


def _events(number: int) -> Iterator[dict[str, object]]:
    """What belongs to one kernel, and the step's range before the first of a step."""
    begin = _begin(number) / 1000
    launched = begin - 40
    host = {"pid": 4321, "tid": 4330}
    if number % _STEP_KERNELS == 0:
        lasts = (_begin(number + _STEP_KERNELS) - _begin(number)) / 1000 - 1
        name = "execute_context_0(0)_generation_8(8)"
        mark = {"ph": "X", "cat": "user_annotation", "name": name, **host, "ts": launched - 1, "dur": lasts}
        yield {**mark, "args": {"External id": number}}
    operator = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", **host, "ts": launched - 0.5, "dur": 5.0}
    yield {**operator, "args": {"External id": number, "Sequence number": number, "Fwd thread id": 0}}
    tied = {"External id": number, "correlation": number + 1}
    launch = {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        **host,
        "ts": launched,
        "dur": 3.0,
    }
    yield {**launch, "args": {**tied, "cbid": 211}}
    arrow = {"cat": "ac2g", "name": "ac2g", "id": number + 1}
    yield {"ph": "s", **arrow, **host, "ts": launched}
    name = f"{_KINDS[number % len(_KINDS)]}<{number % _NAMES}>"
    kernel = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": begin, "dur": 8.0}
    shape = {"registers per thread": 32, "shared memory": 0, "grid": [128, 1, 1], "block": [128, 1, 1]}
    filled = {"blocks per SM": 0.97, "warps per SM": 3.88, "est. achieved occupancy %": 6}
    yield {**kernel, "args": {"device": 0, "context": 1, "stream": 7, **tied, **shape, **filled, "queued": 0}}
    yield {"ph": "f", **arrow, "pid": 0, "tid": 7, "ts": begin, "bp": "e"}


def _begin(kernel: int) -> int:
    return 1_000_000_000 + kernel * 10_000 + kernel // _STEP_KERNELS * 50_000


def _kernels(count: int, per_launch: int) -> Iterator[tuple[int | None, ...]]:
    rest: tuple[int | None, ...] = (32, 128, 1, 1, 128, 1, 1, 0, 0, 0, 0)
    for number in range(count):
        begin = _begin(number)
        name = number % _NAMES
        yield (
            begin, begin + 8_000, 0, 1, 0, 7, number // per_launch, _PROCESS, name, name, None, None, None,
            *rest, number, None, None, None,
        )  # fmt: skip


def measure(path: Path) -> tuple[float, float, int]:
    """Seconds, processor seconds and bytes at the most that the command takes, start of Python and all."""
    code = (
        "import resource, sys; from llmprobe.cli.app import app; app(standalone_mode=False); "
        "used = resource.getrusage(resource.RUSAGE_SELF); "
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "analyze", str(path), "--json"], capture_output=True, check=True
    )
    seconds = time.perf_counter() - began
    report = json.loads(done.stdout)
    if report["trust"]["verdict"] != "trusted" or not report["phases"]:
        raise SystemExit("the analysis did not see what the file holds")
    processor, peak_kib = done.stderr.split()[-2:]
    return seconds, float(processor), int(peak_kib) * 1024


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    results = Results(
        title="llmprobe analyze",
        command=command("analyze_speed.py"),
        machine=machine_line(),
        header=("", "file", "time", "bar", "processor time", "memory", "bar"),
    )
    saved: list[dict[str, float | str]] = []
    held = True
    with tempfile.TemporaryDirectory() as folder:
        for what, kernels, write in _files(options.kernels):
            path = Path(folder) / "capture"
            write(path)
            seconds, processor, peak = sorted(measure(path) for _ in range(_RUNS))[_RUNS // 2]
            size = path.stat().st_size
            path.unlink()
            # JSON has none: a trace of torch's profiler is as slow as Python decodes it.
            most = None if what == _TORCH else _MOST_SECONDS * max(1.0, options.kernels / 1e6)
            held &= (most is None or seconds <= most) and peak <= _MOST_BYTES
            saved.append(
                {
                    "file": what,
                    "kernels": kernels,
                    "file_bytes": size,
                    "seconds": seconds,
                    "processor_seconds": processor,
                    "peak_bytes": peak,
                }
            )
            results.rows.append(
                [
                    f"{what}, {kernels} kernels",
                    f"{size / 1e6:.0f} MB",
                    f"{seconds:.2f} s",
                    "none" if most is None else bar(seconds, most, "s"),
                    f"{processor:.2f} s",
                    f"{peak / 1e6:.0f} MB",
                    bar(peak / 1e6, _MOST_BYTES / 1e6, "MB"),
                ]
            )
    results.show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps(saved, indent=1))
    return 0 if held else 1


def _files(kernels: int) -> list[tuple[str, int, Callable[[Path], None]]]:
    """What the file is, how many kernels are in it, and what writes it."""
    return [
        ("nsys, each launched by itself", kernels, partial(build, kernels=kernels, per_launch=1)),
        (
            f"nsys, {_STEP_KERNELS} a CUDA graph",
            kernels,
            partial(build, kernels=kernels, per_launch=_STEP_KERNELS),
        ),
        (_TORCH, kernels // 4, partial(build_trace, kernels=kernels // 4)),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=int, default=1_000_000, help="of an nsys export (1000000)")
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in the docs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
