"""What the agent costs while it watches one busy server.

    python benchmarks/agent_cost.py
    python benchmarks/agent_cost.py --ranks 1 --steps-per-second 100 --seconds 120

Each rank is a process of its own that records steps as an engine does, a front end records requests, and one
agent of its own watches them. Processor time counts, not the clock, so the machine may have few cores. Exit
status 1 if a bar is missed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from support.agent_cost import AgentCost
from support.machine import machine_line
from support.table import Results, bar, command

from llmprobe.record.agent_launch import agent_environment, agent_info

_CORE_PERCENT, _AGENT_BYTES = 2.0, 150 << 20
_FEEDER = Path(__file__).parent / "support" / "pretended_rank.py"
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Cost:
    """What was found."""

    core_ratio: float
    resident_bytes: int
    seconds: float
    steps_per_second: float  # of one rank


def main() -> int:
    """Measure what the command line asks for; returns the exit status."""
    options = _options()
    machine = machine_line()
    directory = Path(f"/dev/shm/llmprobe-agent-cost-{os.getpid()}")
    try:
        with _server(directory, options.ranks, options.steps_per_second), _agent(directory):
            time.sleep(options.warm_up_seconds)
            cost = _measure(directory, options.seconds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    percent, mebibytes = cost.core_ratio * 100, cost.resident_bytes / (1 << 20)
    table = Results(
        f"The agent, {options.ranks} rank{'s' if options.ranks > 1 else ''}",
        command("agent_cost.py"),
        machine,
        ("", "agent", "bar"),
        [
            ["of one core", f"{percent:.2f} %", bar(percent, _CORE_PERCENT, "%")],
            ["resident", f"{mebibytes:.0f} MiB", bar(mebibytes, _AGENT_BYTES >> 20, "MiB")],
        ],
        [
            f"over {cost.seconds:.0f} s; {cost.steps_per_second:.0f} steps a second and rank; "
            "10 requests a second; nobody scrapes"
        ],
    )
    table.show(options.markdown)
    if options.json:
        saved = {"machine": machine, "command": command("agent_cost.py"), "agent": asdict(cost)}
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    return int(any("MISSED" in cell for row in table.rows for cell in row))


def _measure(directory: Path, seconds: float) -> Cost:
    from support.journals import live_journals

    ranks = live_journals(directory, "worker")
    agent = AgentCost(directory)

    def steps() -> int:
        return sum(
            total for rank in ranks for name, total in rank.counters().items() if name.startswith("steps_")
        )

    began, before, used = time.monotonic(), steps(), agent.cpu_seconds()
    time.sleep(seconds)
    used = agent.cpu_seconds() - used
    took = time.monotonic() - began
    return Cost(used / took, agent.resident_bytes, took, (steps() - before) / took / len(ranks))


@contextlib.contextmanager
def _server(directory: Path, ranks: int, rate: float) -> Iterator[None]:
    """One front end and the ranks; they end with the block."""
    children = []
    try:
        for arguments in [["frontend"], *(["worker", str(rank), str(rate)] for rank in range(ranks))]:
            line = [sys.executable, str(_FEEDER), str(directory), *arguments]
            child = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            children.append(child)
            assert child.stdout is not None
            if child.stdout.readline() != b"ready\n":
                raise RuntimeError(f"a pretended process did not start: {' '.join(line)}")
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


@contextlib.contextmanager
def _agent(directory: Path) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "llmprobe.agent", "--foreground", "--external"]
    line += ["--directory", str(directory), "--listen", f"127.0.0.1:{port}"]
    # As an engine starts it: with one thread for numpy, and little else.
    agent = subprocess.Popen(line, stderr=subprocess.DEVNULL, env=agent_environment(os.environ))
    try:
        until = time.monotonic() + _START_SECONDS
        while agent_info(directory) is None:
            if agent.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the agent did not start")
            time.sleep(0.1)
        yield
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait(_START_SECONDS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8, help="worker processes [8]")
    parser.add_argument("--steps-per-second", type=float, default=200.0, help="of each rank [200]")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure [60]")
    parser.add_argument("--warm-up-seconds", type=float, default=35.0, help="fills every window [35]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    options = parser.parse_args()
    if options.ranks < 1 or options.steps_per_second <= 0 or options.seconds < 1:
        parser.error("--ranks and --seconds from 1, --steps-per-second above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
