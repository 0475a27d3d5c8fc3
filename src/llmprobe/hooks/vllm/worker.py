"""The worker's step: wraps ``execute_model`` and ``sample_tokens`` of whatever worker class runs.

Runs on the engine's step path, so everything here is bounded, lock-free and guarded. Arms only after
warm-up, because vLLM warms up through the same methods.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import server_name
from llmprobe.hooks.torch_model import device_facts
from llmprobe.hooks.vllm import facts, seams
from llmprobe.hooks.vllm.batch import DUMMY, Batch, BatchReader
from llmprobe.record.clock import HOST_STEPS_KEPT, Stamps, StepClock, step_clock
from llmprobe.record.layout import PHASES, Clock, Flag
from llmprobe.record.nvtx import ranges
from llmprobe.record.recorder import Recorder
from llmprobe.settings import logger

_now = time.monotonic_ns
_HOST = int(Clock.HOST)
_IDLE_NS = 100_000_000
#: Steps of a CPU device wait for the housekeeping thread, up to so many: writing a record between two steps
#: costs several times more, because the model has just emptied the caches.
_KEPT_AT_MOST = HOST_STEPS_KEPT // 2
_RESTARTED, _NO_SAMPLE = int(Flag.RESTARTED), int(Flag.NO_SAMPLE)
_STEP_METHODS = ("execute_model", "sample_tokens", "execute_dummy_batch")
_LIFE_METHODS = ("initialize_from_config", "compile_or_warm_up_model")


#: What is kept about each worker, by its id: cheaper at every step than a weak dictionary.
_Workers = dict[int, "WorkerProbe"]
_Maker = Callable[[Callable[..., Any], Patch], Callable[..., Any]]


def install(probe: Probe, module: ModuleType) -> None:
    """Wrap ``WorkerBase.__init__``, where the classes of the actual worker become known."""
    workers: _Workers = {}

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if patch.active and probe.active:
                probe.guard.call("vllm.worker", adopt, self)

        return __init__

    def adopt(worker: Any) -> None:
        workers[id(worker)] = WorkerProbe(probe, worker)
        weakref.finalize(worker, workers.pop, id(worker), None)
        for owner, name in seams.methods(type(worker), _STEP_METHODS + _LIFE_METHODS):
            probe.patch(owner, name, _WRAPPERS[name](probe, workers))

    probe.patch(module.WorkerBase, "__init__", make)


class WorkerProbe:
    """What llmprobe keeps about one worker: its clock, its requests, the step in progress."""

    def __init__(self, probe: Probe, worker: Any) -> None:
        self._probe = probe
        self._batches = BatchReader()
        self._kv_cache_config: Any = None
        self._clock: StepClock | None = None
        self._recorder: Recorder | None = None
        self._seam: seams.Seam | None = None
        self._nvtx = ranges(probe.settings.nvtx)
        self.depth = 0  # wrapped methods call each other through super()
        self.armed = False
        self._stamps: Stamps | None = None
        self._batch: Batch | None = None
        self._number = 0
        self._time = 0
        self._own = 0
        self._marked = False
        self._kept = 0
        self._last_number = 0
        self._generation = probe.generation

    def kv_cache(self, config: Any) -> None:
        """The worker's KV cache has been laid out."""
        self._kv_cache_config = config

    def arm(self, worker: Any) -> None:
        """Warm-up is over: from the next step on, record. Not on the step path."""
        probe = self._probe
        runner = worker.model_runner
        seam = seams.forward_start(runner)
        clock = step_clock(worker.device)
        recorder = probe.arm("worker", lambda: self._facts(worker, clock, seam))
        if recorder is None:
            return
        self._recorder = recorder
        kv = (recorder.facts.get("model") or {}).get("kv") or {"groups": []}
        self._batches = BatchReader(facts.windows(kv))
        self._clock = clock
        self._seam = seam
        if seam is not None:
            probe.patch(
                seam.owner,
                seam.name,
                lambda original, patch: seams.entering(
                    self.forward_start, original, lambda: patch.active and self._stamps is not None
                ),
            )
        self.armed = True
        if self.write not in probe.writers:
            probe.writers.append(self.write)
        logger().info(
            "armed on vLLM %s, %s runner, rank %d",
            recorder.facts["framework_version"],
            recorder.facts["runner"],
            worker.rank,
        )

    def disarm(self) -> None:
        """Warm-up begins again: what runs now is not serving."""
        self.armed = False
        self.abandon()

    def _facts(self, worker: Any, clock: StepClock, seam: seams.Seam | None) -> dict[str, Any]:
        probe = self._probe
        config = worker.vllm_config
        engine = getattr(config.parallel_config, "data_parallel_index", None)
        if engine is None:
            engine = config.parallel_config.data_parallel_rank
        said = facts.process_facts(
            probe.settings, server_name(probe.settings), "worker", config, int(engine or 0)
        )
        said["runner"] = seams.runner_kind(worker.model_runner)
        said["rank"] = int(worker.rank)
        said["clock"] = clock.name
        said["device"] = device_facts(worker.device)
        said["hooks"] = [
            f"{owner.__name__}.{name}" for owner, name in seams.methods(type(worker), _STEP_METHODS)
        ]
        if seam is None:
            said["notes"].append(
                "this vLLM has no known place where the forward pass begins: gaps are lower bounds"
            )
        if not seams.tried(said["framework_version"]):
            said["notes"].append(f"vLLM {said['framework_version']} has not been tried with this llmprobe")
        said["model"] = None
        model = probe.guard.call("vllm.model_facts", facts.model_facts, worker, self._kv_cache_config)
        if model is None:
            said["notes"].append("the model could not be read: no MBU, no MFU")
        said["model"] = model
        for note in said["notes"]:
            logger().warning("%s", note)
        return said

    def begin(self, scheduled: Any) -> None:
        """``execute_model`` is entered."""
        entered = _now()
        clock, recorder = self._clock, self._recorder
        if clock is None or recorder is None:
            return
        if clock.kind != _HOST or self._kept >= _KEPT_AT_MOST:
            self._harvest()
        if self._generation != self._probe.generation:  # off and on again: requests came and went unseen
            self._generation = self._probe.generation
            self.abandon()  # the step in which it was switched off
            self._batches = BatchReader(self._batches.windows)
            clock.restart()
        if self._stamps is not None:  # the step before never came to its sampling
            self._close(_NO_SAMPLE)
        batch = DUMMY if scheduled is None else self._batches.read(scheduled)
        if batch is None:
            return
        stamps = self._stamps = clock.begin(None)
        if stamps is None:
            return
        self._batch = batch
        self._time = entered
        # Dummy batches go round the seam, and so does every step of a vLLM without one: their preparation
        # then counts as busy.
        self._marked = batch is DUMMY or self._seam is None
        tokens = batch.tokens
        self._number = recorder.begin(batch.phase, tokens, entered)
        self._nvtx.push(PHASES[batch.phase], tokens)
        if self._marked:
            clock.mark(stamps, 0)
        self._own += _now() - entered

    def forward_start(self) -> None:
        """The model is about to run. Called by the seam, guarded here."""
        stamps = self._stamps
        if stamps is None or self._marked:
            return
        entered = _now()
        try:
            self._marked = True
            self._clock.mark(stamps, 0)  # type: ignore[union-attr]
            self._own += _now() - entered
        except Exception as error:  # noqa: BLE001 - on vLLM's own call path
            self._probe.guard.failed("vllm.forward_start", error)

    def forward_end(self, sampling_follows: bool) -> None:
        """``execute_model`` returned; without a sampling call the step ends with it."""
        entered = _now()
        stamps, clock = self._stamps, self._clock
        if stamps is None or clock is None:
            return
        clock.mark(stamps, 1)
        self._own += _now() - entered
        if not sampling_follows:
            self._close(_NO_SAMPLE)

    def sample_start(self) -> None:
        """``sample_tokens`` is entered."""
        entered = _now()
        if self._stamps is not None and self._clock is not None:
            self._clock.mark(self._stamps, 2)
            self._own += _now() - entered

    def sample_end(self) -> None:
        """``sample_tokens`` returned: the step is over on the host."""
        if self._stamps is not None:
            self._close(0)

    def abandon(self) -> None:
        """The host's own call raised: close the NVTX range and forget the step."""
        if self._stamps is not None and self._clock is not None:
            self._clock.discard(self._stamps)
            self._nvtx.pop()
            if self._recorder is not None:
                self._recorder.abandon(self._number)
        self._stamps = self._batch = None

    def _close(self, flags: int) -> None:
        entered = _now()
        stamps, clock = self._stamps, self._clock
        if stamps is None or clock is None:
            return
        self._stamps = None
        clock.mark(stamps, 3)
        self._nvtx.pop()
        own, self._own = self._own + _now() - entered, 0
        stamps.payload = (self._number, self._time, self._batch, flags, own)
        clock.finish(stamps)
        self._kept += 1

    def write(self) -> None:
        """Write the steps that are complete. Runs in the housekeeping thread, a few times a second.

        CUDA events are left to the engine's own thread while it runs: asking for them from another one
        would break a graph that is being captured.
        """
        clock = self._clock
        if not self.armed or clock is None:
            return
        if clock.kind == _HOST or (self._stamps is None and _now() - self._time > _IDLE_NS):
            self._harvest()

    def _harvest(self) -> None:
        """Write the steps that are complete on the device."""
        recorder, clock = self._recorder, self._clock
        if recorder is None or clock is None:
            return
        self._kept = 0
        for stamps in clock.harvest():
            number, time_ns, batch, flags, own = stamps.payload
            if stamps.restarted or number != self._last_number + 1:
                flags |= _RESTARTED
            self._last_number = number
            recorder.step_counted(
                number,
                time_ns,
                batch.phase,
                clock.kind,
                flags,
                stamps.times,
                batch.counts,
                batch.attention,
                own,
            )


