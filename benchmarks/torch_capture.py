"""How long a torch capture stops the program that it records, with and without the interpreter lock.

``python benchmarks/torch_capture.py`` prints docs/captures.md's table. One thread calls small operators, one
looks every millisecond whether it may run; what it had to wait for is what an engine's thread would have.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from llmprobe.record import torch_trace
from llmprobe.record.torch_trace import TorchTrace


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


def work(over: threading.Event) -> None:
    """Small operators, with a moment of rest now and then, as between steps."""
    x = torch.randn(8, 8)
    while not over.is_set():
        for _ in range(20):
            x = (x @ x).clamp_(-1, 1)
        time.sleep(0.0005)


def measure(seconds: float, locked: bool, pauses: Pauses) -> dict[str, Any]:
    """One recording."""
    trace = TorchTrace(cuda=False, cpu=True, stacks=False)
    row: dict[str, Any] = {"lock": "held" if locked else "not held"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "trace.json.gz"
        pauses.take()
        trace.start()
        row["start"] = pauses.take()
        if locked:
            trace._unlocked = None
        time.sleep(seconds)
        row["recording"] = pauses.take()
        begun = time.perf_counter()
        trace.stop()
        time.sleep(0.01)
        row["stop"] = pauses.take()
        trace.save(target)
        time.sleep(0.01)
        row["save"] = pauses.take()
        row["took"] = time.perf_counter() - begun
        row["events"] = gzip.decompress(target.read_bytes()).count(b'"ph": "X"')
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to record")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if torch_trace._Unlocked.find() is None:
        raise SystemExit(f"torch {torch.__version__} on this machine is not called without the lock")
    over, pauses = threading.Event(), Pauses()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    pauses.start()
    try:
        measure(0.2, False, pauses)  # the first one sets the profiler up
        rows = [measure(options.seconds, locked, pauses) for locked in (False, True)]
    finally:
        over.set()
        thread.join()
    if options.json:
        print(json.dumps(rows))
        return
    print(
        "| interpreter lock | events | longest pause: start | recording | stop | save | stop and save took |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [f"{row[name] * 1e3:.0f} ms" for name in ("start", "recording", "stop", "save")]
        print(f"| {row['lock']} | {row['events']} | {' | '.join(cells)} | {row['took']:.1f} s |")


if __name__ == "__main__":
    main()
