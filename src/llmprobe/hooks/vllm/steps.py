"""The steps of one vLLM worker: from when it has warmed up until it is gone.

What runs in every step is in `StepPath`; what steps become once they are over, in `StepRecords`.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

from llmprobe.hooks.vllm import facts, seams
from llmprobe.hooks.vllm.step_path import SEAM_MISSED_AT_MOST, UNSEEN_AT_MOST, StepPath
from llmprobe.hooks.vllm.unread import NO_ROW
from llmprobe.hooks.vllm.worker_facts import worker_facts
from llmprobe.record.clock import StepClock
from llmprobe.record.clocks import no_clock, step_clock
from llmprobe.record.recorder import Recorder
from llmprobe.settings import logger

_IDLE_NS = 100_000_000
_SEAM_GIVEN_UP = (
    f"the place where the forward pass begins was not passed in {SEAM_MISSED_AT_MOST} steps: "
    "gaps are lower bounds"
)


class WorkerSteps(StepPath):
    """What llmprobe keeps about one worker: its clock, its requests, the step in progress."""

    _kv_cache_config: Any = None
    _home = 0  # the engine's thread

    def kv_cache(self, config: Any) -> None:
        """The worker's KV cache has been laid out."""
        self._kv_cache_config = config

    def arm(self, worker: Any) -> None:
        """Warm-up is over: from the next step on, record. Not on the step path."""
        probe = self._probe
        runner = worker.model_runner
        seam, encoder = seams.forward_start(runner), seams.encoder(runner)
        # vLLM captures graphs in its warm-up, through other methods; preparing a step would break a capture.
        clock = step_clock(worker.device, in_captures=False)
        if clock is None:
            logger().warning("%s", no_clock(worker.device))
            return
        said: list[dict[str, Any]] = []

        def say() -> dict[str, Any]:
            said.append(worker_facts(probe, worker, clock.name, seam, self._kv_cache_config))
            return said[-1]

        recorder = probe.arm("worker", say)
        if recorder is None:
            return
        if not said:  # warmed up again, or another engine of this process before it
            recorder.update_facts(**say())
        self.use(clock, recorder, seam, encoder)
        kv = (recorder.facts.get("model") or {}).get("kv") or {"groups": []}
        self._unread.start(facts.windows(kv))
        self.armed = True
        if self.write not in probe.writers:
            probe.writers.append(self.write)
        logger().info(
            "armed on vLLM %s, %s runner, rank %d",
            recorder.facts["framework_version"],
            recorder.facts["runner"],
            worker.rank,
        )

    def use(
        self,
        clock: StepClock,
        recorder: Recorder,
        seam: seams.Seam | None,
        encoder: seams.Seam | None = None,
    ) -> None:
        """Stamp steps with ``clock``, write them to ``recorder``.

        Args:
            seam: where a forward starts.
            encoder: what runs before it in a multimodal model.
        """
        if self._recorder is not None:
            self._recorder.steps_begun.leave(self)
        self._clock, self._recorder, self._seam = clock, recorder, seam
        self._spare, self._finish, self._record, self._stream = None, clock.finish, clock.record, None
        self._row = (recorder.begun, *NO_ROW[1:])  # numbers go on from there
        recorder.steps_begun.join(self)
        self._home = threading.get_ident()
        self._immediate = self._parts = clock.immediate
        self._unseen_most = UNSEEN_AT_MOST if clock.elsewhere else -1
        self._seam_missed = 0, 0
        self._records.use(clock, recorder)
        running = self._running
        for at, wrapped in ((seam, seams.entering), (encoder, seams.encoding)):
            if at is not None:
                self._probe.patch(at.owner, at.name, functools.partial(wrapped, running))

    def disarm(self) -> None:
        """Warm-up begins again: what runs now is not serving."""
        self.abandon()
        self.write()
        self.armed = False

    def forget(self) -> None:
        """The worker is gone. Called in whatever thread dropped it, or called `llmprobe.disable`."""
        recorder, here = self._recorder, threading.get_ident() == self._home
        if here and recorder is not None and not recorder.closed:
            self._probe.guard.call("vllm.forget", self.write)
        self.armed = False
        if recorder is not None:
            recorder.steps_begun.leave(self)
        if self._running.steps is self:
            self._running.steps = None
        probe = self._probe
        for calls, mine in (
            (probe.writers, self.write),
            (probe.on_paused, self._paused),
            (probe.on_resumed, self._resumed),
            (probe.open_ranges, self._in_range),
        ):
            if mine in calls:
                calls.remove(mine)  # type: ignore[arg-type]
        if not here and recorder is not None and not recorder.closed:
            # Who asks a device's clock gets its device as the current one: no thread of the host's.
            probe.writers.append(self._write_last)

    def _write_last(self) -> None:
        """What a worker that is gone has left. Runs in the housekeeping thread, once."""
        self._probe.writers.remove(self._write_last)
        self._records.write()
        self._records.tell_lost()

    def write(self) -> None:
        """Write the steps that are complete. Runs in the housekeeping thread, a few times a second.

        A clock that cannot be asked from here while the engine works is left to the engine's own thread.
        """
        clock = self._clock
        if not self.armed or clock is None:
            return
        self._unseen = 0
        if clock.elsewhere or (self._stamps is None and time.monotonic_ns() - self._row[1] > _IDLE_NS):
            self._records.write()
        if self._stamps is not None:
            self._records.describe(self._row)
        self._records.tell_lost()
        if self._seam_missed[0] >= SEAM_MISSED_AT_MOST and self._recorder is not None:
            self._seam_missed = 0, 0
            notes = self._recorder.facts.get("notes", ())
            self._recorder.update_facts(notes=[*notes, _SEAM_GIVEN_UP])
            logger().warning("%s", _SEAM_GIVEN_UP)
