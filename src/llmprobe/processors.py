"""How our own processes and threads share the processors with the engine: beside it, and giving way to it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

#: Variables on which OpenMP binds the thread that loads it.
_PINNED_BY_OPENMP = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")


def own_group() -> dict[str, Any]:
    """Arguments of `subprocess.Popen` that make the child the leader of a process group in our session.

    Signals to our group pass it by. A session of its own does that too, but Linux hands out processor time
    session by session where no control group does it (autogroup, sched(7)): a nice value then counts only
    among the processes of one session.
    """
    if sys.version_info >= (3, 11):
        return {"process_group": 0}
    return {"preexec_fn": os.setpgrp}


def allowed(started_by_engine: bool = False) -> frozenset[int]:
    """The processors that this process was given; empty where the system has no such thing.

    To be asked early: later, engines pin threads. A worker of vLLM-CPU is pinned by OpenMP before any code of
    ours runs; its parent was not.

    Args:
        started_by_engine: this process's parent belongs to the same program.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    with contextlib.suppress(OSError):
        if started_by_engine and any(name in os.environ for name in _PINNED_BY_OPENMP):
            return frozenset(os.sched_getaffinity(os.getppid()))
    return frozenset(os.sched_getaffinity(0))


def run_on(processors: frozenset[int]) -> None:
    """Let the calling thread, and what it starts, run on ``processors`` as far as that is allowed."""
    if processors:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, processors)
