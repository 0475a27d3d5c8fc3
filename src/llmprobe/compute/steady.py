"""Hysteresis: which verdict stands while the figures waver or the load changes.

A window of 10 s that spans a change of load mixes two loads, and may look like a third one. So a class is
taken up only once the whole window and its last `SHORT_SECONDS` have agreed on it for `SHORT_SECONDS`: a
short window mixes two loads for no longer than it lasts itself, so what it says for longer is true of one
of them. A class that no longer holds, with none to follow yet, falls to `unknown`. A window without a single
step mixes nothing: `idle` is taken up at once then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprobe.compute.verdict import IDLE, UNKNOWN, Verdict

WINDOW_SECONDS = 10.0
SHORT_SECONDS = 3.0
_STARTING = "the first seconds of this load: not seen for long enough"
_CHANGING = "the load is changing: the last 10 s and the last 3 s do not agree"


@dataclass(frozen=True)
class Steady:
    """The verdict that stands on one phase, and what speaks for another. Pure: `observe` gives the next one.

    Attributes:
        shown: the verdict that stands; None before the first.
        since: when its class was taken up (seconds on the caller's clock).
        rival: the class and cause that would follow, and since when they were seen without a break.
        doubted_since: since when the whole window has said another class than ``shown``.
        looked: when the last look was.
    """

    shown: Verdict | None = None
    since: float = 0.0
    rival: tuple[str, str | None] | None = None
    rival_since: float = 0.0
    doubted_since: float | None = None
    looked: float = 0.0

    @property
    def standing(self) -> str | None:
        """The class that thresholds may favour."""
        return self.shown.bottleneck if self.shown is not None else None

    def observe(self, now: float, whole: Verdict, short: Verdict) -> Steady:
        """The state after one look.

        Args:
            now: seconds, not before those of the look before.
            whole: the verdict on the last `WINDOW_SECONDS`.
            short: on the last `SHORT_SECONDS`.
        """
        return replace(self._next(now, whole, short), looked=now)

    def _next(self, now: float, whole: Verdict, short: Verdict) -> Steady:
        shown = self.shown
        if shown is None:
            if whole.bottleneck == IDLE:
                return Steady(whole, now)
            return Steady(_unsure(whole, _STARTING, 0.0), now, *self._next_rival(now, whole, short), now)
        same_class = whole.bottleneck == shown.bottleneck
        if same_class and whole.cause == shown.cause:
            return Steady(replace(whole, held_seconds=now - self.since), self.since)
        if whole.bottleneck == IDLE and whole.steps_per_second == 0:
            return Steady(whole, now)
        rival, rival_since = self._next_rival(now, whole, short)
        if rival is not None and now - rival_since >= SHORT_SECONDS:
            since = self.since if same_class else now
            return Steady(replace(whole, held_seconds=now - since), since)
        doubted = now if self.doubted_since is None else self.doubted_since
        held = now - self.since
        if same_class and whole.cause == "step_running":  # more than was known: nothing to wait for
            return Steady(replace(whole, held_seconds=held), self.since, rival, rival_since)
        if same_class:  # of another cause, for now: the figures of a moment ago stand
            return Steady(replace(shown, held_seconds=held), self.since, rival, rival_since)
        if shown.bottleneck == UNKNOWN:
            why = shown.reason if shown.reason == _STARTING else _CHANGING
            return Steady(_unsure(whole, why, held), self.since, rival, rival_since, doubted)
        if now - doubted >= SHORT_SECONDS:
            return Steady(_unsure(whole, _CHANGING, 0.0), now, rival, rival_since, doubted)
        return Steady(replace(shown, held_seconds=held), self.since, rival, rival_since, doubted)

    def _next_rival(
        self, now: float, whole: Verdict, short: Verdict
    ) -> tuple[tuple[str, str | None] | None, float]:
        # Idle and unknown claim nothing that a mixture of loads could make up.
        key = whole.bottleneck, whole.cause
        if whole.bottleneck not in (IDLE, UNKNOWN) and short.bottleneck != whole.bottleneck:
            if _says_nothing(short) and key == self.rival:
                # A pause of a light load, or a step longer than the short window, says nothing against it,
                # nor for it: the time does not count.
                return key, self.rival_since + (now - self.looked)
            return None, now
        return key, self.rival_since if key == self.rival else now


def _says_nothing(short: Verdict) -> bool:
    return short.bottleneck == IDLE or short.cause == "step_running"


def _unsure(whole: Verdict, why: str, held: float) -> Verdict:
    """``whole`` with everything that depends on its class taken back."""
    return Verdict(
        phase=whole.phase,
        bottleneck=UNKNOWN,
        cause="changing",
        confidence=0.0,
        reason=why,
        missing=(why,),
        evidence=whole.evidence,
        steps_per_second=whole.steps_per_second,
        share_ratio=whole.share_ratio,
        clock=whole.clock,
        held_seconds=held,
    )
