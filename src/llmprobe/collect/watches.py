"""The host watch of every worker and program that is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmprobe.collect.host import HostTotals, HostWatch, lock_holder
from llmprobe.collect.process import Process
from llmprobe.compute.host import HostSignals


class Watches:
    """One `HostWatch` a live process, sampled together. Not thread-safe."""

    def __init__(self) -> None:
        self._watches: dict[Path, HostWatch] = {}
        self._saved: dict[str, Any] = {}

    def sample(self, processes: Iterable[Process], now_ns: int) -> None:
        """Look at every live worker and program; forget the others."""
        living = {
            process.path: process for process in processes if process.alive and process.role != "frontend"
        }
        self._watches = {path: watch for path, watch in self._watches.items() if path in living}
        for path, process in living.items():
            if path not in self._watches and not self._begin(process):
                continue
            self._watches[path].sample(now_ns)

    def _begin(self, process: Process) -> bool:
        pid = lock_holder(process.reader.fileno())
        if pid is None:  # our own locks are not shown to us, nor those of another namespace
            return False
        watch = self._watches[process.path] = HostWatch(pid, started=process.facts.get("started"))
        if saved := self._saved.pop(process.identity, None):
            watch.restore(saved)
        return True

    def signals(self, process: Process) -> HostSignals | None:
        """The last 10 s of one process; None while nothing is known."""
        watch = self._watches.get(process.path)
        return watch.signals() if watch is not None else None

    def totals(self, process: Process) -> HostTotals | None:
        """What one process used so far; None while nothing is known."""
        watch = self._watches.get(process.path)
        return watch.totals() if watch is not None else None

    def save(self, processes: Iterable[Process]) -> dict[str, Any]:
        """What an agent that starts anew needs so that totals go on, by the processes' identities."""
        return {
            process.identity: self._watches[process.path].save()
            for process in processes
            if process.path in self._watches
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """From `save`, before the first `sample`."""
        self._saved = saved
