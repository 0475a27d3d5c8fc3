"""Follows every journal in a directory and keeps what is known about each server up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.collect.process import Latencies, PeaksOf, Pending, Process, Rank, monotonic_to_unix
from llmprobe.collect.views import EngineView, HistogramView, RankView, ServerView
from llmprobe.compute import intervals
from llmprobe.compute.figures import summarise
from llmprobe.compute.hardware import Peaks
from llmprobe.record import layout
from llmprobe.record.journal import JournalError, JournalReader, JournalWriter

WINDOW_NS = 30 * 10**9
_VIEW_EVERY_NS = 10**9
_FACTS_EVERY_NS = 2 * 10**9
_DEAD_KEEP_NS = 30 * 10**9
_LATENCIES = (
    "time_to_first_token",
    "time_per_output_token",
    "inter_token_latency",
    "request_duration",
    "request_queue",
)
_CHECKPOINT_SCHEMA = 1
_JUST_BEGAN_SECONDS = 5.0


def _no_peaks(facts: dict[str, Any]) -> Peaks | None:
    return None


class Collector:
    """Reads journals; `tick` and `views` may be called from different threads."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        checkpoint: Path | None = None,
        peaks: PeaksOf = _no_peaks,
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
            only_group: look at one server or program only.
            own_writers: gives the journals that this very process writes; see `JournalReader`.
            remove_dead: delete the journals of processes that died more than 30 s ago.
            keep_dead: keep processes in `views` however long ago they died, for a report at the end.
        """
        self._directory = directory / "journals"
        self._clock = clock
        self._checkpoint = checkpoint
        self._peaks = peaks
        self._only_group = only_group
        self._own_writers = own_writers
        self._remove_dead = remove_dead
        self._keep_dead = keep_dead
        self._lock = threading.Lock()
        self._processes: dict[Path, Process] = {}
        self._ranks: dict[Path, Rank] = {}
        self._pending: dict[Path, Pending] = {}
        self._latencies: dict[tuple[str, int], Latencies] = {}
        self._left: dict[tuple[str, int], _FrontTotals] = {}  # of front ends no longer read
        self._keys: dict[Path, str] = {}
        self._split: set[str] = set()  # groups told apart by label, for their life
        self._alone: set[Path] = set()  # ranks that are a view of their own
        self._labels: dict[str, str] = {}
        self._ignored: set[Path] = set()
        self._views: list[ServerView] = []
        self._views_at = 0
        self._facts_at = 0
        saved = _load_checkpoint(checkpoint)
        self._saved: dict[str, Any] = saved.get("ranks", {})
        self._saved_pending: dict[str, Any] = saved.get("pending", {})
        for key, engine, totals in saved.get("left", ()):
            self._left[key, engine] = _FrontTotals.restore(totals)

    def tick(self, final: bool = False) -> None:
        """Find journals, read what is new, account for it. ``final`` brings `views` up to date too."""
        with self._lock:
            self._discover()
            now = self._clock()
            # Steps before front ends: whatever a step worked on is then known to have been pending.
            for process in sorted(self._processes.values(), key=lambda process: process.role != "worker"):
                self._poll(process, now)
            if final or now - self._views_at >= _VIEW_EVERY_NS:
                self._views_at = now
                facts = final or now - self._facts_at >= _FACTS_EVERY_NS
                for process in self._processes.values():
                    process.refresh(facts)
                if facts:
                    self._facts_at = now
                    for rank in self._ranks.values():
                        rank.refresh()
                self._keys = self._group()
                for path, rank in self._ranks.items():
                    rank.fold(self._pending_of(path), now)
                self._forget(now)
                self._views = self._build_views(now, keep_dead=final or self._keep_dead)

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
            rows = [
                (int(row["e3"]), rank, row)
                for rank in self._ranks.values()
                for row in list(rank.recent)[-last:]
            ]
        rows.sort(key=lambda item: item[0])
        return [_step_json(rank.process, self._label(rank.process), row) for _, rank, row in rows[-last:]]

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
            left = [[*at, totals.save()] for at, totals in self._left.items()]
        text = json.dumps({"schema": _CHECKPOINT_SCHEMA, "ranks": ranks, "pending": pending, "left": left})
        temporary = self._checkpoint.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self._checkpoint)

    def close(self) -> None:
        """Stop reading every journal."""
        with self._lock:
            for process in self._processes.values():
                process.close()
            self._processes.clear()
            self._ranks.clear()
            self._pending.clear()

    def _discover(self) -> None:
        try:
            paths = list(self._directory.glob("*.journal"))
        except OSError:
            return
        for path in paths:
            if path in self._processes or path in self._ignored:
                continue
            try:
                reader = JournalReader(path, self._own_writers().get(path))
                process = Process(path, reader)
            except (JournalError, ValueError):
                continue  # still being made, or of another version: looked at again next time
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
                rank = Rank(process, self._peaks)
                if saved := self._saved.pop(process.identity, None):
                    rank.restore(saved)
                self._ranks[path] = rank

    def _group(self) -> dict[Path, str]:
        """Which view each process belongs to. One server is one group, except that a group may be inherited:

        Every program is a view of its own, as are servers of one group that have the same ranks: told apart
        by their labels, or else rank by rank, so that no two ranks of a view are the same.
        """
        keys: dict[Path, str] = {}
        for attempt in ("group", "label"):
            taken: dict[tuple[str, int, int], Path] = {}
            for path, process in self._processes.items():
                key = process.group
                if process.role == "program":
                    keys[path] = f"{key}/{process.identity}"
                    continue
                if process.group in self._split:
                    key = f"{key}/{process.facts.get('server', '')}"
                if process.role == "worker" and process.alive:
                    rank = (key, process.engine, int(process.facts.get("rank", 0)))
                    if path in self._alone or taken.setdefault(rank, path) != path:
                        if attempt == "group":
                            self._split.add(process.group)
                        else:
                            self._alone.add(path)
                        key = f"{key}/{process.identity}"
                keys[path] = key
        return keys

    def _label(self, process: Process) -> str:
        return self._labels.get(self._keys.get(process.path, ""), str(process.facts.get("server", "")))

    def _pending_of(self, path: Path) -> intervals.Intervals | None:
        """When the server had unfinished requests, by its front ends; None if it has none."""
        told = []
        for other, pending in self._pending.items():
            if self._keys[other] == self._keys[path]:
                process, spans = self._processes[other], pending.spans()
                # What a dead front end left open ended with it.
                told.append(spans if process.alive else np.minimum(spans, process.died_ns))
        return intervals.union(*told) if told else None

    def _forget(self, now: int) -> None:
        for pending in self._pending.values():
            pending.forget_before(now - 10 * WINDOW_NS)
        for path, process in list(self._processes.items()):
            if process.alive or self._keep_dead or now - process.died_ns < _DEAD_KEEP_NS:
                continue
            if process.role == "frontend":
                left = self._left.get((self._keys[path], process.engine))
                self._left[self._keys[path], process.engine] = _FrontTotals.of([process], left)
            process.close()
            self._processes.pop(path)
            self._keys.pop(path)
            self._alone.discard(path)
            self._ranks.pop(path, None)
            self._pending.pop(path, None)
            self._ignored.add(path)
            if self._remove_dead:
                with contextlib.suppress(OSError):
                    path.unlink()
        self._ignored = {path for path in self._ignored if path.exists()}
        living = set(self._keys.values())
        self._left = {at: left for at, left in self._left.items() if at[0] in living}
        self._latencies = {at: seen for at, seen in self._latencies.items() if at[0] in living}
        self._labels = {key: label for key, label in self._labels.items() if key in living}

    def _build_views(self, now: int, keep_dead: bool) -> list[ServerView]:
        groups: dict[str, list[Process]] = {}
        for path, process in self._processes.items():
            if process.alive or keep_dead:
                groups.setdefault(self._keys[path], []).append(process)
        views = {key: self._server(key, processes, now) for key, processes in groups.items()}
        in_order = sorted(views.items(), key=lambda item: item[1].started)
        for key, view in in_order:
            view.server = self._tell_apart(key, view.server)
        return [view for _, view in in_order]

    def _tell_apart(self, key: str, server: str) -> str:
        """A label that no other server has: its name, with a number if that is taken. Stays for its life."""
        if key not in self._labels:
            taken = set(self._labels.values())
            numbered = (f"{server}-{number}" for number in range(2, len(taken) + 3))
            self._labels[key] = next(label for label in (server, *numbered) if label not in taken)
        return self._labels[key]

    def _server(self, key: str, processes: list[Process], now: int) -> ServerView:
        first = min(
            processes, key=lambda process: (process.role == "worker", process.facts.get("started", 0))
        )
        facts = first.facts
        ranks = [
            self._rank(self._ranks[process.path], now) for process in processes if process.path in self._ranks
        ]
        capacity: dict[int, int] = {}
        for rank in ranks:
            if rank.kv_capacity_bytes is not None:
                capacity[rank.engine] = capacity.get(rank.engine, 0) + rank.kv_capacity_bytes
        engines = self._engines(key, [p for p in processes if p.role != "worker"], capacity, now)
        if not engines:
            ranks = [_without_gaps(rank) for rank in ranks]
        missing = self._missing(processes, ranks, engines)
        notes = sorted({note for process in processes for note in process.facts.get("notes", ())})
        loads = [process.load for process in processes if process.load is not None]
        return ServerView(
            server=str(facts.get("server", "")),
            model_name=str(facts.get("model_name", "")),
            group=first.group,
            framework=str(facts.get("framework", "")),
            framework_version=str(facts.get("framework_version", "")),
            started=float(facts.get("started", 0.0)),
            armed=all(load.armed for load in loads),
            inert=any(load.inert for load in loads),
            flags=dict(next((p.facts["flags"] for p in processes if p.facts.get("flags")), {})),
            engines=engines,
            ranks=sorted(ranks, key=lambda rank: (rank.engine, rank.rank)),
            missing=missing,
            notes=notes,
        )

    def _rank(self, rank: Rank, now: int) -> RankView:
        process = rank.process
        facts, counters = process.facts, process.counters
        # A rate over time in which nobody looked would be too low.
        since_ns = min(max(now - WINDOW_NS, rank.first_ns or 0), now - 1)
        figures = summarise(rank.accounts, since_ns=since_ns, now_ns=now, peaks=rank.peaks)
        model = facts.get("model") or {}
        since = rank.running_since()
        steps = {phase: counters[f"steps_{phase}"] for phase in layout.PHASES if counters[f"steps_{phase}"]}
        return RankView(
            engine=process.engine,
            rank=int(facts.get("rank", 0)),
            facts=facts,
            clock=str(facts.get("clock", "")),
            runner=str(facts.get("runner", "")),
            armed=bool(process.load.armed) if process.load is not None else True,
            inert=bool(process.load.inert) if process.load is not None else False,
            device_time={phase: dict(parts) for phase, parts in rank.device_time.items()},
            bytes={phase: dict(parts) for phase, parts in rank.bytes.items()},
            flops=dict(rank.flops),
            steps=steps,
            figures=figures,
            step_duration={
                phase: process.histogram(f"step_{phase}")
                for phase in steps
                if f"step_{phase}" in layout.HISTOGRAM_INDEX
            },
            peaks=rank.peaks,
            weights_bytes=model.get("weights_bytes"),
            kv_capacity_bytes=(model.get("kv") or {}).get("capacity_bytes"),
            step_running_seconds=None if since is None else max(now - since, 0) / 1e9,
            own_seconds=counters["own_ns_step"] / 1e9,
            errors=counters["errors"],
            dropped=counters["dropped"],
            lost=process.lost,
        )

    def _engines(
        self, key: str, fronts: list[Process], capacity: dict[int, int], now: int
    ) -> list[EngineView]:
        # Totals never fall while the server lives: front ends that died keep their part in them.
        dead = [
            process
            for path, process in self._processes.items()
            if process.role == "frontend" and self._keys[path] == key and process not in fronts
        ]
        engines: list[EngineView] = []
        for engine in sorted({front.engine for front in fronts}):
            of = [front for front in fronts if front.engine == engine]
            all_of = of + [front for front in dead if front.engine == engine]
            known = _FrontTotals.of(all_of, self._left.get((key, engine)))
            totals, latency = known.counters, known.latency
            began = min(float(front.facts.get("started", 0.0)) for front in all_of)
            recent = self._latencies.setdefault((key, engine), Latencies()).update(
                now,
                {name: view.counts for name, view in latency.items()},
                began_now=0 <= time.time() - began < _JUST_BEGAN_SECONDS,
            )
            # Every front end hears of the whole engine's load; the one that heard last knows best.
            load = max((front.load for front in of if front.load), key=lambda seen: seen.time, default=None)
            usage = load.kv_usage if load is not None and load.kv_usage == load.kv_usage else None
            used = None
            if usage is not None and engine in capacity:
                used = round(usage * capacity[engine])
            elif of[0].role == "program":
                used = self._program_kv(of[0])
            engines.append(
                EngineView(
                    engine=engine,
                    requests_running=load.running if load is not None else None,
                    requests_waiting=load.waiting if load is not None else None,
                    kv_usage=usage,
                    kv_used_bytes=used,
                    prompt_tokens=totals["prompt_tokens"],
                    generated_tokens=totals["generated_tokens"],
                    cached_tokens=totals["cached_tokens"],
                    preemptions=totals["preemptions"],
                    requests=totals["requests"],
                    requests_aborted=totals["requests_aborted"],
                    latency=latency,
                    recent_latency=recent,
                    own_seconds=totals["own_ns_request"] / 1e9,
                    errors=totals["errors"] if of[0].role == "frontend" else 0,
                )
            )
        return engines

    def _program_kv(self, process: Process) -> int | None:
        """A program's cache as of its last step; nothing while nothing runs."""
        recent = self._ranks[process.path].recent if process.path in self._ranks else None
        if not recent or (process.load is not None and not process.load.running):
            return None
        return int(recent[-1]["kv_used_bytes"]) or None

    def _missing(
        self, processes: list[Process], ranks: list[RankView], engines: list[EngineView]
    ) -> dict[str, str]:
        missing: dict[str, str] = {}
        if not engines:
            missing["time_to_first_token_seconds"] = "no front end of this server is being recorded"
            missing["sync_gap_ratio"] = missing["no_work"] = (
                "without a front end, waiting for the host cannot be told from having no work"
            )
        if not ranks:
            missing["device_time_seconds"] = "no worker of this server is being recorded"
        for view in ranks:
            rank = next(r for r in self._ranks.values() if r.process.facts is view.facts)
            if rank.model is None:
                missing["mbu_ratio"] = missing["mfu_ratio"] = f"no model of the work: {rank.model_problem}"
            elif rank.peaks is None:
                device = view.facts.get("device") or {}
                missing["mbu_ratio"] = missing["mfu_ratio"] = (
                    f"no peak rates for {device.get('name', 'this device')}: run `llmprobe calibrate`"
                )
            missing["launch_gap"] = "gaps inside a step need kernel windows; they are off"
        return missing


