"""Has an engine stopped making progress? From the step that runs, recent steps, and whether work waits.

A step is *stalled* once it has run for longer than any step can be expected to, while requests are
unfinished. What can be expected follows from the engine's own recent steps, because a step takes
milliseconds on one machine and minutes on another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmprobe.compute import steps as records
from llmprobe.compute.steps import PHASES

LEAST_SECONDS = 10.0
#: While too little is known: the first steps compile kernels, capture graphs and fill caches.
FIRST_SECONDS = 120.0
MOST_SECONDS = 600.0
#: Between steps an engine may wait for what llmprobe does not see (a remote KV cache, a grammar).
BETWEEN_STEPS_SECONDS = 30.0

_ENOUGH_STEPS = 20
_FACTOR = 10.0
_LAST_STEPS = 5


@dataclass(frozen=True)
class Bound:
    """How long a step may run before it counts as stalled."""

    seconds: float
    reason: str  # how it came about, for people


@dataclass(frozen=True)
class StepSeen:
    """One finished step, as the last thing that an engine is known to have done."""

    step: int
    phase: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RunningStep:
    """A step that has begun and not ended."""

    phase: str | None  # None where nobody could read it
    seconds: float  # since it began
    pending_seconds: float  # of those in the last 10 s, with work pending


@dataclass(frozen=True)
class Stall:
    """An engine that has not got on."""

    where: Literal["step", "between_steps"]  # inside a step, or it does not begin the next
    since_ns: int  # CLOCK_MONOTONIC: when the step began, or the last one ended
    seconds: float  # for how long
    bound: Bound
    step: int  # the one that runs, or the last that ended
    phase: str | None  # of the running step; None between steps, or where nobody could read it any more
    tokens: int | None  # likewise
    last_steps: tuple[StepSeen, ...]  # newest last, five at most
    engine: int | None = None  # the rank's, where its server has several


def bound(recent: np.ndarray, tokens: int | None) -> Bound:
    """How long the step that runs may take.

    Ten times the 99th percentile of recent steps, from entry to end; more in proportion if it works on more
    tokens than any of them; never below 10 s or above 600 s; 120 s before 20 steps are known.

    Args:
        recent: STEP records (see `llmprobe.record.layout`), newest last.
        tokens: query tokens of the step that runs; None: not known.
    """
    real = recent[recent["flags"] & records.EMPTY == 0]
    if len(real) < _ENOUGH_STEPS:
        return Bound(FIRST_SECONDS, f"only {len(real)} steps are known")
    typical = float(np.quantile(_seconds(real), 0.99))
    scale = max((tokens or 0) / max(float(records.tokens(real).max()), 1.0), 1.0)
    wanted = _FACTOR * typical * scale
    reason = f"{_FACTOR:g} x the p99 of {len(real)} recent steps ({typical:.3g} s)"
    if scale > 1:
        reason += f", x {scale:.3g} for its tokens"
    if wanted < LEAST_SECONDS:
        return Bound(LEAST_SECONDS, f"at least {LEAST_SECONDS:g} s; {reason} is less")
    if wanted > MOST_SECONDS:
        return Bound(MOST_SECONDS, f"at most {MOST_SECONDS:g} s; {reason} is more")
    return Bound(wanted, reason)


def find(
    *,
    begun: int,
    begun_ns: int,
    ended: int,
    phase: int,
    tokens: int,
    recent: np.ndarray,
    now_ns: int,
    pending_since_ns: int | None,
    pending_known: bool,
) -> Stall | None:
    """The stall that an engine is in, or None.

    Args:
        begun: number of the step begun last; 0 before the first.
        begun_ns: when that was. Times are nanoseconds of CLOCK_MONOTONIC.
        ended: number of the step ended last.
        phase: of the step begun last, an index of `PHASES`; anything above: not known.
        tokens: query tokens of the step begun last.
        recent: STEP records of this rank, newest last.
        now_ns: now.
        pending_since_ns: since when requests have been unfinished; None if none is.
        pending_known: whether anybody tells. If nobody does, a step that runs is itself work, and between
            steps no stall can be told from having nothing to do.
    """
    if pending_known and pending_since_ns is None:
        return None
    if begun > ended and begun > 0:
        allowed = bound(recent, tokens)
        waited = (now_ns - begun_ns) / 1e9
        if waited < allowed.seconds:
            return None
        label = PHASES[phase] if phase < len(PHASES) else None
        return Stall("step", begun_ns, waited, allowed, begun, label, tokens, last_steps(recent))
    if pending_since_ns is None or not len(recent):
        # Before its first step an engine may load, compile and warm up for as long as it likes.
        return None
    since = max(int(recent["e3"][-1]), begun_ns, pending_since_ns)
    allowed = bound(recent, None)
    if allowed.seconds < BETWEEN_STEPS_SECONDS:
        allowed = Bound(BETWEEN_STEPS_SECONDS, f"at least {BETWEEN_STEPS_SECONDS:g} s between steps")
    waited = (now_ns - since) / 1e9
    if waited < allowed.seconds:
        return None
    return Stall("between_steps", since, waited, allowed, ended, None, None, last_steps(recent))


def last_steps(recent: np.ndarray) -> tuple[StepSeen, ...]:
    """The newest steps of ``recent``, newest last."""
    newest = recent[-_LAST_STEPS:]
    seen = zip(
        newest["step"].tolist(),
        newest["phase"].tolist(),
        records.tokens(newest).tolist(),
        _seconds(newest).tolist(),
        strict=True,
    )
    return tuple(StepSeen(step, PHASES[phase], int(tokens), seconds) for step, phase, tokens, seconds in seen)


def _seconds(rows: np.ndarray) -> records.Floats:
    """From the step's entry on the host to its end on the device, which is how long it was seen to run."""
    taken = rows["e3"] - np.minimum(rows["time"], rows["e0"])
    return np.asarray(np.maximum(taken / 1e9, 0.0), dtype=np.float64)
