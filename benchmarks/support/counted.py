"""A steady load's traffic: what llmprobe's model says was moved, beside what the DRAM counter saw."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llmprobe.collect.collector import Collector
from llmprobe.collect.views import RankView
from llmprobe.record.layout import Phase
from support import gpm
from support.accuracy_table import COUNTED_SECONDS
from support.journals import StepLog
from support.load import Load

_STEADY_STEPS, _STEADY_SECONDS = 12, 60.0


def wait_steady(load: Load, log: StepLog, batch: int) -> None:
    """Until the last steps are decode steps of so many requests. Raises RuntimeError.

    Steps that began before the call do not count, whenever they are read: those of another load may look the
    same.
    """
    since = time.monotonic_ns()
    until = time.monotonic() + _STEADY_SECONDS
    while time.monotonic() < until:
        load.wait(0.25)
        steps = log.steps()
        last = steps[steps["time"] >= since][-_STEADY_STEPS:]
        if (
            len(last) == _STEADY_STEPS
            and ((last["phase"] == Phase.DECODE) & (last["requests"] == batch)).all()
        ):
            return
    raise RuntimeError(f"no steady decode of {batch} requests within {_STEADY_SECONDS:.0f} s")


def counted(collector: Collector, load: Load) -> list[tuple[float | None, float | None]]:
    """Of each rank over some seconds: its MBU by the journal, and what the DRAM counter of its GPU says.

    Ranks and GPUs in order: the first rank is taken to use the first GPU that CUDA shows, and so on.
    """
    before = _ranks(collector)
    with gpm.Counters(len(before)) as counters:
        load.wait(COUNTED_SECONDS)
    after = _ranks(collector)
    bandwidth = gpm.bandwidth() if counters.each else 0.0
    found: list[tuple[float | None, float | None]] = []
    for number, (first, last) in enumerate(zip(before, after, strict=True)):
        moved, took = last[0] - first[0], last[1] - first[1]
        dram = counters.each[number].get("dram") if number < len(counters.each) else None
        found.append((moved / took / bandwidth if took and bandwidth else None, dram))
    return found


def ranks(collector: Collector) -> Sequence[RankView]:
    """Of the one server there is, as fresh as its journals; in order."""
    collector.tick(final=True)
    (view,) = collector.views()
    return sorted(view.ranks, key=lambda rank: rank.rank)


def _ranks(collector: Collector) -> list[tuple[float, float]]:
    """Of each rank: bytes that its steps moved so far, and how long they took, idle time included."""
    return [
        (
            sum(count for kinds in rank.bytes.values() for count in kinds.values()),
            sum(seconds for phase in rank.device_time.values() for seconds in phase.values()),
        )
        for rank in ranks(collector)
    ]
