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


def take_programs_cpus(process: int = 0) -> None:
    """Let the calling thread run where the program may, not only where one process of it does.

    Engines pin workers to processors that their threads then fill, and what a worker starts inherits that: a
    daemon there answers no one for minutes, a thread there takes what the engine's own needs. The leader of a
    worker's process group is the program as its operator started it, with the processors that it was given.

    Args:
        process: of the program; the calling one if 0.
    """
    with contextlib.suppress(OSError):
        program = os.sched_getaffinity(os.getpgid(process))
        os.sched_setaffinity(0, program | os.sched_getaffinity(0))
