"""How our own processes and threads share the processors with the engine: beside it, and giving way to it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


def own_group() -> dict[str, Any]:
    """Arguments of `subprocess.Popen` that make the child the leader of a process group in our session.

    Signals to our group pass it by. A session of its own does that too, but Linux hands out processor time
    session by session where no control group does it (autogroup, sched(7)): a nice value then counts only
    among the processes of one session.
    """
    if sys.version_info >= (3, 11):
        return {"process_group": 0}
    return {"preexec_fn": os.setpgrp}


def allowed() -> frozenset[int]:
    """The processors that the calling thread may run on; empty where the system has no such thing."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def run_on(processors: frozenset[int]) -> None:
    """Let the calling thread, and what it starts, run on ``processors`` as far as that is allowed."""
    if processors:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, processors)
