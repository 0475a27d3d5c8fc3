"""Whether kernel windows can stay on: thousands of them in one live vLLM server on a GPU.

    python benchmarks/windows_endurance.py --windows 10000
    python benchmarks/windows_endurance.py --eager --layers 4 --plan 0.001/0.002

Windows follow each other as fast as they can while requests stream. Watched: that the server answers every
request in full, time per token in the first and the last tenth (and, for comparison, with llmprobe off before
and after), the engine's memory on host and device, and that no window was lost. Exit status 1 if one of that
fails. Needs an NVIDIA GPU and vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
from support.gpm import device_memory
from support.gpu_models import CONFIGURATIONS, make_configuration
from support.journals import live_journals
from support.load import Load, Seen
from support.machine import machine_line
from support.serving import NAME, running_server
from support.switch import switch, wait_known
from support.table import Results, bar, command

from llmprobe.agent.client import request
from llmprobe.record.window_file import WindowFileError, read_window, window_path

_WARM_UP_SECONDS, _OFF_SECONDS = 10.0, 10.0
_FLAGS = ("--load-format", "dummy", "--max-model-len", "2048", "--max-num-seqs", "16")
_GRAPHS = ("--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16]}')
_DRIFT, _HOST_MIB, _DEVICE_MIB = 3.0, 64.0, 64.0


def main() -> int:
    """Measure; returns the exit status."""
    options = _options()
    machine = machine_line()
    with tempfile.TemporaryDirectory(prefix="llmprobe-endurance-") as folder:
        changes = {"num_hidden_layers": options.layers} if options.layers else {}
        model = make_configuration(options.model, Path(folder) / "model", **changes)
        flags = [
            *_FLAGS,
            *(["--enforce-eager"] if options.eager else _GRAPHS),
            "--gpu-memory-utilization",
            str(options.gpu_memory_utilization),
        ]
        env = {"LLMPROBE_KERNEL_WINDOWS": options.plan}
        with running_server(model, flags, env) as server:
            wait_known(server.directory)
            (worker,) = live_journals(server.directory, "worker")
            path, engine = window_path(worker.path), psutil.Process(int(worker.facts()["pid"]))
            load = Load(server.port, NAME, options.concurrency, 64, 128)
            with load:
                load.wait(_WARM_UP_SECONDS)
                before = _switched_off(server.directory, load)
                host, device, first = engine.memory_info().rss, device_memory(engine.pid), _number(path)
                begin, until = time.monotonic(), time.monotonic() + options.seconds
                marks = [time.monotonic_ns()]
                while _number(path) - first < options.windows and time.monotonic() < until:
                    load.wait(1.0)
                    marks.append(time.monotonic_ns())
                took, windows = time.monotonic() - begin, _number(path) - first
                host_after, device_after = engine.memory_info().rss, device_memory(engine.pid)
                status = request(server.directory, "GET", "/api/status")[1]["servers"][0]["ranks"][0]
                afterwards = _switched_off(server.directory, load)
            tenth = max(len(marks) // 10, 1)
            early, late = load.seen(marks[0], marks[tenth]), load.seen(marks[-1 - tenth], marks[-1])
            errors = worker.counters()["errors"]
            said = worker.facts().get("kernel_windows")
    drift = (late.tpot_seconds / early.tpot_seconds - 1) * 100
    rows = [
        ["windows", str(windows), bar(options.windows - windows, 0, "missing", 0)],
        ["a second", f"{windows / took:.1f}", ""],
        ["requests answered in full", str(len(load.requests())), ""],
        ["TPOT, first tenth", f"{early.tpot_seconds * 1e3:.3f} ms", ""],
        ["TPOT, last tenth", f"{late.tpot_seconds * 1e3:.3f} ms", bar(drift, _DRIFT, "%", 1)],
        ["TPOT with llmprobe off, before", f"{before.tpot_seconds * 1e3:.3f} ms", ""],
        ["TPOT with llmprobe off, after all windows", f"{afterwards.tpot_seconds * 1e3:.3f} ms", ""],
        [
            "engine's host memory, gained",
            _mib(host_after - host),
            bar((host_after - host) / 2**20, _HOST_MIB, "MiB"),
        ],
        [
            "engine's device memory, gained",
            _mib(device_after - device),
            bar((device_after - device) / 2**20, _DEVICE_MIB, "MiB"),
        ],
        ["errors of llmprobe", str(errors), bar(errors, 0, "errors", 0)],
        ["windows still on", str((said or {}).get("on")), "" if (said or {}).get("on") else "MISSED"],
        ["launch gap in decode, as seen last", str(_launch_gap(status)), ""],
    ]
    table = Results(
        f"{options.windows} kernel windows in one server",
        command("windows_endurance.py"),
        machine,
        ("", "", "bar"),
        rows,
        [
            f"`{options.model}`{_shape(options)}, {options.concurrency} requests at a time, "
            f"{options.plan} s, for {took:.0f} s"
        ],
    )
    table.show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return int(any("MISSED" in cell for row in rows for cell in row))


def _switched_off(directory: Path, load: Load) -> Seen:
    """Some seconds without llmprobe; it is on again after them."""
    switch(directory, False)
    load.wait(_OFF_SECONDS / 5)
    begin = time.monotonic_ns()
    load.wait(_OFF_SECONDS)
    end = time.monotonic_ns()
    switch(directory, True)
    return load.seen(begin, end)


def _shape(options: argparse.Namespace) -> str:
    layers = f", {options.layers} layers" if options.layers else ""
    return layers + (", no CUDA graphs" if options.eager else "")


def _number(path: Path) -> int:
    try:
        return read_window(path).number
    except (OSError, WindowFileError):
        return 0


def _launch_gap(rank: dict[str, object]) -> object:
    kernels = rank.get("kernels") or {}
    assert isinstance(kernels, dict)
    return (kernels.get("decode") or {}).get("launch_gap_ratio")


def _mib(count: int) -> str:
    return f"{count / 2**20:+.0f} MiB"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=10_000, help="how many [10000]")
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="end after that long at the latest [1800]"
    )
    parser.add_argument(
        "--plan", default="0.01/0.02", help="LLMPROBE_KERNEL_WINDOWS of the server [0.01/0.02]"
    )
    parser.add_argument(
        "--model", choices=sorted(CONFIGURATIONS), default="small", help="what is served [small]"
    )
    parser.add_argument("--layers", type=int, help="of the model, for shorter steps [as it is]")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one, as windows are for")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time [8]")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5, help="as vLLM's [0.5]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