def _wrap_execute_model(probe: Probe, workers: _Workers) -> _Maker:
    guard = probe.guard

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active else None
            if state is None or not state.armed or state.depth or guard.inert:
                return original(self, *args, **kwargs)
            state.depth = 1
            try:
                try:
                    state.begin(args[0] if args else kwargs["scheduler_output"])
                except Exception as error:  # noqa: BLE001 - guarded inline: this runs at every step
                    guard.failed("vllm.execute_model", error)
                output = original(self, *args, **kwargs)
            except BaseException:
                guard.call("vllm.execute_model", state.abandon)
                raise
            finally:
                state.depth = 0
            try:
                state.forward_end(output is None)
            except Exception as error:  # noqa: BLE001
                guard.failed("vllm.execute_model", error)
            return output

        return execute_model

    return make


def _wrap_sample_tokens(probe: Probe, workers: _Workers) -> _Maker:
    guard = probe.guard

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active else None
            if state is None or not state.armed or state.depth or guard.inert:
                return original(self, *args, **kwargs)
            state.depth = 1
            try:
                try:
                    state.sample_start()
                except Exception as error:  # noqa: BLE001
                    guard.failed("vllm.sample_tokens", error)
                output = original(self, *args, **kwargs)
            except BaseException:
                guard.call("vllm.sample_tokens", state.abandon)
                raise
            finally:
                state.depth = 0
            try:
                state.sample_end()
            except Exception as error:  # noqa: BLE001
                guard.failed("vllm.sample_tokens", error)
            return output

        return sample_tokens

    return make


