"""What the hooks add to a vLLM front end, without a server: a step, a streamed piece, a request, a round.

    python benchmarks/front_end_path.py

Stand-ins for vLLM's output processor, statistics and web application are called with and without the hooks,
in turns; between the calls the caches are emptied, as a server's own code does. Then the rounds of the
housekeeping thread, in processor time: with nothing to do in each role, and with a quarter second of a loaded
front end to write. Shows what `overhead.py` cannot tell apart. In seconds, so it serves to compare changes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from step_path import cold
from support.machine import machine_line
from support.serving import new_directory
from support.table import Results, command

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import _Housekeeping
from llmprobe.hooks.vllm import arrival, frontend
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.unfinished import Engine
from llmprobe.record.agent_launch import LOCK_NAME
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings

_now = time.monotonic_ns
_AT_ONCE = 25  # between off and on
_STEP_SECONDS = 0.01
_STREAMS = 128


class Disturbance:
    """Empties the caches, and knows what that took (ns)."""

    def __init__(self, disturb: Callable[[], None]) -> None:
        self.taken_ns = 0
        self._disturb = disturb

    def __call__(self) -> None:
        begin = _now()
        self._disturb()
        self.taken_ns += _now() - begin

    def cost(self, called: Callable[[], None]) -> int:
        """Nanoseconds of a call, less what emptying the caches took meanwhile."""
        self._disturb()
        self.taken_ns, begin = 0, _now()
        called()
        return _now() - begin - self.taken_ns


class Iteration:
    """As vLLM's IterationStats, what is read of it."""

    def __init__(self, gaps: int, first: int = 0, finished: int = 0) -> None:
        self.iteration_timestamp = time.time()
        self.num_generation_tokens = gaps + first
        self.num_prompt_tokens = 128 * first
        self.prompt_token_stats = SimpleNamespace(cached_tokens=0)
        self.num_preempted_reqs = 0
        gap = _STEP_SECONDS * (1 + time.monotonic_ns() % 1000 / 2000)
        self.inter_token_latencies_iter = [gap] * gaps
        self.time_to_first_tokens_iter = [0.03] * first
        self.finished_requests = [_finished() for _ in range(finished)]


def _finished() -> Any:
    taken = 1 + time.monotonic_ns() % 1000 / 1000
    return SimpleNamespace(
        num_generation_tokens=128,
        queued_time=taken / 300,
        prefill_time=taken / 200,
        e2e_latency=taken,
        mean_time_per_output_token=taken / 128,
        num_prompt_tokens=128,
        finish_reason=1,
    )


def modules(disturb: Callable[[], None]) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Stand-ins for the modules of vLLM and Starlette that the hooks ride on; they do nothing else."""

    class StatLoggerManager:
        def __init__(self) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            disturb()

    class OutputProcessor:
        def __init__(self) -> None:
            self.request_states: dict[str, Any] = {}

        def add_request(self, request: Any, prompt: Any, parent: Any, index: int, queue: Any) -> None:
            disturb()
            self.request_states[request.request_id] = request

        def process_outputs(self, outputs: Any, made: float, iteration: Any) -> None:
            disturb()
            for output in outputs:
                if output.finished:
                    del self.request_states[output.request_id]

        def abort_requests(self, ids: Any) -> Any:
            return ids

    class Starlette:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await scope["endpoint"](send)

    found = []
    for name, owner in (("logger", StatLoggerManager), ("processor", OutputProcessor), ("web", Starlette)):
        module = ModuleType(name)
        vars(module)[owner.__name__] = owner
        found.append(module)
    return found[0], found[1], found[2]


async def sent(message: Any) -> None:
    """The connection takes a piece."""


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits."""
    with contextlib.suppress(StopIteration):
        coroutine.send(None)