def _merge(views: list[HistogramView]) -> HistogramView:
    counts = np.stack([view.counts for view in views]).sum(axis=0)
    return HistogramView(counts, sum(view.sum for view in views))


@dataclass(frozen=True)
class _FrontTotals:
    """Cumulative totals of several front ends of one engine."""

    counters: dict[str, int]
    latency: dict[str, HistogramView]

    @classmethod
    def of(cls, fronts: Iterable[Process], more: _FrontTotals | None) -> _FrontTotals:
        parts = [
            cls(front.counters, {name: front.histogram(name) for name in _LATENCIES}) for front in fronts
        ]
        if more is not None:
            parts.append(more)
        return cls(
            {name: sum(part.counters[name] for part in parts) for name in layout.COUNTERS},
            {name: _merge([part.latency[name] for part in parts]) for name in _LATENCIES},
        )

    def save(self) -> dict[str, Any]:
        latency = {name: [view.counts.tolist(), view.sum] for name, view in self.latency.items()}
        return {"counters": self.counters, "latency": latency}

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> _FrontTotals:
        latency = {
            name: HistogramView(np.array(counts, dtype=np.uint64), total)
            for name, (counts, total) in saved["latency"].items()
        }
        return cls(saved["counters"], latency)


def _without_gaps(rank: RankView) -> RankView:
    """``rank`` without what only a front end can tell: which idle time was a wait for the host."""

    def known(parts: dict[str, float]) -> dict[str, float]:
        return {name: seconds for name, seconds in parts.items() if name != "host_gap" or seconds}

    return dataclasses.replace(
        rank,
        device_time={phase: known(parts) for phase, parts in rank.device_time.items()},
        figures={
            phase: dataclasses.replace(found, sync_gap_ratio=None, components=known(found.components))
            for phase, found in rank.figures.items()
        },
    )


