"""One engine process as its journal shows it: read incrementally, folded into cumulative figures."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.collect.kept import KeptSteps, LastStep
from llmprobe.collect.views import HistogramView
from llmprobe.collect.windows import Windows
from llmprobe.compute import accounting, intervals, traffic
from llmprobe.compute.evidence import Unwatched
from llmprobe.compute.facts import OPERATORS, FactsError, ModelFacts
from llmprobe.compute.figures import PhaseFigures, figures_of
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.sampled import apply_windows
from llmprobe.compute.steps import Floats
from llmprobe.compute.sums import (
    COMPONENT_COLUMNS,
    COMPUTE_COLUMNS,
    INDEX,
    MEMORY_COLUMNS,
    PhaseSums,
    columns,
)
from llmprobe.record import layout
from llmprobe.record.journal_reader import JournalReader, Records

KEEP_NS = 32 * 10**9  #: how long accounts of single steps are kept: the longest window, and a little
RECENT_STEPS = 4096
#: Kernel windows older than this are not applied to new steps: by then the load may be another.
WINDOW_GOOD_SECONDS = 60.0
_ATTAINABLE_EVERY = 8  # looks at the facts
_LIKE_THE_LAST = 2.0
_NOTHING_YET = object()
_BOUNDS = layout.bucket_bounds_seconds()
#: Requests whose arrival is in the journal only later: idle time younger than this is not yet booked.
_SETTLE_NS = 500_000_000
#: No process writes more records a second: its ring cannot come round between two reads.
_MOST_RECORDS_PER_SECOND = 4000

PeaksOf = Callable[[dict[str, Any]], "Peaks | None"]


def no_peaks(facts: dict[str, Any]) -> Peaks | None:
    """Of a device about which nothing is known."""
    return None


class Process:
    """What every journal has: facts, counters, load, liveness."""

    def __init__(self, path: Path, reader: JournalReader) -> None:
        self.path = path
        self.reader = reader
        self.identity = reader.identity
        self.facts: dict[str, Any] = reader.facts()
        self.counters = reader.counters()
        self.load = reader.load()
        self.progress = reader.progress()
        self.alive = True
        self.died_ns = 0
        self.lost = 0
        self._read_ns = 0
        self._read_every_ns = reader.slots * 10**9 // _MOST_RECORDS_PER_SECOND

    @property
    def role(self) -> str:
        """``worker``, ``frontend`` or ``program``."""
        return str(self.facts.get("role", ""))

    @property
    def group(self) -> str:
        """Processes of one server or program share this."""
        return str(self.facts.get("group") or self.identity)

    @property
    def engine(self) -> int:
        """Data-parallel index."""
        return int(self.facts.get("engine", 0))

    def look(self, now_ns: int) -> bool:
        """See whether it lives; returns whether `poll` must not wait: it just died, or its ring may fill."""
        if self.alive and not self.reader.alive():
            self.alive = False
            self.died_ns = now_ns
            return True
        return now_ns - self._read_ns >= self._read_every_ns

    def poll(self, now_ns: int) -> Records:
        """Read what is new. A dead process is read once more, to its end."""
        self._read_ns = now_ns
        records = self.reader.read()
        self.lost += records.lost
        if len(records.pending):
            self.load = self.reader.load() or self.load
        return records

    def refresh(self, facts: bool) -> None:
        """Bring totals, load and progress up to date; ``facts`` too, which change rarely."""
        self.counters = self.reader.counters()
        self.load = self.reader.load() or self.load
        self.progress = self.reader.progress()
        if facts:
            self.facts = self.reader.facts() or self.facts

    def histogram(self, name: str) -> HistogramView:
        """A cumulative latency histogram."""
        sum_name = f"span_ns_{name.removeprefix('step_')}" if name.startswith("step_") else f"sum_ns_{name}"
        return HistogramView(self.reader.histogram(name), self.counters[sum_name] / 1e9)

    def close(self) -> None:
        """Stop reading."""
        self.reader.close()


class Pending:
    """When requests were unfinished, as one front end tells it."""

    def __init__(self) -> None:
        self._spans: list[list[int]] = []
        self._next = 0  # records before this ``seq`` are in the spans
        self.known = False

    def add(self, records: np.ndarray, load_unfinished: int) -> None:
        """Take in PENDING records; ``load_unfinished`` bridges those that a ring lost."""
        if not self.known and not len(records) and load_unfinished and not self._spans:
            self._spans.append([0, intervals.OPEN])
        for row in records[records["seq"] >= self._next]:
            at = int(row["time"])
            self.known = True
            self._next = int(row["seq"]) + 1
            opened = bool(self._spans) and self._spans[-1][1] == intervals.OPEN
            if row["unfinished"] and not opened:
                self._spans.append([at, intervals.OPEN])
            elif not row["unfinished"] and opened:
                self._spans[-1][1] = max(at, self._spans[-1][0])
            elif not row["unfinished"] and not self._spans:
                self._spans.append([0, at])  # it began before the oldest record that is left

    def spans(self) -> intervals.Intervals:
        """Sorted, disjoint intervals in nanoseconds."""
        return np.array(self._spans, dtype=np.int64).reshape(-1, 2)

    def forget_before(self, time_ns: int) -> None:
        """Drop intervals that ended before ``time_ns``."""
        self._spans = [span for span in self._spans if span[1] >= time_ns]

    def save(self) -> dict[str, Any]:
        """What an agent that starts anew needs in order to know of work that began before."""
        return {"spans": self._spans, "next": self._next, "known": self.known}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`; records that it covers may be read again."""
        self._spans = [[int(begin), int(end)] for begin, end in saved["spans"]]
        self._next = int(saved["next"])
        self.known = bool(saved["known"])


