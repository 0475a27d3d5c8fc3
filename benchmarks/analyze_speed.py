"""How long `llmprobe analyze` takes, and how much memory, for an nsys export of many kernels.

    python benchmarks/analyze_speed.py
    python benchmarks/analyze_speed.py --kernels 4000000

The file has the tables and columns of a real export and made-up content: kernels of 300 names in steps of 32,
each launched by a call of its own (eager mode) or several by one (CUDA graphs traced by node), and llmprobe's
NVTX ranges around each step. It is written to a temporary folder, which takes about 200 MB for a million. The
figures are those of the run in the middle of three. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support.machine import machine_line
from support.table import Results, bar, command

_PROCESS = (1 << 56) | (4321 << 24)
_THREAD = _PROCESS | 4330
_STEP_KERNELS = 32
_NAMES = 300
#: For a million kernels on two cores.
_MOST_SECONDS = 5.0
_MOST_BYTES = 1_000_000_000
_RUNS = 3

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
    kinds = (
        "flash_fwd_splitkv_kernel",
        "nvjet_hsh",
        "triton_red_fused_add_rms_norm",
        "vllm::act_and_mul_kernel",
    )
    strings = [(number, f"{kinds[number % 4]}<{number}>") for number in range(_NAMES)]
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
        title="llmprobe analyze on an nsys export",
        command=command("analyze_speed.py"),
        machine=machine_line(),
        header=("", "file", "time", "bar", "processor time", "memory", "bar"),
    )
    saved: list[dict[str, float]] = []
    held = True
    with tempfile.TemporaryDirectory() as folder:
        for per_launch in (1, _STEP_KERNELS):
            path = Path(folder) / "capture.sqlite"
            build(path, options.kernels, per_launch)
            seconds, processor, peak = sorted(measure(path) for _ in range(_RUNS))[_RUNS // 2]
            size = path.stat().st_size
            path.unlink()
            most = _MOST_SECONDS * max(1.0, options.kernels / 1e6)
            held &= seconds <= most and peak <= _MOST_BYTES
            saved.append(
                {
                    "kernels": options.kernels,
                    "kernels_a_launch": per_launch,
                    "seconds": seconds,
                    "processor_seconds": processor,
                    "peak_bytes": peak,
                }
            )
            how = "each launched by itself" if per_launch == 1 else f"{per_launch} a CUDA graph"
            results.rows.append(
                [
                    f"{options.kernels} kernels, {how}",
                    f"{size / 1e6:.0f} MB",
                    f"{seconds:.2f} s",
                    bar(seconds, most, "s"),
                    f"{processor:.2f} s",
                    f"{peak / 1e6:.0f} MB",
                    bar(peak / 1e6, _MOST_BYTES / 1e6, "MB"),
                ]
            )
    results.show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps(saved, indent=1))
    return 0 if held else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=int, default=1_000_000, help="in the file (1000000)")
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in the docs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
