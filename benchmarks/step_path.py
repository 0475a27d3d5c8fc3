"""What the hooks add to a vLLM worker's step, wrappers included, without an engine.

    python benchmarks/step_path.py

A stand-in for a worker's methods is called with and without the hooks, in turns; between the calls the caches
are emptied, as a model does. Shows what `overhead.py` cannot: the part of a step that llmprobe does not book,
and how far the same code is from what it takes in a loop. In seconds, so it serves to compare changes.

    python benchmarks/step_path.py --requests 128 --prompt-every 4
    python benchmarks/step_path.py --requests 128 --prompt-every 4 --ranges

With so many requests in a step, and a prompt of 128 tokens among them in every fourth. With --ranges as under
a profiler that listens to NVTX, without what that does: each step has a range by its phase and tokens.

    python benchmarks/step_path.py --kept 128

Instead: how many containers (what Python's collection of garbage counts) of a decode step of so many requests
stay until it is written. Needs vLLM, whose own classes are used.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from support.machine import machine_line
from support.serving import new_directory
from support.table import Results, command

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import worker as hooks
from llmprobe.hooks.vllm.seams import Seam
from llmprobe.hooks.vllm.steps import WorkerSteps
from llmprobe.record.clock import HostClock, Stamps
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.nvtx import ranges
from llmprobe.record.recorder import Recorder
from llmprobe.settings import Settings

_now = time.monotonic_ns
_AT_ONCE = 100  # steps between two readings of the journal, as many between off and on
_KEPT_STEPS = 400  # fewer than those of which the step path writes some
_BLOCK_TOKENS = 16
_PROMPT_TOKENS = 128


@dataclass
class Cached:
    """As vLLM's CachedRequestData, what is read of it."""

    req_ids: list[str]
    num_computed_tokens: list[int]
    num_output_tokens: list[int]
    resumed_req_ids: set[str] = field(default_factory=set)


@dataclass
class Scheduled:
    """As vLLM's SchedulerOutput, what is read of it."""

    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_cached_reqs: Cached
    scheduled_new_reqs: list[Any] = field(default_factory=list)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)


@dataclass
class New:
    """As vLLM's NewRequestData, what is read of it."""

    req_id: str
    prompt_token_ids: list[int]
    num_computed_tokens: int = 0


@dataclass(frozen=True)
class Load:
    """What steps work on: so many requests, and in every so-manieth step (0: none) one of them is new."""

    requests: int = 1
    prompt_every: int = 0

    def step(self, number: int) -> Scheduled:
        """What the scheduler would make of it."""
        begun = number // self.prompt_every if self.prompt_every else 0
        ids = [f"cmpl-{of:032x}-0" for of in range(begun, begun + self.requests)]
        decoding = ids
        scheduled = Scheduled(dict.fromkeys(ids, 1), self.requests, Cached([], [], []))
        if self.prompt_every and number % self.prompt_every == 0:
            decoding = ids[:-1]
            scheduled.scheduled_new_reqs = [New(ids[-1], [0] * _PROMPT_TOKENS)]
            scheduled.num_scheduled_tokens[ids[-1]] = _PROMPT_TOKENS
            scheduled.total_num_scheduled_tokens += _PROMPT_TOKENS - 1
            scheduled.finished_req_ids = {f"cmpl-{begun - 1:032x}-0"}
        computed = list(range(number + 10, number + 10 + len(decoding)))
        scheduled.scheduled_cached_reqs = Cached(decoding, computed, computed)
        return scheduled


class Runner:
    """Has the place where a forward starts."""

    def forward_start(self) -> int:
        """When it was entered."""
        return _now()


def worker_class(runner: Runner, disturb: Callable[[], None]) -> tuple[type, list[int]]:
    """A worker whose methods do nothing but empty the caches; and the times of each call's ends inside it."""
    inside: list[int] = []

    class WorkerBase:
        def __init__(self) -> None:
            pass

        def execute_model(self, scheduler_output: Scheduled) -> None:
            entered = _now()
            disturb()
            before = _now()
            at = runner.forward_start()
            after = _now()
            disturb()
            inside.extend((entered, before, at, after, _now()))

        def sample_tokens(self, grammar_output: None) -> str:
            entered = _now()
            disturb()
            inside.extend((entered, _now()))
            return "output"

    return WorkerBase, inside


