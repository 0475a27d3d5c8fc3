"""Stand-ins for what vLLM's front end is made of, with real hooks on them, and how long a call takes."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import arrival, frontend_hooks
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.hooks.vllm.unfinished import Engine
from llmprobe.settings import Settings
from support.serving import new_directory

_now = time.monotonic_ns
_STEP_SECONDS = 0.01


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
        frontend_hooks._front_end = front
        frontend_hooks.install_stat_loggers(self.probe, loggers)
        frontend_hooks.install_output_processor(self.probe, processors)
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
