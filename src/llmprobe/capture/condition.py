"""When a capture begins: at once, at the next step of a phase, or when a live figure says so.

::

    when      = "now" | "next prefill" | "next decode" | condition
    condition = [phase "."] figure operator number ["for" duration]
    operator  = ">" | ">=" | "<" | "<="
    duration  = number ("ms" | "s" | "m")

Such as ``sync_gap_ratio > 0.3 for 10s`` or ``decode.mbu_step < 0.4``. Without a phase a figure of a phase
holds if it holds for any phase. A figure that is not known holds nothing.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from llmprobe.compute.stall import Stall

PHASES = ("prefill", "decode", "mixed", "draft", "encode")
#: Figures of a phase over the last 30 s, as in ``/api/status`` under ``figures``.
PHASE_FIGURES = (
    "sync_gap_ratio",
    "mbu_step",
    "mbu_busy",
    "mfu_step",
    "mfu_busy",
    "steps_per_second",
    "step_seconds_p50",
    "step_seconds_p99",
)
#: Figures of the server's front end, as in ``/api/status`` under ``engines``; the largest of all engines.
ENGINE_FIGURES = ("requests_running", "requests_waiting", "kv_usage")
LONGEST = 200
_LONGEST_SECONDS = 600.0

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,12})?"
_CONDITION = re.compile(
    rf"(?:(?P<phase>[a-z]+)\.)?(?P<figure>[a-z_0-9]+) *(?P<op>>=|<=|>|<) *(?P<number>{_NUMBER})"
    rf"(?: +for +(?P<long>{_NUMBER}) *(?P<unit>ms|s|m))?"
)


class ConditionError(ValueError):
    """A ``when`` that means nothing; the message says what is allowed."""


@dataclass(frozen=True)
class Live:
    """What a server shows right now, as far as conditions ask for it.

    ``steps`` counts them by phase since the server started, for each rank by its name. ``figures`` holds, by
    phase, the known figures of each rank; ``engines`` the known figures of each engine. ``working``: a step
    or a request runs. ``stalls``: the ranks that do not get on, and in what.
    """

    steps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    figures: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)
    engines: tuple[Mapping[str, float], ...] = ()
    working: bool = False
    stalls: tuple[tuple[int, Stall], ...] = ()

    def steps_since(self, before: Live, phases: Collection[str] | None = None) -> int:
        """Steps since then of these phases (None: of all), on the rank that took most.

        A rank that was not there before, or began anew, has taken none yet: when it took those that it has is
        not known.
        """
        taken = [
            _count(steps, phases) - _count(before.steps[name], phases)
            for name, steps in self.steps.items()
            if name in before.steps
        ]
        return max(taken, default=0)


def _count(steps: Mapping[str, int], phases: Collection[str] | None) -> int:
    return sum(steps.get(phase, 0) for phase in (steps if phases is None else phases))


@dataclass(frozen=True)
class Condition:
    """A comparison of one figure that must hold for ``seconds`` without a break."""

    figure: str
    phase: str | None
    op: str
    number: float
    seconds: float

    def holds(self, live: Live) -> bool:
        """Whether the comparison holds right now."""
        return any(_OPERATORS[self.op](value, self.number) for value in self.values(live))

    def values(self, live: Live) -> list[float]:
        """The known values of its figure, of which one that compares is enough."""
        if self.figure in ENGINE_FIGURES:
            # The largest: one crowded engine is a crowded server.
            known = [engine[self.figure] for engine in live.engines if self.figure in engine]
            return [max(known)] if known else []
        ranks = [
            rank for phase, ranks in live.figures.items() if self.phase in (None, phase) for rank in ranks
        ]
        return [rank[self.figure] for rank in ranks if self.figure in rank]


@dataclass(frozen=True)
class NextStep:
    """The next step of a phase."""

    phase: str


When = Condition | NextStep | None


def parse(text: str) -> When:
    """What ``text`` asks for; None: at once.

    Raises:
        ConditionError: it asks for nothing that there is.
    """
    if len(text) > LONGEST:
        raise ConditionError(f"longer than {LONGEST} characters")
    words = " ".join(text.split(" ")).strip()
    if words == "now":
        return None
    if words in ("next prefill", "next decode"):
        return NextStep(words.removeprefix("next "))
    found = _CONDITION.fullmatch(words)
    if found is None:
        raise ConditionError(
            f"{text!r} is none of: now, next prefill, next decode, or FIGURE > NUMBER for SECONDSs, such as "
            "'sync_gap_ratio > 0.3 for 10s'"
        )
    return _condition(found)


def _condition(found: re.Match[str]) -> Condition:
    figure, phase = found["figure"], found["phase"]
    if figure not in PHASE_FIGURES + ENGINE_FIGURES:
        raise ConditionError(
            f"there is no figure {figure!r}; there are {', '.join(PHASE_FIGURES + ENGINE_FIGURES)}"
        )
    if phase is not None and phase not in PHASES:
        raise ConditionError(f"there is no phase {phase!r}; there are {', '.join(PHASES)}")
    if phase is not None and figure in ENGINE_FIGURES:
        raise ConditionError(f"{figure} is not counted by phase; leave {phase!r} out")
    seconds = float(found["long"]) * _UNITS[found["unit"]] if found["long"] else 0.0
    if seconds > _LONGEST_SECONDS:
        raise ConditionError(f"a condition may be watched for at most {_LONGEST_SECONDS:g} s")
    return Condition(figure, phase, found["op"], float(found["number"]), seconds)


class Watch:
    """Looks again and again until the time has come."""

    def __init__(self, when: When) -> None:
        self._when = when
        self._since: float | None = None
        self._before: Live | None = None
        self._known = not isinstance(when, Condition)

    @property
    def never_known(self) -> str | None:
        """The figure that is asked about, if no value of it has been seen so far."""
        return self._when.figure if isinstance(self._when, Condition) and not self._known else None

    def come(self, live: Live | None, now: float) -> bool:
        """Whether it is time, given what is seen at ``now`` (seconds of a monotonic clock).

        ``live`` is None where the server is not in sight, as right after a restart of the agent.
        """
        if self._when is None:
            return True
        if isinstance(self._when, NextStep):
            if live is None:
                return False
            before, self._before = self._before, live
            # A mixed step prefills too; a pure phase alone would never come under chunked prefill.
            return before is not None and live.steps_since(before, (self._when.phase, "mixed")) > 0
        self._known = self._known or (live is not None and bool(self._when.values(live)))
        if live is None or not self._when.holds(live):
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= self._when.seconds
