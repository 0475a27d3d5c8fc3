"""The host watch of every process that is read, and of engine cores, which may have one without a journal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmprobe.collect import procfs
from llmprobe.collect.host import HostTotals, HostWatch, lock_holder
from llmprobe.collect.host_cpu import ENGINE_CORE, FRONT_END, Used
from llmprobe.collect.process import Process
from llmprobe.compute.host import HostSignals, together


class Watches:
    """One `HostWatch` a live process, which may have several journals. Not thread-safe."""

    def __init__(self) -> None:
        self._watches: dict[Path, HostWatch] = {}
        self._cores: dict[Path, HostWatch] = {}  # by the journal of a worker that the core started
        self._engines: set[int] = set()  # pids of workers, of their cores, and of programs
        self._saved: dict[str, Any] = {}

    def sample(self, processes: Iterable[Process], now_ns: int) -> None:
        """Look at every live process; forget the others."""
        living = {process.path: process for process in processes if process.alive}
        self._watches = {path: watch for path, watch in self._watches.items() if path in living}
        self._cores = {path: watch for path, watch in self._cores.items() if path in living}
        # Front ends last: one that lives in an engine's process shares the engine's watch.
        for path, process in sorted(living.items(), key=lambda item: item[1].role == "frontend"):
            if path not in self._watches:
                self._begin(process)
        self._engines = {
            watch.pid for path, watch in self._watches.items() if living[path].role != "frontend"
        }.union(watch.pid for watch in self._cores.values())
        for watch in {id(watch): watch for watch in self._all()}.values():
            watch.sample(now_ns)

    def _all(self) -> Iterable[HostWatch]:
        return itertools.chain(self._watches.values(), self._cores.values())

    def _begin(self, process: Process) -> None:
        pid = lock_holder(process.reader.fileno())
        if pid is None:  # our own locks are not shown to us, nor those of another namespace
            return
        watch = self._known(pid)
        if watch is None:
            watch = HostWatch(pid, started=process.facts.get("started"))
            if saved := self._saved.pop(process.identity, None):
                watch.restore(saved)
        self._watches[process.path] = watch
        core = core_of(pid, process.facts)
        if core is not None:
            # It began before its worker did: whoever began later has only its number.
            self._cores[process.path] = self._known(core) or HostWatch(
                core, started=process.facts.get("started")
            )

    def _known(self, pid: int) -> HostWatch | None:
        return next((watch for watch in self._all() if watch.pid == pid and not watch.problem), None)

    def signals(self, process: Process) -> HostSignals | None:
        """The last 10 s of one process, and of its engine's core; None while nothing is known."""
        watch, core = self._watches.get(process.path), self._cores.get(process.path)
        if watch is None:
            return None
        return together(watch.signals(), None if core is None else core.signals())

    def front_end(self, process: Process) -> HostSignals | None:
        """Likewise of a front end with a process of its own: beside an engine its time is not told apart.

        An engine's core spins while its workers work, in whichever processes these are. A front end that does
        not say that its process holds none is taken to hold one.
        """
        watch = self._watches.get(process.path)
        if watch is None or process.role != "frontend" or watch.pid in self._engines:
            return None
        return watch.signals() if process.facts.get("engine_core_inside") is False else None

    def totals(self, process: Process) -> HostTotals | None:
        """What one process used so far; None while nothing is known."""
        watch = self._watches.get(process.path)
        return watch.totals() if watch is not None else None

    def beside_ranks(self, processes: Iterable[Process]) -> tuple[dict[str, Used], set[str]]:
        """What processes of one view used that are no rank's, and which are: for `HostCpu.update`."""
        used: dict[str, Used] = {}
        ranks: set[str] = set()
        for process in processes:
            watch, core = self._watches.get(process.path), self._cores.get(process.path)
            if watch is not None and process.role == "frontend":
                _add(used, watch, FRONT_END)
            elif watch is not None:
                ranks.add(watch.identity)
            # One beside its front end is part of that, whichever of them was found first.
            if core is not None and core.identity not in used:
                _add(used, core, ENGINE_CORE)
        return {process: of for process, of in used.items() if process not in ranks}, ranks

    def save(self, processes: Iterable[Process]) -> dict[str, Any]:
        """What an agent that starts anew needs so that totals go on, by the processes' identities."""
        return {
            process.identity: self._watches[process.path].save()
            for process in processes
            if process.path in self._watches and process.role != "frontend"  # nobody shows their totals
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """From `save`, before the first `sample`."""
        self._saved = saved


def _add(used: dict[str, Used], watch: HostWatch, kind: str) -> None:
    seconds = watch.cpu_seconds
    if seconds is not None:
        used[watch.identity] = Used(kind, seconds)


def core_of(worker: int, facts: Mapping[str, Any], root: Path = Path("/")) -> int | None:
    """The process of a worker's engine core in *this* namespace, if it is not the worker's own.

    It started the worker, which tells its pid. A parent of that number is the core as long as the worker
    lives: one that ended leaves its children to another.
    """
    said = facts.get("engine_core_pid")
    if not isinstance(said, int):
        return None
    try:
        parent = procfs.parent(procfs.read(root / "proc" / str(worker) / "stat"))
        if parent != said:  # the worker may be in a namespace of its own, where numbers are others
            own = procfs.innermost_pid(procfs.read(root / "proc" / str(parent) / "status"))
            return parent if own == said else None
    except (OSError, ValueError):
        return None
    return parent