class Listener:
    """An NVTX domain as nvtx offers it once a profiler listens. Does nothing with ranges."""

    def get_event_attributes(self, message: str, payload: int) -> Any:
        """What is pushed."""
        return SimpleNamespace(message=message, payload=payload)

    def push_range(self, attributes: Any) -> None:
        """A range begins."""

    def pop_range(self) -> None:
        """It ends."""


def listen() -> None:
    """From here on llmprobe finds a profiler."""
    nvtx = ModuleType("nvtx")
    vars(nvtx)["get_domain"] = lambda name: Listener()
    sys.modules["nvtx"] = nvtx


def cold() -> Callable[[], None]:
    """Empties the caches: walks memory, and runs much Python code over many objects."""
    memory = np.zeros(6 << 20, np.uint8)
    text = json.dumps([{str(number): [number, number * 1.5, "text"]} for number in range(300)])

    def disturb() -> None:
        memory[::64].sum()
        json.loads(text)

    return disturb


@dataclass
class Hooked:
    """A stand-in for a worker, with the hooks installed."""

    probe: Probe
    recorder: Recorder
    worker: Any
    state: WorkerSteps
    inside: list[int]  #: as of `worker_class`


@contextlib.contextmanager
def hooked(clock: HostClock, disturb: Callable[[], None]) -> Iterator[Hooked]:
    """One whose steps are stamped with ``clock``, and that calls ``disturb`` in them."""
    directory = new_directory()
    probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": str(directory)}))
    recorder = probe.arm("worker", dict)
    if recorder is None:
        raise SystemExit(f"no journal in {directory}")
    try:
        base, inside = worker_class(Runner(), disturb)
        module = ModuleType("vllm.v1.worker.worker_base")
        vars(module)["WorkerBase"] = base
        hooks.install(probe, module)
        worker = base()
        state = vars(worker)["_llmprobe_steps"]
        state.use(clock, recorder, Seam(Runner, "forward_start", "v2"))
        state.armed = True
        yield Hooked(probe, recorder, worker, state, inside)
    finally:
        probe.remove_patches()
        probe.disarm()
        shutil.rmtree(directory, ignore_errors=True)


