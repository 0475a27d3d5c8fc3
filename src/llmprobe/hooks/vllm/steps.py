"""The steps of one vLLM worker: stamped while they run, read and written when they are over.

What runs on the engine's step path only stamps times and notes references. Reading a batch and packing a
record there costs several times what it costs elsewhere, because the model has just emptied the caches; see
docs/decisions/what-the-step-path-writes.md.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Any

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import server_name
from llmprobe.hooks.torch_model import device_facts
from llmprobe.hooks.vllm import facts, seams
from llmprobe.hooks.vllm.batch import DUMMY, Batch, BatchReader, Noted, note
from llmprobe.record.clock import HOST_STEPS_KEPT, Stamps, StepClock, step_clock
from llmprobe.record.layout import PHASES, UNKNOWN_PHASE, Clock, Flag
from llmprobe.record.nvtx import FORWARD, SAMPLE, ranges
from llmprobe.record.recorder import Recorder
from llmprobe.settings import logger

STEP_METHODS = ("execute_model", "sample_tokens", "execute_dummy_batch")

_now = time.monotonic_ns
_HOST = int(Clock.HOST)
_IDLE_NS = 100_000_000
#: Steps wait for the housekeeping thread. If it does not come, the step path writes so many at a time.
_AT_ONCE = 4
_UNREAD_AT_MOST = 2 * HOST_STEPS_KEPT
#: On a device's clock a stamp is a CUDA event, which costs the engine some 4 us: where the forward ends and
#: sampling begins is stamped in every fifth step only (no multiple of two: steps may alternate).
_PARTS_EVERY = 5
_RESTARTED, _NO_SAMPLE, _NO_PARTS = int(Flag.RESTARTED), int(Flag.NO_SAMPLE), int(Flag.NO_PARTS)


class Step:
    """What came of one output of the scheduler, from when it came until it is written."""

    __slots__ = ("batch", "flags", "noted", "number", "own_ns", "reader", "time_ns")

    def __init__(self, number: int, time_ns: int, noted: Noted | None, reader: BatchReader) -> None:
        self.number = number  # 0: no step was made of it
        self.time_ns = time_ns
        self.noted = noted  # None for padding, which works on no request
        self.reader = reader
        self.batch: Batch | None = None  # until it is read
        self.flags = 0
        self.own_ns = 0

    def read(self) -> Batch:
        """Its batch; reads it the first time. Steps must be read in order."""
        if self.batch is None:
            self.batch = (self.reader.read(self.noted) if self.noted is not None else None) or DUMMY
            self.noted = None
        return self.batch


class Running:
    """Whose step is open in this process: the seam is a method that all workers share."""

    steps: WorkerSteps | None = None

    def forward_start(self) -> None:
        """The model is about to run."""
        if self.steps is not None:
            self.steps.forward_start()


class WorkerSteps:
    """What llmprobe keeps about one worker: its clock, its requests, the step in progress."""

    def __init__(self, probe: Probe, running: Running | None = None) -> None:
        """
        Args:
            running: shared by all workers of the process.
        """
        self._probe = probe
        self._running = running or Running()
        self._batches = BatchReader()
        self._kv_cache_config: Any = None
        self._clock: StepClock | None = None
        self._recorder: Recorder | None = None
        self._seam: seams.Seam | None = None
        found = ranges(probe.settings.nvtx)
        self._nvtx = found if found.listening else None
        self.depth = 0  # wrapped methods call each other through super()
        self.armed = False
        self._stamps: Stamps | None = None
        self._step: Step | None = None
        #: Outputs in order whose batch was not read, also those that made no step: requests begin and end
        #: in them all the same.
        self._unread: deque[Step] = deque(maxlen=_UNREAD_AT_MOST)
        self._begun_ns = 0
        self._own = 0
        self._marked = False
        self._parts = self._all_parts = True
        self._harvesting = threading.Lock()  # only ever tried, never waited for
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
        said: list[dict[str, Any]] = []

        def say() -> dict[str, Any]:
            said.append(self._facts(worker, clock, seam))
            return said[-1]

        recorder = probe.arm("worker", say)
        if recorder is None:
            return
        if not said:  # warmed up again, or another engine of this process before it
            recorder.update_facts(**say())
        self._recorder = recorder
        kv = (recorder.facts.get("model") or {}).get("kv") or {"groups": []}
        self._batches = BatchReader(facts.windows(kv))
        self._clock = clock
        self._all_parts = clock.kind == _HOST
        self._seam = seam
        if seam is not None:
            running = self._running
            probe.patch(
                seam.owner,
                seam.name,
                lambda original, patch: seams.entering(
                    running.forward_start, original, lambda: patch.active and running.steps is not None
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
        self.abandon()
        self.write()
        self.armed = False

    def forget(self) -> None:
        """The worker is gone."""
        self.armed = False
        if self.write in self._probe.writers:
            self._probe.writers.remove(self.write)

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
            f"{owner.__name__}.{name}" for owner, name in seams.methods(type(worker), STEP_METHODS)
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
        for line in said["notes"]:
            logger().warning("%s", line)
        return said

    def entered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``execute_model`` is entered."""
        entered = _now()
        noted = note(args[0] if args else kwargs["scheduler_output"])
        if noted.total:
            self._begin(entered, noted)
        else:  # nothing to run, but requests ended
            self._unread.append(Step(0, entered, noted, self._batches))

    def entered_dummy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``execute_dummy_batch`` is entered: padding, so that other data-parallel ranks can go on."""
        self._begin(_now(), None)

    def _begin(self, entered: int, noted: Noted | None) -> None:
        clock, recorder = self._clock, self._recorder
        if clock is None or recorder is None:
            return
        if self._generation != self._probe.generation:
            self._start_again(clock)
        if self._stamps is not None:  # the step before never came to its sampling
            self._close(_NO_SAMPLE)
        stamps = clock.begin(None)
        if stamps is None:
            self._unread.append(Step(0, entered, noted, self._batches))
            return
        number = recorder.begin(UNKNOWN_PHASE, noted.total if noted is not None else 0, entered)
        step = Step(number, entered, noted, self._batches)
        self._unread.append(step)
        if self._nvtx is not None:
            batch = self._read(step)
            self._nvtx.begin(PHASES[batch.phase], batch.tokens)
        self._step, self._stamps, self._begun_ns = step, stamps, entered
        self._parts = self._all_parts or number % _PARTS_EVERY == 0
        self._running.steps = self
        # Dummy batches go round the seam, and so does every step of a vLLM without one: their preparation
        # then counts as busy.
        self._marked = noted is None or self._seam is None
        if self._marked:
            if self._nvtx is not None:
                self._nvtx.part(FORWARD)
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
            if self._nvtx is not None:
                self._nvtx.part(FORWARD)
            self._clock.mark(stamps, 0)  # type: ignore[union-attr]
            self._own += _now() - entered
        except Exception as error:  # noqa: BLE001 - on vLLM's own call path
            self._probe.guard.failed("vllm.forward_start", error)

    def forward_end(self, output: Any) -> None:
        """``execute_model`` returned; with an output, no sampling call follows and the step ends with it."""
        entered = _now()
        stamps, clock = self._stamps, self._clock
        if stamps is None or clock is None:
            return
        if self._parts:
            clock.mark(stamps, 1)
        if self._nvtx is not None:
            self._nvtx.part(None)
        # Here a device has just been given its work, whether or not steps overlap.
        if clock.crowded:
            self._harvest(_AT_ONCE)
        self._own += _now() - entered
        if output is not None:
            self._close(_NO_SAMPLE)

    def dummy_end(self, output: Any) -> None:
        """``execute_dummy_batch`` returned."""
        if self._stamps is not None:
            self._close(_NO_SAMPLE)

    def sample_start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``sample_tokens`` is entered."""
        entered = _now()
        if self._stamps is not None and self._clock is not None:
            if self._nvtx is not None:
                self._nvtx.part(SAMPLE)
            if self._parts:
                self._clock.mark(self._stamps, 2)
            self._own += _now() - entered

    def sample_end(self, output: Any) -> None:
        """``sample_tokens`` returned: the step is over on the host."""
        if self._stamps is not None:
            self._close(0)

    def abandon(self) -> None:
        """The host's own call raised, or the model never ran: close the NVTX range and forget the step."""
        stamps, step = self._stamps, self._step
        self._stamps = self._step = self._running.steps = None
        if stamps is None or step is None or self._clock is None:
            return
        self._clock.discard(stamps)
        if self._nvtx is not None:
            self._nvtx.end()
        if self._recorder is not None:
            self._recorder.abandon(step.number)

    def _start_again(self, clock: StepClock) -> None:
        """Off and on again: requests came and went unseen."""
        self._generation = self._probe.generation
        self.abandon()  # the step in which it was switched off
        self._batches = BatchReader(self._batches.windows)
        clock.restart()

    def _close(self, flags: int) -> None:
        entered = _now()
        stamps, step, clock = self._stamps, self._step, self._clock
        if stamps is None or step is None or clock is None:
            return
        if not self._marked:
            self.abandon()
            return
        clock.mark(stamps, 3)
        self._stamps = self._step = self._running.steps = None
        if self._nvtx is not None:
            self._nvtx.end()
        step.flags = flags if self._parts else flags | _NO_PARTS
        stamps.payload = step
        # Before the clock has it: from then on another thread may write it.
        step.own_ns, self._own = self._own + _now() - entered, 0
        clock.finish(stamps)

    def write(self) -> None:
        """Write the steps that are complete. Runs in the housekeeping thread, a few times a second.

        A clock that cannot be asked from here while the engine works is left to the engine's own thread.
        """
        clock = self._clock
        if not self.armed or clock is None:
            return
        if clock.elsewhere or (self._step is None and _now() - self._begun_ns > _IDLE_NS):
            self._harvest()
        self._describe()

    def _harvest(self, most: int = sys.maxsize) -> None:
        """Write the steps that are complete on the device, the first ``most`` of them."""
        recorder, clock = self._recorder, self._clock
        if recorder is None or clock is None or not self._harvesting.acquire(False):
            return
        try:
            for stamps in clock.harvest(most):
                if self._probe.guard.inert:
                    break
                try:
                    self._record(recorder, clock.kind, stamps)
                except Exception as error:  # noqa: BLE001 - the others are good
                    clock.dropped += 1
                    self._probe.guard.failed("vllm.harvest", error)
        finally:
            self._harvesting.release()

    def _describe(self) -> None:
        """Tell readers what the running step works on. Not on the step path."""
        recorder, step = self._recorder, self._step
        if recorder is None or step is None or not self._harvesting.acquire(False):
            return
        try:
            batch = self._read(step)
            recorder.describe(step.number, batch.phase, batch.tokens)
        finally:
            self._harvesting.release()

    def _read(self, step: Step) -> Batch:
        """The batch of a step, once those before it are read."""
        while step.batch is None and self._unread:
            earlier = self._unread.popleft()
            if earlier is step:
                break
            try:
                earlier.read()
            except Exception as error:  # noqa: BLE001 - it is lost when its own turn comes
                self._probe.guard.failed("vllm.read", error)
        return step.read()

    def _record(self, recorder: Recorder, clock: int, stamps: Stamps) -> None:
        step: Step = stamps.payload
        batch = self._read(step)
        if stamps.restarted or step.number != self._last_number + 1:
            step.flags |= _RESTARTED
        self._last_number = step.number
        recorder.step_counted(
            step.number,
            step.time_ns,
            batch.phase,
            clock,
            step.flags,
            stamps.times,
            batch.counts,
            batch.attention,
            step.own_ns,
        )
