"""What the hooks add to a vLLM front end, without a server: a step, a streamed piece, a request, a round.

    python benchmarks/front_end_path.py

Stand-ins for vLLM's output processor, statistics and web application are called with and without the hooks,
in turns; between the calls the caches are emptied, as a server's own code does. Then the rounds of the
housekeeping thread, in processor time: with nothing to do in each role, and with a quarter second of a loaded
worker or front end to write. Shows what `overhead.py` cannot tell apart. In seconds, so it serves to compare
changes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from step_path import cold
from support.machine import machine_line
from support.pretended_front_end import Server, probe_of, run
from support.pretended_worker import WorkerSteps
from support.serving import new_directory
from support.table import Results, command

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import _Housekeeping
from llmprobe.record.agent_launch import LOCK_NAME
from llmprobe.record.recorder import Recorder

_AT_ONCE = 25  # between off and on
_STREAMS = 128


def added_us(server: Server, called: Callable[[], None], times: int) -> float:
    """Microseconds that the hooks add to a call, by the medians of as many without them."""
    taken: dict[bool, list[int]] = {False: [], True: []}
    for turn in range(2 * (times // _AT_ONCE)):
        on = bool(turn % 2)
        (server.probe.apply_patches if on else server.probe.remove_patches)()
        for _ in range(_AT_ONCE):
            taken[on].append(server.disturb.cost(called))
        server.write()
    return float(np.median(taken[True]) - np.median(taken[False])) / 1e3


def piece_us(server: Server, times: int) -> float:
    """Microseconds that the hooks add to a piece of a stream: each of another stream."""
    message = {"type": "http.response.body", "body": b"piece"}
    sends: dict[bool, list[Any]] = {}
    for on in (False, True):
        (server.probe.apply_patches if on else server.probe.remove_patches)()
        sends[on] = server.streams(_STREAMS)
    taken: dict[bool, list[int]] = {False: [], True: []}
    for turn in range(4 * times):
        on = bool(turn % 2)
        send = sends[on][turn // 2 % _STREAMS]
        taken[on].append(server.disturb.cost(lambda send=send: run(send(message))))  # type: ignore[misc]
    return float(np.median(taken[True]) - np.median(taken[False])) / 1e3


def step_rows(disturb: Callable[[], None], times: int) -> dict[str, float]:
    """What → microseconds on the event loop."""
    server = Server(disturb)
    try:
        found = {}
        for count in (1, 128):
            server.begin(count)
            found[f"a step, {count} output{'s' if count > 1 else ''}"] = added_us(server, server.step, times)
        found["a step of 128 in which one ends and one begins"] = added_us(server, server.busy_step, times)
        loads = [server.disturb.cost(lambda: server.recorder.load(1, 0, 0.5, 1)) for _ in range(times)]
        found["writing the load, at most 20 times a second"] = float(np.median(loads)) / 1e3
    finally:
        server.close()
    server = Server(disturb)
    try:
        server.begin(1)
        alone = added_us(server, server.step, times)
        found["a request, beside its two steps"] = added_us(server, server.request, times) - 2 * alone
        found["a streamed piece"] = piece_us(server, times)
    finally:
        server.close()
    return found


def round_us(
    housekeeping: _Housekeeping, disturb: Callable[[], None], rounds: int, before: Callable[[], None]
) -> float:
    """Microseconds of processor time of a round, median."""
    taken = []
    for _ in range(rounds):
        before()
        disturb()
        begin = time.thread_time_ns()
        housekeeping.round()
        taken.append(time.thread_time_ns() - begin)
    return float(np.median(taken)) / 1e3


def round_rows(disturb: Callable[[], None], rounds: int) -> dict[str, float]:
    """What → microseconds in the housekeeping thread."""

    def nothing() -> None:
        pass

    found = {}
    for role in ("worker", "program"):
        with recording(role) as (probe, recorder):
            found[f"a round, {role}, nothing to do"] = round_us(
                _Housekeeping(probe, recorder), disturb, rounds, nothing
            )
    for requests in (1, 128):
        with recording("worker") as (probe, recorder):
            worker = WorkerSteps(recorder, requests)
            probe.writers.append(worker.write)
            found[f"a round, worker, 25 steps of {requests}"] = round_us(
                _Housekeeping(probe, recorder), disturb, rounds, lambda worker=worker: worker.leave(25)
            )
    server = Server(lambda: None)
    try:
        keeping = _Housekeeping(server.probe, server.recorder)
        found["a round, front end, nothing to do"] = round_us(keeping, disturb, rounds, nothing)

        def steps_of_one() -> None:
            for _ in range(50):
                server.step()

        def steps_of_128() -> None:
            for _ in range(25):
                server.busy_step()

        server.begin(1)
        found["a round, front end, 50 steps of 1"] = round_us(keeping, disturb, rounds, steps_of_one)
        server.begin(128)
        found["a round, front end, 25 steps of 128, 25 requests"] = round_us(
            keeping, disturb, rounds, steps_of_128
        )
    finally:
        server.close()
    return found


@contextlib.contextmanager
def recording(role: str) -> Iterator[tuple[Probe, Recorder]]:
    """A probe with a journal of that role."""
    directory = new_directory()
    probe = probe_of(directory)
    recorder = probe.arm(role, lambda: {"role": role})
    if recorder is None:
        raise SystemExit(f"no journal in {directory}")
    try:
        yield probe, recorder
    finally:
        probe.disarm()
        shutil.rmtree(directory, ignore_errors=True)


_HOLDS = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(lock, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def agent_look_us(disturb: Callable[[], None], times: int) -> float:
    """Microseconds of a look whether the agent runs: once a second in each process."""
    from llmprobe.record.agent_launch import _Attempts, ensure_agent

    directory = new_directory()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(directory / LOCK_NAME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        settings = probe_of(directory).settings
        _Attempts.compared = True
        taken = []
        for _ in range(times):
            disturb()
            begin = time.thread_time_ns()
            ensure_agent(settings)
            taken.append(time.thread_time_ns() - begin)
        return float(np.median(taken)) / 1e3
    finally:
        holder.kill()
        holder.wait()
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """Measure in emptied caches, and as a loop that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=400, help="of each kind [400]")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    options = parser.parse_args()
    if options.times < 2 * _AT_ONCE:
        parser.error(f"--times from {2 * _AT_ONCE}")
    saved = []
    for disturb in (cold(), lambda: None):
        found = step_rows(disturb, options.times)
        rounds = max(options.times // 10, 10)
        found |= round_rows(disturb, rounds)
        found["a look whether the agent runs, once a second"] = agent_look_us(disturb, rounds)
        saved.append(found)
    names = ("caches emptied between calls", "nothing between calls")
    Results(
        "The hooks of a vLLM front end without a server",
        command("front_end_path.py"),
        machine_line(),
        ("medians", *names),
        [[what, f"{saved[0][what]:.1f} µs", f"{saved[1][what]:.1f} µs"] for what in saved[0]],
        [
            "the first six: added to the event loop, wrappers included",
            "rounds: processor time of the housekeeping thread, four a second",
        ],
    ).show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps(dict(zip(names, saved, strict=True)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
