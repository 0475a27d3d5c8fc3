"""How much memory nsys itself leaves in a server that it records many times, with llmprobe and without.

    python benchmarks/nsys_memory.py --model dense -- --max-model-len 4096
    python benchmarks/nsys_memory.py --times 30 --seconds 0.5

A ``vllm serve`` under ``nsys launch``, under load; nsys is started and stopped around it by hand, so no
capture of llmprobe's takes part. Once with LLMPROBE=0 and once measured. Needs nsys on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from support.gpu_models import CONFIGURATIONS, served
from support.load import Load
from support.machine import has_gpu, machine_line
from support.nsys_server import NsysFailed, NsysServer
from support.serving import NAME, tiny_model
from support.table import Results, command

from llmprobe.demo.server import ServerFailed

_HEADER = (
    "llmprobe",
    "recordings",
    "each",
    "engine before",
    "after the first",
    "after the last",
    "each further one",
)
_SETTLED_SECONDS = 3.0


@dataclass(frozen=True)
class Growth:
    """Resident bytes of the server's engine processes."""

    measured: bool
    recordings: int
    seconds: float
    before: int
    first: int
    last: int


def main() -> int:
    """Measure, and print one table."""
    options = _options()
    machine, found = machine_line(), []
    with tempfile.TemporaryDirectory(prefix="llmprobe-nsys-memory-") as name:
        for measured in (False, True):
            try:
                found.append(_measure(options, Path(name), measured))
            except (NsysFailed, ServerFailed) as error:
                print(f"with{'' if measured else 'out'} llmprobe: {error}", file=sys.stderr)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "growth": [asdict(one) for one in found]}) + "\n"
        )
    rows = [_row(one) for one in found]
    notes = ["Resident memory of the engine's processes, some seconds after nsys is done."]
    title = "What recordings by nsys leave in an engine's memory"
    Results(title, command("nsys_memory.py"), machine, _HEADER, rows, notes).show(options.markdown)
    return 0 if len(found) == 2 else 1


def _measure(options: argparse.Namespace, folder: Path, measured: bool) -> Growth:
    model, flags = (tiny_model(), []) if options.model is None else served(options.model, folder)
    flags = [*flags, *([] if has_gpu() else ["--dtype", "float32", "--enforce-eager"])]
    env = {"LLMPROBE": "1" if measured else "0"}
    with NsysServer("nsys-memory", model, [*flags, *options.flags], env) as traced:
        traced.server.wait_ready(600)
        if measured:
            traced.server.wait_agent()
        with Load(traced.server.port, NAME, options.concurrency, 128, 128) as load:
            load.wait(_SETTLED_SECONDS)
            sizes = [_resident(traced.server.process.pid)]
            for number in range(options.times):
                print(f"\rrecording {number + 1} of {options.times}", end="", file=sys.stderr, flush=True)
                export = traced.record(f"memory-{number}", options.seconds)
                export.unlink()
                export.with_suffix(".nsys-rep").unlink()
                load.wait(0)
                if number == 0:
                    time.sleep(_SETTLED_SECONDS)
                    sizes.append(_resident(traced.server.process.pid))
            time.sleep(_SETTLED_SECONDS)
            sizes.append(_resident(traced.server.process.pid))
    print(file=sys.stderr)
    return Growth(measured, options.times, options.seconds, *sizes)


def _resident(launcher: int) -> int:
    """Of the engine's processes: all below ``nsys launch`` that vLLM named so."""
    total = 0
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("VLLM::"):
                total += process.memory_info().rss
    return total


def _row(one: Growth) -> list[str]:
    each = (one.last - one.first) / max(one.recordings - 1, 1)
    sizes = [f"{size >> 20} MiB" for size in (one.before, one.first, one.last)]
    on = "on" if one.measured else "off"
    return [on, str(one.recordings), f"{one.seconds:g} s", *sizes, f"{each / 2**20:+.2f} MiB"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help=f"{', '.join(CONFIGURATIONS)} or a directory [the demo's tiny model]")
    add("--times", type=int, default=50, help="recordings in a row [50]")
    add("--seconds", type=float, default=0.5, help="of each [0.5]")
    add("--concurrency", type=int, default=16, help="requests at a time [16]")
    add("--json", type=Path, metavar="FILE", help="save every figure")
    add("--markdown", action="store_true", help="print the table as in docs/captures.md")
    add("flags", nargs="*", help="of vllm serve, after --")
    options = parser.parse_args()
    if options.times < 2:
        parser.error("--times: at least 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
