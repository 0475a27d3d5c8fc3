"""vLLM's scheduler with a host that takes its time: it sleeps before each step, for as long as it is told.

Given to the engine with ``--scheduler-cls support.slow_scheduler.SlowScheduler`` and this folder's parent on
PYTHONPATH. The device has nothing to do meanwhile, and the engine uses no processor: time between steps that
nothing but the injection explains.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from support import slow_host


class SlowScheduler(Scheduler):
    """Schedules as vLLM does, later."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if seconds := slow_host.told():
            time.sleep(seconds)
        return super().schedule(*args, **kwargs)