def measure(steps: int, load: Load, disturb: Callable[[], None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nanoseconds a step: in the calls without the hooks, with them, and what the hooks booked of it."""
    with hooked(HostClock(), disturb) as on_worker:
        probe, worker, inside = on_worker.probe, on_worker.worker, on_worker.inside
        reader = JournalReader(on_worker.recorder.writer.path, on_worker.recorder.writer)
        taken: dict[bool, list[int]] = {False: [], True: []}
        own: list[int] = []
        for turn in range(2 * (steps // _AT_ONCE)):
            on = bool(turn % 2)
            (probe.apply_patches if on else probe.remove_patches)()
            for number in range(_AT_ONCE):
                scheduled = load.step(number)
                inside.clear()
                disturb()
                begin = _now()
                worker.execute_model(scheduled)
                middle = _now()
                disturb()
                again = _now()
                worker.sample_tokens(None)
                end = _now()
                entered, before, _, after, left, sample_entered, sample_left = inside
                execute = (entered - begin) + (after - before) + (middle - left)
                taken[on].append(execute + (sample_entered - again) + (end - sample_left))
            on_worker.state.write()
            on_worker.recorder.publish()
            own += reader.read().steps["own_ns"].tolist()
        return np.array(taken[False]), np.array(taken[True]), np.array(own)


class Pooled(HostClock):
    """With stamps made beforehand, as a device's clock has them."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._made: Stamps | None = None
        for _ in range(steps):
            stamps = Stamps()
            stamps.ns, stamps.payload, stamps.flags, stamps.own_ns = [0, 0, 0, 0], None, 0, 0
            stamps.next, self._made = self._made, stamps

    def spare(self) -> Stamps | None:
        """See `StepClock.spare`: all there are."""
        made, self._made = self._made, None
        return made


def kept(requests: int, hooks_on: bool) -> float:
    """Containers that are there after a decode step of so many requests and were not before it."""
    from vllm.v1.core.sched.output import SchedulerOutput

    ids = [f"cmpl-{number:032x}-0" for number in range(requests)]
    with hooked(Pooled(_KEPT_STEPS), lambda: None) as on_worker:
        (on_worker.probe.apply_patches if hooks_on else on_worker.probe.remove_patches)()
        gc.collect()
        gc.disable()
        try:
            before = gc.get_count()[0]
            for number in range(_KEPT_STEPS):
                # As vLLM's scheduler fills it. A request that needs another block has a tuple and a list.
                scheduled = SchedulerOutput.make_empty()
                cached = scheduled.scheduled_cached_reqs
                computed = range(number, number + requests)
                cached.req_ids, cached.num_computed_tokens = list(ids), list(computed)
                cached.num_output_tokens = [number] * requests
                cached.new_block_ids = [([at],) if at % _BLOCK_TOKENS == 0 else None for at in computed]
                scheduled.num_scheduled_tokens = dict.fromkeys(ids, 1)
                scheduled.total_num_scheduled_tokens = requests
                on_worker.worker.execute_model(scheduled)
                on_worker.worker.sample_tokens(None)
            del scheduled, cached
            return (gc.get_count()[0] - before) / _KEPT_STEPS
        finally:
            gc.enable()


def show_kept(requests: int, markdown: bool) -> None:
    """One row, with the hooks and without."""
    off, on = kept(requests, False), kept(requests, True)
    Results(
        "What is kept of a vLLM step until it is written",
        command("step_path.py"),
        machine_line(),
        ("containers a step", "without the hooks", "with them"),
        [[f"decode, {requests} at a time", f"{off:.1f}", f"{on:.1f}"]],
        ["Stamps are not in it: those of a device are made beforehand."],
    ).show(markdown)


def main() -> int:
    """Measure in emptied caches, and as a loop that does nothing else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each kind [2000]")
    parser.add_argument("--requests", type=int, default=1, help="in each step [1]")
    parser.add_argument(
        "--prompt-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="one of them is new in every so-manieth step",
    )
    parser.add_argument("--ranges", action="store_true", help="as if a profiler listened to NVTX")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/overhead.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--kept", type=int, metavar="REQUESTS", help="count containers, at so many at a time")
    options = parser.parse_args()
    if options.steps < _AT_ONCE:
        parser.error(f"--steps from {_AT_ONCE}")
    if options.requests < 1 or options.prompt_every < 0:
        parser.error("--requests from 1, --prompt-every from 0")
    load = Load(options.requests, options.prompt_every)
    if options.ranges:
        listen()
    if options.kept:
        show_kept(options.kept, options.markdown)
        return 0
    rows, saved = [], {}
    for name, disturb in (("caches emptied between calls", cold()), ("nothing between calls", lambda: None)):
        off, on, own = measure(options.steps, load, disturb)
        added, booked = float(np.median(on) - np.median(off)) / 1e3, float(np.median(own)) / 1e3
        means = float(on.mean() - off.mean()) / 1e3, float(own.mean()) / 1e3
        saved[name] = {
            "added_us": added,
            "booked_us": booked,
            "added_mean_us": means[0],
            "booked_mean_us": means[1],
        }
        rows.append([name, *(f"{value:.1f} µs" for value in (added, booked, *means))])
    Results(
        "The hooks of a vLLM step without an engine",
        command("step_path.py"),
        machine_line(),
        (
            "a step",
            "added in all, median",
            "of it booked, median",
            "added in all, mean",
            "of it booked, mean",
        ),
        rows,
        [
            f"{options.steps} steps with the hooks and as many without, {load.requests} requests in each"
            + (f", one of them new in every {load.prompt_every}th" if load.prompt_every else "")
            + ("; with ranges" if ranges(True).listening else "")
        ],
    ).show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps(saved, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