class Server:
    """A front end of stand-ins with real hooks on it."""

    def __init__(self, disturb: Callable[[], None]) -> None:
        self.disturb = Disturbance(disturb)
        loggers, processors, web = modules(self.disturb)
        self.directory = new_directory()
        self.probe = probe_of(self.directory)
        recorder = self.probe.arm("frontend", lambda: {"role": "frontend"})
        if recorder is None:
            raise SystemExit(f"no journal in {self.directory}")
        self.recorder = recorder
        front = FrontEnd(self.probe, None, [])
        front._engines[0] = Engine(0, recorder)
        frontend._front_end = front
        frontend.install_stat_loggers(self.probe, loggers)
        frontend.install_output_processor(self.probe, processors)
        arrival.install(self.probe, web)
        self._loggers = loggers.StatLoggerManager.__new__(loggers.StatLoggerManager)  # the front end is there
        self._processor = processors.OutputProcessor()
        self._application = web.Starlette()
        self._requests = 0
        self._running: list[Any] = []

    def close(self) -> None:
        """Take the hooks off, leave nothing behind."""
        self.probe.remove_patches()
        self.probe.disarm()
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self) -> None:
        """As a round of the housekeeping thread."""
        for write in self.probe.writers:
            write()
        self.recorder.publish()

    def begin(self, count: int) -> None:
        """So many requests are in the middle of their answers."""
        while len(self._running) < count:
            output = self._add()
            self._step([output], Iteration(0, first=1))
            self._running.append(output)

    def step(self) -> None:
        """Each of them gets a token."""
        self._step(self._running, Iteration(len(self._running)))

    def busy_step(self) -> None:
        """One of them ends, a new one gets its first token, the others get one each."""
        ended = self._running.pop(0)
        ended.finished = True
        begun = self._add()
        self._running.append(begun)
        self._step([ended, *self._running], Iteration(len(self._running), first=1, finished=1))

    def request(self) -> None:
        """A request from its HTTP headers to its end: two tokens, beside those that run."""

        async def endpoint(send: Any) -> None:
            output = self._add()
            await send({"type": "http.response.start"})
            self._step([output, *self._running], Iteration(len(self._running), first=1))
            self.disturb()
            await send({"type": "http.response.body", "body": b"first"})
            output.finished = True
            self._step([output, *self._running], Iteration(len(self._running) + 1, finished=1))
            await send({"type": "http.response.body", "body": b"last"})

        run(self._application({"type": "http", "endpoint": endpoint}, None, sent))

    def streams(self, count: int) -> list[Any]:
        """The ``send`` of so many streams that have had their first tokens."""
        sends: list[Any] = []

        async def endpoint(send: Any) -> None:
            await send({"type": "http.response.start"})
            output = self._add()
            self._step([output], Iteration(0, first=1))
            await send({"type": "http.response.body", "body": b"first"})
            output.finished = True
            self._step([output], Iteration(1, finished=1))
            sends.append(send)

        for _ in range(count):
            run(self._application({"type": "http", "endpoint": endpoint}, None, sent))
        return sends

    def _add(self) -> Any:
        self._requests += 1
        output = SimpleNamespace(request_id=f"cmpl-{self._requests}", finished=False, events=None)
        request = SimpleNamespace(request_id=output.request_id, arrival_time=time.time())
        self._processor.add_request(request, None, None, 0, None)
        return output

    def _step(self, outputs: list[Any], iteration: Iteration) -> None:
        self._processor.process_outputs(outputs, time.monotonic(), iteration)
        self.disturb()
        stats = SimpleNamespace(num_running_reqs=len(outputs), num_waiting_reqs=0, kv_cache_usage=0.5)
        self._loggers.record(engine_idx=0, scheduler_stats=stats, iteration_stats=iteration)


def probe_of(directory: Path) -> Probe:
    """A probe that starts no agent."""
    return Probe(
        Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(directory), "LLMPROBE_AGENT": "off"})
    )


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
    """Microseconds that the hooks add to a piece of a stream: those of a step, one after another."""
    message = {"type": "http.response.body", "body": b"piece"}
    taken: dict[bool, list[float]] = {False: [], True: []}
    sends: dict[bool, list[Any]] = {}
    for on in (False, True):
        (server.probe.apply_patches if on else server.probe.remove_patches)()
        sends[on] = server.streams(_STREAMS)

    def pieces(those: list[Any]) -> None:
        for send in those:
            run(send(message))

    for turn in range(max(2 * (times // _AT_ONCE), 20)):
        those = sends[bool(turn % 2)]
        taken[bool(turn % 2)].append(server.disturb.cost(lambda those=those: pieces(those)) / _STREAMS)  # type: ignore[misc]
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
    """Microseconds of processor time of a round, mean."""
    taken = []
    for _ in range(rounds):
        before()
        disturb()
        begin = time.thread_time_ns()
        housekeeping.round()
        taken.append(time.thread_time_ns() - begin)
    return float(np.mean(taken[1:])) / 1e3  # the first finds out what never changes


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
        return float(np.mean(taken[1:])) / 1e3
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
        ("adds", *names),
        [[what, f"{saved[0][what]:.1f} µs", f"{saved[1][what]:.1f} µs"] for what in saved[0]],
        [
            "steps, requests and pieces: on the event loop, wrappers included",
            "rounds: processor time of the housekeeping thread, four a second",
        ],
    ).show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps(dict(zip(names, saved, strict=True)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
