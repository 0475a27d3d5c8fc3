"""What was seen of servers while a run went on, for its summary: gone, or of idle time, once they have ended.

The verdict on a run is about its time with work pending. Kernel windows, counters, host signals and pressure
are each of the last seconds only, so that somebody has to look at them as time goes by.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmprobe.collect.process import WINDOW_GOOD_SECONDS
from llmprobe.collect.views import EngineView, RankView, ServerView
from llmprobe.compute.accounting import IDLE_COMPONENTS
from llmprobe.compute.evidence import CounterEvidence, KernelEvidence
from llmprobe.compute.host import HostSignals
from llmprobe.compute.pressure import Pressure, worst
from llmprobe.compute.steady import SHORT_SECONDS, WINDOW_SECONDS

#: Kinds of pressure that are of one moment. The others a run's totals tell.
MOMENTARY = ("kv_cache", "token_budget", "sequence_limit", "front_end")
#: Share of the run's looks from which pressure of a moment is the run's, and from which it may lead.
_ACTIVE_SHARE, _HIGH_SHARE = 0.1, 0.5
#: Counters are means over 3 s and up to 1 s old; they speak for pending time only if that was all of it.
_COUNTED_SECONDS, _COUNTED_SHARE = SHORT_SECONDS + 1, 0.9
#: From which share of its time a run is one beside others on the GPU; below it, they are left out.
_SHARED_SHARE = 0.1
#: Host signals reach back for ten seconds and to the look before those, which may be a few more.
_KEPT_SECONDS = 2 * WINDOW_SECONDS
#: Share of their window from which host signals are those of work; below a tenth they are those of idling.
_WORKING_SHARE, _LEAST_SHARE = 0.5, 0.1
#: Kernel windows speak for a phase if they were good for so much of its time; graphs likewise for nearly all.
_WINDOWS_SHARE, _GRAPHS_SHARE = 0.5, 0.95

RankKey = tuple[int, int, Any]


def rank_key(rank: RankView) -> RankKey:
    """A worker that was started anew is another one."""
    return rank.engine, rank.rank, rank.facts.get("pid")


@dataclass(frozen=True)
class RankSeen:
    """One rank over the run.

    ``prepared``: phase of ``kernels`` → seconds between steps that its windows took for work, which are in
    the run's totals as such. ``tokens``: phase → prompt and decode tokens of a mean step.
    """

    kernels: dict[str, KernelEvidence]
    counters: CounterEvidence | None
    host: HostSignals | None
    one_graph: frozenset[str]
    tokens: dict[str, tuple[float, float]]
    prepared: dict[str, float]


@dataclass(frozen=True)
class ServerSeen:
    """One server over the run. ``moments``: kind of pressure → its engine when that was worst."""

    ranks: dict[RankKey, RankSeen]
    pressure: dict[str, Pressure]
    moments: dict[str, EngineView]


class RunLooks:
    """Looks at every server now and then, and adds up what it sees. Not thread-safe.

    Args:
        since: the servers at the run's beginning; what they did before is none of it.
        clock: seconds.
    """

    def __init__(
        self, since: Iterable[ServerView] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._last: Sequence[ServerView] | None = None
        self._servers: dict[tuple[str, str], _Server] = {}
        for view in since:
            self._of(view).begin(view)

    def look(self, views: Sequence[ServerView]) -> None:
        """Take in what `Collector.views` gives; the same list twice is one look."""
        if views is self._last:
            return
        self._last = views
        for view in views:
            self._of(view).look(view, self._clock())

    def seen(self, view: ServerView) -> ServerSeen:
        """What was seen of one server."""
        return self._of(view).seen()

    def _of(self, view: ServerView) -> _Server:
        return self._servers.setdefault((view.group, view.own_label or view.server), _Server())


class _Server:
    def __init__(self) -> None:
        self._ranks: dict[RankKey, _Rank] = {}
        self._looks: dict[str, int] = {}
        self._active: dict[str, int] = {}
        self._worst: dict[str, Pressure] = {}
        self._moments: dict[str, EngineView] = {}

    def begin(self, view: ServerView) -> None:
        for rank in view.ranks:
            self._ranks[rank_key(rank)] = _Rank(rank)

    def look(self, view: ServerView, now: float) -> None:
        worked = [
            self._ranks.setdefault(rank_key(rank), _Rank()).look(rank, view, now) for rank in view.ranks
        ]
        if not any(worked):
            return
        engines = {engine.engine: engine for engine in view.engines}
        for kind in MOMENTARY:
            found = view.pressure.get(kind)
            if found is None:
                continue
            self._looks[kind] = self._looks.get(kind, 0) + 1
            self._active[kind] = self._active.get(kind, 0) + found.active
            known = self._worst.get(kind)
            if known is None or worst((known, found))[kind] is found:
                self._worst[kind] = found
                if found.engine in engines:
                    self._moments[kind] = engines[found.engine]

    def seen(self) -> ServerSeen:
        return ServerSeen(
            {key: rank.seen() for key, rank in self._ranks.items()},
            {kind: self._pressure(kind) for kind in self._worst},
            self._moments,
        )

    def _pressure(self, kind: str) -> Pressure:
        share = self._active[kind] / self._looks[kind]
        found = self._worst[kind]
        active = found.active and share >= _ACTIVE_SHARE
        lasting = f", pressing {share:.0%} of the time" if found.active else ""
        return dataclasses.replace(
            found,
            active=active,
            high=active and found.high and share >= _HIGH_SHARE,
            text=f"{found.text} at worst{lasting}",
        )


@dataclass
class _Rank:
    """Sums over looks. Weights are seconds of a phase, gaps included."""

    before: dataclasses.InitVar[RankView | None] = None
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    new_seconds: dict[str, float] = field(default_factory=dict)  # of the run
    in_graphs: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)  # steps, prompt tokens, decode tokens
    windows: dict[str, _Mean] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)  # seconds between steps that windows saw busy
    counted: _Mean = field(default_factory=lambda: _Mean())
    shared_seconds: float = 0.0  # in which others used the GPU too
    host: HostSignals | None = None
    host_share: float = 0.0
    first_total: float = 0.0  # seconds of all phases before the run
    looks: deque[tuple[float, float]] = field(default_factory=deque)  # time, seconds of all phases until then

    def __post_init__(self, before: RankView | None) -> None:
        if before is not None:
            self.steps, self.seconds = dict(before.steps), _phase_seconds(before)
            self.first_total = sum(self.seconds.values())

    def look(self, rank: RankView, view: ServerView, now: float) -> bool:
        """Whether it worked since the last look."""
        seconds, limits = _phase_seconds(rank), view.thresholds
        new = {phase: spent - self.seconds.get(phase, 0.0) for phase, spent in seconds.items()}
        worked, total = sum(new.values()), sum(seconds.values())
        for phase, spent in new.items():
            if spent <= 0:
                continue
            self.new_seconds[phase] = self.new_seconds.get(phase, 0.0) + spent
            if phase in rank.one_graph:
                self.in_graphs[phase] = self.in_graphs.get(phase, 0.0) + spent
            kernels = rank.kernels.get(phase)
            if kernels is not None and kernels.age_seconds <= limits.kernel_age_seconds:
                self.windows.setdefault(phase, _Mean()).add(kernels, spent)
            if kernels is not None and kernels.age_seconds <= WINDOW_GOOD_SECONDS:  # as totals are split
                steps = rank.steps.get(phase, 0) - self.steps.get(phase, 0)
                busy = steps * (kernels.gap_busy_seconds or 0.0)
                self.prepared[phase] = self.prepared.get(phase, 0.0) + busy
            self._count_tokens(phase, rank)
        if worked > 0:
            self._look_around(rank, total, now)
            self._look_at_counters(rank, worked, total, now)
        self.looks.append((now, total))
        while len(self.looks) > 1 and now - self.looks[1][0] >= _KEPT_SECONDS:
            self.looks.popleft()
        self.steps, self.seconds = dict(rank.steps), seconds
        return worked > 0

    def _count_tokens(self, phase: str, rank: RankView) -> None:
        figures = rank.figures.get(phase)
        steps = rank.steps.get(phase, 0) - self.steps.get(phase, 0)
        if figures is None or not figures.steps or steps <= 0:
            return
        sums = self.tokens.setdefault(phase, [0.0, 0.0, 0.0])
        for at, amount in enumerate((figures.steps, figures.prompt_tokens, figures.decode_tokens)):
            sums[at] += steps * amount / figures.steps

    def _look_around(self, rank: RankView, total: float, now: float) -> None:
        if rank.host is None or rank.host.window_seconds <= 0:
            return
        # What the host did while a model was loaded explains no step.
        window = rank.host.window_seconds
        _, earlier = self._at(now - window) or (now, self.first_total)
        share = min((total - earlier) / window, _WORKING_SHARE)
        if share >= max(self.host_share, _LEAST_SHARE):
            self.host, self.host_share = rank.host, share

    def _look_at_counters(self, rank: RankView, worked: float, total: float, now: float) -> None:
        if rank.counters is not None and rank.counters.shared:
            self.shared_seconds += worked
            return
        found, before = rank.counters_lately, self._at(now - _COUNTED_SECONDS)
        if found is None or before is None:
            return
        at, earlier = before
        if total - earlier >= _COUNTED_SHARE * (now - at):
            self.counted.add(found, 1.0)

    def _at(self, time_seconds: float) -> tuple[float, float] | None:
        """The newest look that is no later: its time, and the seconds of all phases until then."""
        return next((look for look in reversed(self.looks) if look[0] <= time_seconds), None)

    def seen(self) -> RankSeen:
        spent = self.new_seconds
        windows = {
            phase: mean
            for phase, mean in self.windows.items()
            if mean.weight >= _WINDOWS_SHARE * spent[phase]
        }
        return RankSeen(
            kernels={phase: _windows(mean) for phase, mean in windows.items()},
            counters=_counters(self.counted, self.shared_seconds > _SHARED_SHARE * sum(spent.values())),
            host=self.host,
            one_graph=frozenset(
                phase for phase, seconds in self.in_graphs.items() if seconds >= _GRAPHS_SHARE * spent[phase]
            ),
            tokens={
                phase: (prompt / steps, decode / steps)
                for phase, (steps, prompt, decode) in self.tokens.items()
            },
            prepared={phase: self.prepared.get(phase, 0.0) for phase in windows},
        )


def _phase_seconds(rank: RankView) -> dict[str, float]:
    return {
        phase: sum(spent for name, spent in parts.items() if name not in IDLE_COMPONENTS)
        for phase, parts in rank.device_time.items()
        if phase != "none"
    }


class _Mean:
    """Weighted means of the fields of evidence, each over the looks in which it was known."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, found: KernelEvidence | CounterEvidence, weight: float) -> None:
        self.weight += weight
        for each in dataclasses.fields(found):
            value = getattr(found, each.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                total, known = self._sums.get(each.name, (0.0, 0.0))
                self._sums[each.name] = total + weight * value, known + weight

    def of(self, name: str) -> float | None:
        total, known = self._sums.get(name, (0.0, 0.0))
        return total / known if known > 0 else None


def _windows(mean: _Mean) -> KernelEvidence:
    """Windows inside the run are no older than the run's own figures."""
    return KernelEvidence(
        steps=round(mean.of("steps") or 0),
        launch_gap_ratio=mean.of("launch_gap_ratio") or 0.0,
        communication_ratio=mean.of("communication_ratio") or 0.0,
        transfer_ratio=mean.of("transfer_ratio") or 0.0,
        age_seconds=0.0,
        clock_ratio=mean.of("clock_ratio"),
        gap_busy_seconds=mean.of("gap_busy_seconds"),
        disturbed_ratio=mean.of("disturbed_ratio") or 0.0,
        busy_per_floor=mean.of("busy_per_floor"),
        floor_step_seconds=mean.of("floor_step_seconds"),
        step_tokens=mean.of("step_tokens"),
    )


def _counters(mean: _Mean, shared: bool) -> CounterEvidence | None:
    if shared:  # whatever they read is somebody else's too
        return CounterEvidence(0.0, 0.0, None, 0.0, shared=True)
    dram, tensor = mean.of("dram_active_ratio"), mean.of("tensor_active_ratio")
    if dram is None or tensor is None:
        return None
    sm, graphics = mean.of("sm_active_ratio"), mean.of("graphics_active_ratio")
    return CounterEvidence(dram, tensor, sm, 0.0, shared=False, graphics_active_ratio=graphics)
