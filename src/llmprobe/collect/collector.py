"""Follows every journal in a directory and keeps what is known about each server up to date."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.collect import checkpoint as checkpoints
from llmprobe.collect.front_ends import FrontEnds
from llmprobe.collect.grouping import Grouping
from llmprobe.collect.host_cpu import HostCpu
from llmprobe.collect.judge import Judge
from llmprobe.collect.missing import what_is_missing
from llmprobe.collect.process import PeaksOf, Pending, Process, Rank, no_peaks
from llmprobe.collect.rank_view import WINDOW_NS, rank_view, without_gaps
from llmprobe.collect.step_json import step_json
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.views import RankView, ServerView
from llmprobe.collect.watches import Watches
from llmprobe.compute import intervals
from llmprobe.compute.thresholds import Thresholds
from llmprobe.record.asked import Paths
from llmprobe.record.journal import JournalError, JournalVersionError, JournalWriter
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.window_file import window_path

log = logging.getLogger("llmprobe.agent")

_VIEW_EVERY_NS, _VIEW_EVERY_NS_A_RANK, _VIEW_AT_LATEST_NS = 10**9, 375_000_000, 3 * 10**9
_FACTS_EVERY_NS = 2 * 10**9
_DEAD_KEEP_NS = 30 * 10**9
#: Flags that depend on what a worker's attention backend can do.
_OF_GRAPHS = ("cudagraph_mode", "max_cudagraph_capture_size")


class Collector:
    """Reads journals; `tick` and `views` may be called from different threads."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        checkpoint: Path | None = None,
        peaks: PeaksOf = no_peaks,
        attainable: PeaksOf = no_peaks,
        thresholds: Thresholds | None = None,
        telemetry: Telemetry | None = None,
        notes: Sequence[str] = (),
        only_group: str | None = None,
        own_writers: Callable[[], dict[Path, JournalWriter]] = dict,
        remove_dead: bool = False,
        keep_dead: bool = False,
    ) -> None:
        """
        Args:
            directory: the shared directory (``Settings.directory``).
            clock: nanoseconds of CLOCK_MONOTONIC.
            checkpoint: file that carries derived counters over a restart.
            peaks: peak rates for a worker's facts, None where unknown.
            attainable: likewise, what its device was measured to attain.
            thresholds: of verdicts; the defaults if None.
            telemetry: looks at the ranks' GPUs; nobody does if None. Whoever made it closes it.
            notes: what every server's view says too.
            only_group: look at one server or program only.
            own_writers: gives the journals that this very process writes; see `JournalReader`.
            remove_dead: delete the journals of processes that died more than 30 s ago.
            keep_dead: keep processes in `views` however long ago they died, for a report at the end.
        """
        self._directory = directory / "journals"
        self._clock = clock
        self._checkpoint = checkpoint
        self._peaks = peaks
        self._attainable = attainable
        self._notes = notes
        self._only_group = only_group
        self._own_writers = own_writers
        self._remove_dead = remove_dead
        self._keep_dead = keep_dead
        self._lock = threading.Lock()
        self._processes: dict[Path, Process] = {}
        self._ranks: dict[Path, Rank] = {}
        self._pending: dict[Path, Pending] = {}
        self._grouping = Grouping()
        self._front_ends = FrontEnds()
        self._thresholds = thresholds or Thresholds()
        self._judge = Judge(self._thresholds)
        self._watches = Watches()
        self._host_cpu = HostCpu()
        self._telemetry = telemetry
        self._ignored: set[Path] = set()
        self._scanned_mtime = 0
        self._unread = False  # a journal that could not be opened yet
        #: By view and engine (None: of all its engines), as of this tick.
        self._unfinished: dict[tuple[str, int | None], intervals.Intervals | None] = {}
        self._views: list[ServerView] = []
        self._views_at = 0
        self._facts_at = 0
        saved = checkpoints.load(checkpoint)
        self._saved: dict[str, Any] = saved.get("ranks", {})
        self._saved_pending: dict[str, Any] = saved.get("pending", {})
        self._grouping.restore(saved.get("grouping", {}))
        self._front_ends.restore(saved.get("left", ()))
        self._judge.restore(saved.get("verdicts", {}))
        self._watches.restore(saved.get("hosts", {}))
        self._host_cpu.restore(saved.get("host_cpu", {}))

    def tick(self, final: bool = False) -> None:
        """Find journals, read what is new, account for it. ``final`` brings `views` up to date too."""
        with self._lock:
            now = self._clock()
            due = final or now - self._views_at >= self._view_every_ns()
            if due or self._folder_changed():
                self._discover()
            # Steps before front ends: whatever a step worked on is then known to have been pending.
            ready = [process for process in self._processes.values() if process.look(now) or due]
            for process in sorted(ready, key=lambda process: process.role != "worker"):
                self._poll(process, now)
            if due:
                self._views_at = now
                facts = final or now - self._facts_at >= _FACTS_EVERY_NS
                for process in self._processes.values():
                    process.refresh(facts)
                if facts:
                    self._facts_at = now
                    for rank in self._ranks.values():
                        rank.refresh()
                self._grouping.update(self._processes)
                self._unfinished = {}
                self._watches.sample(self._processes.values(), now)
                if self._telemetry is not None:
                    self._telemetry.watch(self._processes.values())
                for path, rank in self._ranks.items():
                    rank.fold(self._pending_of(path), now)
                self._forget(now)
                self._views = self._build_views(now, keep_dead=final or self._keep_dead)

    def _view_every_ns(self) -> int:
        """More ranks are looked at less often, so that the agent stays cheap beside many GPUs."""
        return min(max(len(self._ranks) * _VIEW_EVERY_NS_A_RANK, _VIEW_EVERY_NS), _VIEW_AT_LATEST_NS)

    def _poll(self, process: Process, now: int) -> None:
        records = process.poll(now)
        if rank := self._ranks.get(process.path):
            rank.take(records.steps)
        if pending := self._pending.get(process.path):
            pending.add(records.pending, process.load.unfinished if process.load is not None else 0)

    def views(self) -> list[ServerView]:
        """Every live server as of the last tick."""
        return self._views

    def alive(self) -> int:
        """How many live processes are being read."""
        return sum(process.alive for process in self._processes.values())

    def recent_steps(self, last: int) -> list[dict[str, Any]]:
        """The newest ``last`` steps of all ranks, JSON-ready, newest last."""
        with self._lock:
            rows = [(int(row["e3"]), rank, row) for rank in self._ranks.values() for row in rank.recent(last)]
        rows.sort(key=lambda item: item[0])
        return [
            step_json(rank.process, self._grouping.label_of(rank.process), row)
            for _, rank, row in rows[-last:]
        ]

    def save(self) -> None:
        """Write the checkpoint, if there is one to write."""
        if self._checkpoint is None:
            return
        with self._lock:
            ranks = {
                rank.process.identity: rank.save() for rank in self._ranks.values() if rank.process.alive
            }
            pending = {
                self._processes[path].identity: told.save()
                for path, told in self._pending.items()
                if self._processes[path].alive
            }
            text = checkpoints.dump(
                ranks=ranks,
                pending=pending,
                grouping=self._grouping.save(),
                left=self._front_ends.save(),
                verdicts=self._judge.save(),
                hosts=self._watches.save(self._processes.values()),
                host_cpu=self._host_cpu.save(),
            )
        checkpoints.write(self._checkpoint, text)

    def close(self) -> None:
        """Stop reading every journal."""
        with self._lock:
            for process in self._processes.values():
                process.close()
            self._processes.clear()
            self._ranks.clear()
            self._pending.clear()

    def _folder_changed(self) -> bool:
        """Whether a journal may have come since the folder was looked through last.

        Times of a folder may be coarse, so that it is looked through before each new view anyhow.
        """
        try:
            return self._unread or self._directory.stat().st_mtime_ns != self._scanned_mtime
        except OSError:
            return True

    def _discover(self) -> None:
        self._unread = False
        try:
            self._scanned_mtime = self._directory.stat().st_mtime_ns
            with os.scandir(self._directory) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(".journal")]
        except OSError:
            return
        known = {path.name for path in (*self._processes, *self._ignored)}
        for path in (self._directory / name for name in names if name not in known):
            try:
                reader = JournalReader(path, self._own_writers().get(path))
                process = Process(path, reader)
            except JournalVersionError as error:
                self._ignored.add(path)
                log.warning("%s: that process is not watched; give it and the agent the same llmprobe", error)
                continue
            except (JournalError, ValueError):
                self._unread = True
                continue  # still being made: looked at again next time
            if self._only_group is not None and process.group != self._only_group:
                reader.close()
                self._ignored.add(path)
                continue
            self._processes[path] = process
            if process.role != "worker":
                self._pending[path] = Pending()
                if spans := self._saved_pending.pop(process.identity, None):
                    self._pending[path].restore(spans)
            if process.role in ("worker", "program"):
                rank = Rank(process, self._peaks, self._attainable)
                if saved := self._saved.pop(process.identity, None):
                    rank.restore(saved)
                self._ranks[path] = rank

    def _pending_of(self, path: Path) -> intervals.Intervals | None:
        """When a rank's engine had unfinished requests, by its front ends; None if it has none.

        Engines that run dummy steps work in step: whichever of them has requests, all have to run. And where
        no front end speaks of the engine by its index, those of the whole server have to do.
        """
        key, engine = self._grouping.keys[path], self._processes[path].engine
        if not self._in_step(key):
            own = self._told(key, engine)
            if own is not None:
                return own
        return self._told(key, None)

    def _in_step(self, key: str) -> bool:
        ranks = (rank.process for path, rank in self._ranks.items() if self._grouping.keys[path] == key)
        return any(process.counters["steps_dummy"] for process in ranks)

    def _told(self, key: str, engine: int | None) -> intervals.Intervals | None:
        """When front ends of one view had unfinished requests, at one engine or at any."""
        if (key, engine) not in self._unfinished:
            told = []
            for other, pending in self._pending.items():
                process = self._processes[other]
                if self._grouping.keys[other] == key and engine in (None, process.engine):
                    spans = pending.spans()
                    # What a dead front end left open ended with it.
                    told.append(spans if process.alive else np.minimum(spans, process.died_ns))
            self._unfinished[key, engine] = intervals.union(*told) if told else None
        return self._unfinished[key, engine]

    def _forget(self, now: int) -> None:
        for pending in self._pending.values():
            pending.forget_before(now - 10 * WINDOW_NS)
        for path, process in list(self._processes.items()):
            if process.alive or self._keep_dead or now - process.died_ns < _DEAD_KEEP_NS:
                continue
            if process.role == "frontend":
                self._front_ends.leave(self._grouping.keys[path], process)
            process.close()
            self._processes.pop(path)
            self._grouping.forget(path)
            self._ranks.pop(path, None)
            self._pending.pop(path, None)
            self._ignored.add(path)
            if self._remove_dead:
                Paths.of(path).remove()
                for left in (path, window_path(path)):
                    with contextlib.suppress(OSError):
                        left.unlink()
        self._ignored = {path for path in self._ignored if path.exists()}
        living = self._grouping.living()
        self._front_ends.keep(living)
        self._judge.keep(living)
        self._host_cpu.keep(living)

    def _build_views(self, now: int, keep_dead: bool) -> list[ServerView]:
        groups: dict[str, list[Process]] = {}
        for path, process in self._processes.items():
            if process.alive or keep_dead:
                groups.setdefault(self._grouping.keys[path], []).append(process)
        views = {key: self._server(key, processes, now) for key, processes in groups.items()}
        in_order = sorted(views.items(), key=lambda item: item[1].started)
        self._grouping.shown(views)
        for key, view in in_order:
            view.server = self._grouping.label(key, view.server)
            self._judge.judge(key, view, self._ranks_of(view, groups[key]), now)
        return [view for _, view in in_order]

    def _ranks_of(self, view: ServerView, processes: list[Process]) -> list[tuple[RankView, Rank]]:
        """The view of each rank and where it comes from."""
        ranks = [self._ranks[process.path] for process in processes if process.path in self._ranks]
        return [(shown, rank) for shown in view.ranks for rank in ranks if rank.process.facts is shown.facts]

    def _server(self, key: str, processes: list[Process], now: int) -> ServerView:
        first = min(
            processes, key=lambda process: (process.role == "worker", process.facts.get("started", 0))
        )
        facts = first.facts
        found = [self._ranks[process.path] for process in processes if process.path in self._ranks]
        several = len({rank.process.engine for rank in found}) > 1
        ranks = [
            rank_view(rank, now, self._watches, self._telemetry, self._pending_of(rank.process.path), several)
            for rank in found
        ]
        capacity: dict[int, int] = {}
        for rank in ranks:
            if rank.kv_capacity_bytes is not None:
                capacity[rank.engine] = capacity.get(rank.engine, 0) + rank.kv_capacity_bytes
        fronts = [process for process in processes if process.role != "worker"]
        dead = [
            process
            for path, process in self._processes.items()
            if process.role == "frontend" and self._grouping.keys[path] == key and process not in fronts
        ]
        engines = self._front_ends.engines(
            key, fronts, dead, capacity, now, self._program_kv, self._watches.front_end
        )
        if not engines:
            ranks = [without_gaps(rank) for rank in ranks]
        missing = what_is_missing(ranks, engines, self._telemetry)
        notes = sorted({note for process in processes for note in process.facts.get("notes", ())})
        notes += [f"rank {rank.rank}: {note}" for rank in ranks if rank.gpu for note in rank.gpu.notes]
        notes += sorted({rank.peaks.caveat for rank in ranks if rank.peaks and rank.peaks.caveat})
        notes += self._notes
        loads = [process.load for process in processes if process.load is not None]
        return ServerView(
            server=str(facts.get("server", "")),
            own_label=str(facts.get("server", "")),
            model_name=str(facts.get("model_name", "")),
            group=first.group,
            journals=tuple(process.path for process in processes if process.alive),
            framework=str(facts.get("framework", "")),
            framework_version=str(facts.get("framework_version", "")),
            started=float(facts.get("started", 0.0)),
            armed=all(load.armed for load in loads),
            inert=any(load.inert for load in loads),
            flags=_flags(processes),
            engines=engines,
            ranks=sorted(ranks, key=lambda rank: (rank.engine, rank.rank)),
            missing=missing,
            notes=notes,
            host_cpu_seconds=self._host_cpu.update(key, *self._watches.beside_ranks(processes)),
            thresholds=self._thresholds,
        )

    def _program_kv(self, process: Process) -> int | None:
        """A program's cache as of its last step; nothing while nothing runs."""
        newest = self._ranks[process.path].newest() if process.path in self._ranks else None
        if newest is None or (process.load is not None and not process.load.running):
            return None
        return int(newest["kv_used_bytes"]) or None


def _flags(processes: Sequence[Process]) -> dict[str, Any]:
    """The engine's settings: as its first front end has them, of graphs as a worker settled them.

    Not as journals happen to be found: what is advised, and compared, would differ from time to time.
    """
    told = sorted(
        (process for process in processes if process.facts.get("flags")),
        key=lambda process: (process.role == "worker", process.facts.get("started", 0), process.identity),
    )
    found = dict(told[0].facts["flags"]) if told else {}
    worker = next((process for process in told if process.role == "worker"), None)
    if worker is not None:
        settled = {name: value for name, value in worker.facts["flags"].items() if name in _OF_GRAPHS}
        found = {name: value for name, value in found.items() if name not in _OF_GRAPHS} | settled
    return found