class Rank:
    """The steps of one worker process, accounted for."""

    def __init__(self, process: Process, peaks_of: PeaksOf, attainable_of: PeaksOf = no_peaks) -> None:
        self.process = process
        self._peaks_of = peaks_of
        self._attainable_of = attainable_of
        self.peaks: Peaks | None = None
        self.attainable: Peaks | None = None
        self.model: ModelFacts | None = None
        self.model_problem = ""
        self._said: Any = _NOTHING_YET
        self._refreshed = 0
        self.refresh()
        self.first_ns: int | None = None  #: begin of the first step that was seen
        self.cursor_ns: int | None = None
        self.last_step: int | None = None
        self.device_time: dict[str, dict[str, float]] = {}
        self.bytes: dict[str, dict[str, float]] = {}
        self.flops: dict[str, float] = {}
        #: Cumulative, of the steps that `bytes` and `flops` are of: phase → seconds with gaps, busy seconds.
        self.work_seconds: dict[str, list[float]] = {}
        #: Cumulative: phase → operator → seconds of floor by memory, by compute.
        self.operator_floors: dict[str, dict[str, list[float]]] = {}
        self.windows = Windows(process.path)
        self._kept: dict[int, KeptSteps] = {}  # by index of the phase
        self._unwatched: dict[str, Unwatched] = {}
        self._recent: deque[np.ndarray] = deque()
        self._waiting: list[np.ndarray] = []

    def refresh(self) -> None:
        """Follow the process's facts: its model may come late or change, and so may the peaks."""
        said = self.process.facts.get("model")
        changed = said != self._said
        if changed:
            self._said = said
            self.model, self.model_problem = _model(self.process.facts)
        # Asked again: published peaks are refined once NVML has told of the GPU.
        before, self.peaks = self.peaks, self._peaks_of(self.process.facts)
        # Somebody may measure the device while it is watched, also once more; that is in a file. Roofs of two
        # measurements would not go together.
        if changed or self.peaks != before or self._refreshed % _ATTAINABLE_EVERY == 0:
            self.attainable = self._attainable_of(self.process.facts)
        self._refreshed += 1

    def take(self, steps: np.ndarray) -> None:
        """Keep new steps for the next `fold`: accounting for many at once costs little more than for one."""
        steps = steps[steps["flags"] & layout.Flag.EMPTY == 0]
        if len(steps):
            self._waiting.append(steps)
            self._recent.append(steps)
            while sum(map(len, self._recent)) - len(self._recent[0]) >= RECENT_STEPS:
                self._recent.popleft()

    def recent(self, last: int) -> np.ndarray:
        """The newest ``last`` step records, at most `RECENT_STEPS`; oldest first."""
        parts: list[np.ndarray] = []
        missing = min(last, RECENT_STEPS)
        for steps in reversed(self._recent):
            if missing <= 0:
                break
            parts.append(steps[-missing:])
            missing -= len(parts[-1])
        return np.concatenate(parts[::-1]) if parts else np.zeros(0, dtype=layout.STEP)

    def newest(self) -> np.void | None:
        """The newest step record; None before the first."""
        return self._recent[-1][-1] if self._recent else None

    def like_the_last(self, now_ns: int) -> tuple[int, LastStep] | None:
        """The phase of the step that runs, by its index, and the step of that phase that ended last.

        None where there is none, or where they cannot be taken to be alike: the one that runs has taken more
        than `_LIKE_THE_LAST` times as long, in proportion to its tokens if it has more of them.
        """
        since, progress = self.running_since(), self.process.progress
        if since is None or progress is None or progress.phase not in self._kept or not self.process.alive:
            return None
        last = self._kept[progress.phase].last()
        if last is None:
            return None
        more = max(progress.tokens / max(last.tokens, 1.0), 1.0)
        alike = (now_ns - since) / 1e9 <= _LIKE_THE_LAST * last.span_seconds * more
        return (progress.phase, last) if alike else None

    def steps(self, since_ns: int, until_ns: int) -> dict[int, PhaseSums]:
        """Steps that ended in that time, by the index of their phase; good until the next `fold`."""
        found = {phase: self._kept[phase].between(since_ns, until_ns) for phase in sorted(self._kept)}
        return {phase: sums for phase, sums in found.items() if sums is not None}

    def tokens(self, since_ns: int, until_ns: int, phases: Iterable[int]) -> Floats:
        """(N,) query tokens of each step of some phases that ended in that time."""
        kept = [self._kept[phase] for phase in phases if phase in self._kept]
        return np.concatenate([np.empty(0), *(of.tokens(since_ns, until_ns) for of in kept)])

    def figures(self, since_ns: int, now_ns: int) -> dict[str, PhaseFigures]:
        """As `llmprobe.compute.figures.figures_of`."""
        steps = self.steps(since_ns, now_ns)
        return figures_of(steps, window_seconds=(now_ns - since_ns) / 1e9, peaks=self.peaks)

    def fold(self, pending: intervals.Intervals | None, now_ns: int) -> None:
        """Account for the steps taken, and for the time since the last one if nothing is to do.

        Args:
            pending: when requests were unfinished; None where nobody tells: idle time, which cannot be split
                into waiting for the host and no work, is then ``unattributed`` in no phase.
        """
        self.windows.look(
            now_ns,
            lambda: self.recent(RECENT_STEPS),
            lambda steps: accounting.step_floors(steps, self.model, self.peaks),
        )
        if self._waiting:
            steps = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
            self._waiting = []
            self._account(steps, pending, now_ns)
        load = self.process.load
        off = load is not None and (not load.armed or bool(load.inert))
        # Whoever would tell of the running step's end is silent then: it does not hold up the account.
        idle = (off or self.running_since() is None) and self.process.alive
        if self.cursor_ns is not None and pending is not None and idle:
            until = now_ns - _SETTLE_NS
            if off and until > self.cursor_ns:
                # Switched off, or given up: it may have worked all the time, and nobody measured.
                pending = np.array([[self.cursor_ns, until]], dtype=np.int64)
            components, self.cursor_ns = accounting.idle(self.cursor_ns, until, pending, None)
            self._add("none", components)

    def running_since(self) -> int | None:
        """When the running step began, as of the last look (CLOCK_MONOTONIC ns); None between steps."""
        progress = self.process.progress
        if progress is None or progress.begun <= max(self.last_step or 0, progress.ended):
            return None
        return progress.time

    def _account(self, steps: np.ndarray, pending: intervals.Intervals | None, now_ns: int) -> None:
        rows = accounting.account(
            steps,
            cursor_ns=self.cursor_ns,
            last_step=self.last_step,
            pending=intervals.empty() if pending is None else pending,
            blocked=None,
            model=self.model,
            peaks=self.peaks,
        )
        kernels = self.windows.evidence(now_ns)
        good = {phase: seen for phase, seen in kernels.items() if seen.age_seconds <= WINDOW_GOOD_SECONDS}
        apply_windows(rows, good, self._unwatched)
        if pending is None:
            index, idle = accounting.COMPONENTS.index, np.zeros(len(accounting.COMPONENTS))
            idle[index("unattributed")] = rows.components[:, index("no_work")].sum()
            rows.components[:, index("no_work")] = 0.0
            self._add("none", idle)  # no step's: of its phase it would be slow kernels
        if self.first_ns is None:
            self.first_ns = int(steps["e0"][0])
        self.cursor_ns = rows.cursor_ns
        self.last_step = int(steps["step"][-1])
        found = columns(rows, self.peaks)
        moved = {} if self.model is None else traffic.traffic_by_kind(steps, self.model, rows.traffic_bytes)
        for phase in np.flatnonzero(np.bincount(rows.phase)).tolist():
            chosen = rows.phase == phase
            of_phase = found[chosen]
            self._add_phase(layout.PHASES[phase], of_phase.sum(axis=0))
            for kind, values in moved.items():
                of = self.bytes.setdefault(layout.PHASES[phase], {})
                of[kind] = of.get(kind, 0.0) + float(values[chosen].sum())
            if phase not in self._kept:
                self._kept[phase] = KeptSteps(shared=phase == layout.Phase.MIXED)
            self._kept[phase].add(rows.end_ns[chosen], of_phase)
        for kept in self._kept.values():
            kept.forget_before(int(rows.end_ns[-1]) - KEEP_NS)

    def _add_phase(self, label: str, sums: Floats) -> None:
        """Add the steps of one phase to the totals; ``sums`` by `COLUMNS`."""
        no_work = accounting.COMPONENTS.index("no_work")
        total = sums[COMPONENT_COLUMNS].copy()
        idle = np.zeros_like(total)
        idle[no_work], total[no_work] = total[no_work], 0.0
        self._add(label, total)
        self._add("none", idle)
        if self.model is None:
            return
        self.flops[label] = self.flops.get(label, 0.0) + float(sums[INDEX["flops"]])
        seconds = self.work_seconds.setdefault(label, [0.0, 0.0])
        seconds[0] += float(sums[INDEX["known_seconds"]])
        seconds[1] += float(sums[INDEX["known_busy"]])
        if self.peaks is None:
            return
        of_phase = self.operator_floors.setdefault(label, {})
        floors = sums[MEMORY_COLUMNS].tolist(), sums[COMPUTE_COLUMNS].tolist()
        for name, memory, compute in zip(OPERATORS, *floors, strict=True):
            of = of_phase.setdefault(name, [0.0, 0.0])
            of[0] += memory
            of[1] += compute

    def _add(self, phase: str, components: np.ndarray) -> None:
        if not components.any():
            return
        totals = self.device_time.setdefault(phase, dict.fromkeys(accounting.COMPONENTS, 0.0))
        for name, seconds in zip(accounting.COMPONENTS, components.tolist(), strict=True):
            totals[name] += seconds

    def save(self) -> dict[str, Any]:
        """What an agent that starts anew needs in order to go on counting."""
        waiting = int(self._waiting[0]["seq"][0]) if self._waiting else None
        return {
            "position": self.process.reader.position if waiting is None else waiting,
            "cursor_ns": self.cursor_ns,
            "last_step": self.last_step,
            "lost": self.process.lost,
            "device_time": self.device_time,
            "bytes": self.bytes,
            "flops": self.flops,
            "work_seconds": self.work_seconds,
            "operator_floors": self.operator_floors,
            "windows": self.windows.save(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`."""
        self.process.reader.position = int(saved["position"])
        self.process.lost = int(saved["lost"])
        self.cursor_ns = saved["cursor_ns"]
        self.last_step = saved["last_step"]
        self.device_time = saved["device_time"]
        self.bytes = saved["bytes"]
        self.flops = saved["flops"]
        self.work_seconds = saved.get("work_seconds", {})
        self.operator_floors = saved.get("operator_floors", {})
        if windows := saved.get("windows"):
            self.windows.restore(windows)


def _model(facts: dict[str, Any]) -> tuple[ModelFacts | None, str]:
    said = facts.get("model")
    if not said:
        return None, "the model could not be read"
    try:
        model = ModelFacts.from_json(said)
    except FactsError as error:
        return None, str(error)
    if model.unmodelled:
        return None, "; ".join(model.unmodelled)
    return model, ""


def monotonic_to_unix(time_ns: int) -> float:
    """A time of CLOCK_MONOTONIC as Unix seconds, by the clocks as they stand now."""
    return time.time() - (time.monotonic_ns() - time_ns) / 1e9