def _step_json(process: Process, server: str, row: np.void) -> dict[str, Any]:
    times = [int(row[name]) for name in ("e0", "e1", "e2", "e3")]
    # A vLLM worker records neither; 0 would be a figure.
    unknown = {name for name in ("new_tokens", "kv_used_bytes") if process.role == "worker" and not row[name]}
    return {
        "server": server,
        "engine": process.engine,
        "rank": int(process.facts.get("rank", 0)),
        "step": int(row["step"]),
        "phase": layout.PHASES[int(row["phase"])],
        "clock": layout.Clock(int(row["clock"])).name.lower(),
        "begin_unix_seconds": monotonic_to_unix(times[0]),
        "span_seconds": (times[3] - times[0]) / 1e9,
        "forward_seconds": (times[1] - times[0]) / 1e9,
        "sample_gap_seconds": (times[2] - times[1]) / 1e9,
        "sample_seconds": (times[3] - times[2]) / 1e9,
        "own_seconds": int(row["own_ns"]) / 1e9,
        **{
            name: int(row[name])
            for name in (
                "requests",
                "prefill_requests",
                "prompt_tokens",
                "decode_tokens",
                "draft_tokens",
                "sampled",
                "new_tokens",
                "kv_used_bytes",
            )
            if name not in unknown
        },
        "context_tokens": int(row["context_prefill"][0]) + int(row["context_decode"][0]),
    }


def _load_checkpoint(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) and saved.get("schema") == _CHECKPOINT_SCHEMA else {}
