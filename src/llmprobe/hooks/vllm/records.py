"""From stamps and scheduler outputs to records: the steps of one vLLM worker that are over, read and written.

Runs in the housekeeping thread. Only when that has not come for long does the step path lend a hand.
"""

from __future__ import annotations

import sys
import threading

from llmprobe.hooks.guard import Guard
from llmprobe.hooks.vllm.unread import Row, Unread
from llmprobe.record.clock import Stamps, StepClock
from llmprobe.record.events import CountedStep
from llmprobe.record.layout import Flag
from llmprobe.record.recorder import Recorder

_RESTARTED = int(Flag.RESTARTED)


class StepRecords:
    """What one worker's steps become once they are complete.

    The payload of a step's stamps is its row (`llmprobe.hooks.vllm.unread`).
    """

    def __init__(self, guard: Guard) -> None:
        self.unread = Unread(guard.failed)
        self._guard = guard
        self._clock: StepClock | None = None
        self._recorder: Recorder | None = None
        self._writing = threading.Lock()  # only ever tried, never waited for
        self._last_number = 0
        self._dropped = 0  # steps that the clock has lost, as the recorder was told

    def use(self, clock: StepClock, recorder: Recorder) -> None:
        """From here on, steps of ``clock`` go to ``recorder``."""
        self._clock, self._recorder, self._dropped = clock, recorder, clock.dropped

    def write(self, most: int = sys.maxsize) -> None:
        """Write the steps that are complete on the device, the first ``most`` of them."""
        recorder, clock = self._recorder, self._clock
        if recorder is None or clock is None or not self._writing.acquire(False):
            return
        try:
            steps, packed = list[CountedStep](), list[bytes]()
            for stamps in clock.harvest(most):
                if self._guard.inert:
                    break
                try:
                    step = self._step(clock, stamps)
                    if step is not None:
                        packed.append(step.packed())
                        steps.append(step)
                except Exception as error:  # noqa: BLE001 - the others are good
                    clock.dropped += 1
                    self._guard.failed("vllm.harvest", error)
            before = recorder.writer.written
            try:
                recorder.steps(steps, packed)
            except Exception as error:  # noqa: BLE001 - on the step path too, when this thread is late
                clock.dropped += max(len(steps) - (recorder.writer.written - before), 0)
                self._last_number = -1  # the next one follows lost ones
                self._guard.failed("vllm.harvest", error)
        finally:
            self._writing.release()

    def describe(self, row: Row) -> None:
        """Tell readers what the running step works on. Not on the step path."""
        recorder = self._recorder
        if recorder is None or not self._writing.acquire(False):
            return
        try:
            batch = self.unread.batch(row)
            if batch is not None:
                recorder.describe(row[0], batch.phase, batch.tokens)
        finally:
            self._writing.release()

    def tell_lost(self) -> None:
        """Tell readers of steps that were not recorded. Not on the step path."""
        recorder, clock = self._recorder, self._clock
        if recorder is not None and clock is not None and (dropped := clock.dropped) > self._dropped:
            recorder.lost(dropped - self._dropped)
            self._dropped = dropped

    def _step(self, clock: StepClock, stamps: Stamps) -> CountedStep | None:
        row, flags = stamps.payload, stamps.flags
        stamps.payload = None  # the clock may have them until the next round, and it holds vLLM's containers
        number, time_ns = row[0], row[1]
        batch = self.unread.take(row)
        if batch is None:
            clock.dropped += 1
            return None
        if stamps.restarted or number != self._last_number + 1:
            flags |= _RESTARTED
        self._last_number = number
        phase, counts, attention = batch
        return CountedStep(
            number, time_ns, phase, clock.kind, flags, stamps.times, counts, attention, stamps.own_ns,
            0, 0, stamps.encode_ns,
        )  # fmt: skip