def _wrap_dummy_batch(probe: Probe, workers: _Workers) -> _Maker:
    guard = probe.guard

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active and probe.active else None
            if state is None or not state.armed or state.depth:
                return original(self, *args, **kwargs)
            state.depth = 1
            try:
                guard.call("vllm.execute_dummy_batch", state.begin, None)
                output = original(self, *args, **kwargs)
            except BaseException:
                guard.call("vllm.execute_dummy_batch", state.abandon)
                raise
            finally:
                state.depth = 0
            guard.call("vllm.execute_dummy_batch", state.forward_end, False)
            return output

        return execute_dummy_batch

    return make


def _wrap_initialize(probe: Probe, workers: _Workers) -> _Maker:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active and probe.active else None
            if state is not None:
                config = args[0] if args else next(iter(kwargs.values()), None)
                probe.guard.call("vllm.initialize_from_config", state.kv_cache, config)
            return original(self, *args, **kwargs)

        return initialize_from_config

    return make


def _wrap_warm_up(probe: Probe, workers: _Workers) -> _Maker:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active and probe.active else None
            if state is None or state.depth:
                return original(self, *args, **kwargs)
            state.disarm()
            state.depth = 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                state.depth = 0
            probe.guard.call("vllm.arm", state.arm, self)
            return result

        return compile_or_warm_up_model

    return make


_WRAPPERS: dict[str, Callable[[Probe, _Workers], _Maker]] = {
    "execute_model": _wrap_execute_model,
    "sample_tokens": _wrap_sample_tokens,
    "execute_dummy_batch": _wrap_dummy_batch,
    "initialize_from_config": _wrap_initialize,
    "compile_or_warm_up_model": _wrap_warm_up,
}
