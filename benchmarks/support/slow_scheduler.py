"""vLLM's schedulers with a host that takes its time: they sleep before each step, as long as they are told.

Given to the engine with ``--scheduler-cls support.slow_scheduler.SlowScheduler`` and this folder's parent on
PYTHONPATH. The device has nothing to do meanwhile, and the engine uses no processor: time between steps that
nothing but the injection explains. With ``SCENARIO_CLOCK_RATIO`` set, llmprobe's clock of this process is
made to lie too: every span is that share of what it is.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from support import slow_host

CLOCK_VARIABLE = "SCENARIO_CLOCK_RATIO"


class SlowScheduler(Scheduler):
    """Schedules as vLLM does, later."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if seconds := slow_host.told():
            time.sleep(seconds)
        return super().schedule(*args, **kwargs)


class SlowAsyncScheduler(AsyncScheduler):
    """The same, with the next step prepared while one runs."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if seconds := slow_host.told():
            time.sleep(seconds)
        return super().schedule(*args, **kwargs)


def _make_the_clock_lie(ratio: float) -> None:
    from llmprobe.record.clock import CudaClock

    place = CudaClock._place

    def lying(self: CudaClock, stamps: Any) -> None:
        place(self, stamps)
        start = stamps.ns[0]
        stamps.ns = [start + round((at - start) * ratio) if at else 0 for at in stamps.ns]

    CudaClock._place = lying  # type: ignore[method-assign]


if os.environ.get(CLOCK_VARIABLE):
    _make_the_clock_lie(float(os.environ[CLOCK_VARIABLE]))
