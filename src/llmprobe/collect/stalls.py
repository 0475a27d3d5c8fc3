"""Whether a rank has stopped getting on, from its journal's begin records."""

from __future__ import annotations

import dataclasses

from llmprobe.collect.process import Rank
from llmprobe.compute import stall
from llmprobe.compute.intervals import Intervals
from llmprobe.compute.stall import Stall

_RECENT = 1000  # steps that say how long a step takes
_LEAST_NS = round(stall.LEAST_SECONDS * 1e9)


def find_stall(rank: Rank, pending: Intervals | None, now_ns: int, engine: int | None = None) -> Stall | None:
    """The stall that a live rank is in; None while it gets on, or has nothing to do.

    Args:
        rank: the rank.
        pending: when its engine had unfinished requests; None where nobody tells.
        now_ns: CLOCK_MONOTONIC.
        engine: the rank's engine, if that has to be said.
    """
    progress = rank.process.progress if rank.process.alive else None
    if progress is None:
        return None
    running = rank.running_since()
    newest = rank.newest()
    last_end = 0 if newest is None else int(newest["e3"])
    if now_ns - max(running or 0, last_end) < _LEAST_NS:
        return None  # as nearly always: nothing else need be looked at
    open_spans = pending[pending[:, 1] > now_ns] if pending is not None else None
    since = int(open_spans[-1, 0]) if open_spans is not None and len(open_spans) else None
    found = stall.find(
        begun=progress.begun,
        begun_ns=progress.time,
        # A step that was given up ended as far as this is concerned.
        ended=max(progress.ended, rank.last_step or 0),
        phase=progress.phase,
        tokens=progress.tokens,
        recent=rank.recent(_RECENT),
        now_ns=now_ns,
        pending_since_ns=since,
        pending_known=pending is not None,
    )
    return None if found is None else dataclasses.replace(found, engine=engine)
