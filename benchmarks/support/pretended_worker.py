"""Steps of a pretended vLLM worker, over and not yet written: what its housekeeping thread finds."""

from __future__ import annotations

import time

from llmprobe.hooks.guard import Guard
from llmprobe.hooks.vllm.records import StepRecords
from llmprobe.record.clock import HostClock
from llmprobe.record.recorder import Recorder

_STEP_NS = 8_000_000
_CONTEXT = 500


class WorkerSteps:
    """Decode steps of so many requests. On the host's clock: asking for events of a device is not in them."""

    def __init__(self, recorder: Recorder, requests: int) -> None:
        self._clock, self._records = HostClock(), StepRecords(Guard())
        self._records.use(self._clock, recorder)
        self._ids = [f"cmpl-{number:032x}-0" for number in range(requests)]
        self._number = 0

    def leave(self, steps: int) -> None:
        """So many more are over. Containers are new at each, as vLLM's are."""
        for _ in range(steps):
            self._number += 1
            begin, ids = time.monotonic_ns(), list(self._ids)
            computed = [_CONTEXT + self._number + row for row in range(len(ids))]
            row = (self._number, begin, (), len(ids), ids, computed, None, (), dict[str, int](), None)
            self._records.unread.rows.append(row)
            stamps = self._clock.begin(row)
            stamps.ns = [begin, 0, 0, begin + _STEP_NS]
            self._clock.finish(stamps)

    def write(self) -> None:
        """As the housekeeping thread calls it."""
        self._records.write()
