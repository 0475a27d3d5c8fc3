"""Child processes that signals to our group pass by, and that share the processors with us as they should.

A session of its own does the first as well, but Linux hands out processor time session by session where no
control group does it (autogroup, sched(7)): a nice value then counts only among the processes of one session.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def own_group() -> dict[str, Any]:
    """Arguments of `subprocess.Popen` that make the child the leader of a process group in our session."""
    if sys.version_info >= (3, 11):
        return {"process_group": 0}
    return {"preexec_fn": os.setpgrp}
