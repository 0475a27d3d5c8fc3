"""vLLM's schedulers with a host that takes its time: they sleep before each step, as long as they are told.

Given to the engine with ``--scheduler-cls support.slow_scheduler.SlowScheduler`` and this folder's parent on
PYTHONPATH. The device has nothing to do meanwhile, and the engine uses no processor: time between steps that
nothing but the injection explains.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from support import slow_host


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
