"""How long a torch capture stops the program that it records, with and without the interpreter lock.

``python benchmarks/torch_capture.py`` prints docs/captures.md's table. One thread calls small operators, one
looks every millisecond whether it may run; what it had to wait for is what an engine's thread would have.

With ``--cuda`` the operators run on a GPU, and kernels, copies and calls into CUDA are recorded; ``--cpu``
records the operators on the host as well. Captures of CUDA devices hold the lock; here each recording runs in
a process of its own, so that one that ends its process without the lock is told, not only suffered.
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

from llmprobe.record import torch_trace
from llmprobe.record.torch_trace import TorchTrace

_MOST_SECONDS = 120.0


class Pauses(threading.Thread):
    """The longest wait for the interpreter lock since it was last asked."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0

    def run(self) -> None:
        last = time.perf_counter()
        while True:
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest = max(self.longest, now - last - 0.001)
            last = now

    def take(self) -> float:
        """Seconds."""
        longest, self.longest = self.longest, 0.0
        return longest


def work(over: threading.Event, device: str) -> None:
    """Small operators, with a moment of rest now and then, as between steps."""
    x = torch.randn(8, 8, device=device)
    while not over.is_set():
        for _ in range(20):
            x = (x @ x).clamp_(-1, 1)
        time.sleep(0.0005)


def measure(options: argparse.Namespace, locked: bool, pauses: Pauses) -> dict[str, Any]:
    """One recording."""
    trace = TorchTrace(cuda=options.cuda, cpu=options.cpu or not options.cuda, stacks=False)
    row: dict[str, Any] = {"lock": "held" if locked else "not held"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "trace.json.gz"
        pauses.take()
        trace.start()
        row["start"] = pauses.take()
        trace._unlocked = None if locked else torch_trace._Unlocked.find()
        time.sleep(options.seconds)
        row["recording"] = pauses.take()
        begun = time.perf_counter()
        trace.stop()
        time.sleep(0.01)
        row["stop"] = pauses.take()
        trace.save(target)
        time.sleep(0.01)
        row["save"] = pauses.take()
        row["took"] = time.perf_counter() - begun
        text = gzip.decompress(target.read_bytes())
        row["events"] = text.count(b'"ph": "X"')
        row["kernels"] = text.count(b'"cat": "kernel"')
    return row


def record(options: argparse.Namespace, locked: bool) -> dict[str, Any]:
    """One recording in this process, after one that sets the profiler up."""
    torch.set_num_threads(1)
    over, pauses = threading.Event(), Pauses()
    thread = threading.Thread(target=work, args=(over, "cuda" if options.cuda else "cpu"))
    thread.start()
    pauses.start()
    try:
        short = argparse.Namespace(**{**vars(options), "seconds": 0.2})
        measure(short, locked, pauses)
        return measure(options, locked, pauses)
    finally:
        over.set()
        thread.join()


def apart(options: argparse.Namespace, locked: bool) -> dict[str, Any]:
    """The same in a process of its own; ``failed`` says how that ended if it did badly."""
    command = [
        sys.executable,
        __file__,
        "--seconds",
        str(options.seconds),
        "--one",
        "held" if locked else "free",
    ]
    command += ["--cuda"] * options.cuda + ["--cpu"] * options.cpu
    lock = "held" if locked else "not held"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"lock": lock, "failed": f"not over after {_MOST_SECONDS:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"lock": lock, "failed": f"exit status {done.returncode}: {last}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> int:
    """Print the table; returns 1 if a recording failed."""
    options = _options()
    if torch_trace._Unlocked.find() is None:
        sys.exit(f"torch {torch.__version__} on this machine is not called without the lock")
    if options.one:
        print(json.dumps(record(options, options.one == "held")))
        return 0
    rows = [apart(options, locked) for locked in (False, True) for _ in range(options.times)]
    if options.json:
        print(json.dumps(rows))
        return int(any("failed" in row for row in rows))
    print(f"{machine_line()}\n")
    print(
        "| interpreter lock | events | longest pause: start | recording | stop | save | stop and save took |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        if "failed" in row:
            print(f"| {row['lock']} | {row['failed']} | | | | | |")
            continue
        cells = [f"{row[name] * 1e3:.0f} ms" for name in ("start", "recording", "stop", "save")]
        print(f"| {row['lock']} | {row['events']} | {' | '.join(cells)} | {row['took']:.1f} s |")
    return int(any("failed" in row for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to record [3]")
    parser.add_argument("--times", type=int, default=1, help="so often each [1]")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument("--cpu", action="store_true", help="with --cuda: operators on the host too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=("held", "free"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
