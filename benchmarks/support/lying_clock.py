"""Makes llmprobe's step clock of this process lie while it is told to: spans are a share of what they are.

A step keeps its start, so what its span loses is said to be a gap after it. The device and the engine are as
they were. Workers load it with ``--worker-extension-cls support.lying_clock.Extension``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from llmprobe.record.clock import HostClock, Stamps
from llmprobe.record.cuda_clock import CudaClock
from support import slow_host


def shorten(stamps: Stamps, ratio: float) -> None:
    """Every mark that was set moves to that share of its distance from the first one."""
    start = stamps.ns[0]
    stamps.ns = [start + round((at - start) * ratio) if at else 0 for at in stamps.ns]


def make_clocks_lie() -> None:
    """From now on, whenever `slow_host.CLOCK_VARIABLE`'s file says so."""
    place, harvest = CudaClock._place, HostClock.harvest

    def lying_place(self: CudaClock, stamps: Stamps) -> None:
        place(self, stamps)
        if ratio := slow_host.told(slow_host.CLOCK_VARIABLE):
            shorten(stamps, ratio)

    def lying_harvest(self: HostClock, most: int = sys.maxsize) -> list[Any]:
        done = harvest(self, most)
        if ratio := slow_host.told(slow_host.CLOCK_VARIABLE):
            for stamps in done:
                shorten(stamps, ratio)
        return done

    CudaClock._place = lying_place  # type: ignore[method-assign]
    HostClock.harvest = lying_harvest  # type: ignore[method-assign]


class Extension:
    """Adds nothing to vLLM's worker: vLLM imports this module for it, in the process that has the clock."""


if os.environ.get(slow_host.CLOCK_VARIABLE):
    make_clocks_lie()
