"""Whether a rank has stopped getting on, from its journal's begin records."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmprobe.collect.process import Rank
from llmprobe.compute import stall
from llmprobe.compute.intervals import Intervals, overlap_ns
from llmprobe.compute.stall import RunningStep, Stall
from llmprobe.compute.steady import WINDOW_SECONDS
from llmprobe.compute.steps import PHASES

_RECENT = 1000  # steps that say how long a step takes
_WINDOW_NS = round(WINDOW_SECONDS * 1e9)
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
    since = _pending_since(pending, now_ns)
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


def running_step(rank: Rank, pending: Intervals | None, now_ns: int) -> RunningStep | None:
    """The step that a live rank is in; None where there is none.

    Args:
        rank: the rank.
        pending: when its engine had unfinished requests; None where nobody tells: a step is then itself work.
        now_ns: CLOCK_MONOTONIC.
    """
    progress, since = rank.process.progress, rank.running_since()
    if progress is None or since is None or not rank.process.alive:
        return None
    phase = PHASES[progress.phase] if progress.phase < len(PHASES) else None
    begin = min(max(since, now_ns - _WINDOW_NS), now_ns)
    worked = now_ns - begin
    if pending is not None:  # requests may come and go while a step hangs: at one look none may be there
        worked = int(overlap_ns(pending, np.array([begin]), np.array([now_ns]))[0])
    return RunningStep(phase, max(now_ns - since, 0) / 1e9, worked / 1e9)


def _pending_since(pending: Intervals | None, now_ns: int) -> int | None:
    """Since when requests have been unfinished; None if none is, or nobody tells."""
    if pending is None:
        return None
    open_spans = pending[pending[:, 1] > now_ns]
    return int(open_spans[-1, 0]) if len(open_spans) else None
