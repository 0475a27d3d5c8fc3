"""An engine that has one core, and has to share it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llmprobe.demo.server import VllmServer
from support.journals import live_journals

#: Ends with whoever started it.
_BURN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
_BURNERS = 6


@contextlib.contextmanager
def one_busy_core(server: VllmServer) -> Iterator[None]:
    """The engine's threads may use one core, and some programs that never wait use it too."""
    (engine,) = {int(reader.facts()["pid"]) for reader in live_journals(server.directory, "worker")}
    threads = [int(path.name) for path in Path(f"/proc/{engine}/task").iterdir()]
    before: dict[int, set[int]] = {}
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            before[thread] = os.sched_getaffinity(thread)
    core = {min(os.sched_getaffinity(engine))}
    burners = [subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(_BURNERS)]
    try:
        for pid in (*before, *(burner.pid for burner in burners)):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(pid, core)
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        for thread, cores in before.items():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores)
