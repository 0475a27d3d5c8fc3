"""Numbers of steps, and which one began last: what a stalled engine is told from an idle one by."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class LatestStep(NamedTuple):
    """The step that began last; all zero before the first."""

    number: int
    time_ns: int  # of CLOCK_MONOTONIC
    phase: int  # `llmprobe.record.layout.Phase`, or UNKNOWN_PHASE
    tokens: int


class Engine(Protocol):
    """Numbers steps itself, see `Begun.join`."""

    #: Whether its own last number is the last of all, so that it need not look at those of others.
    alone: bool

    def latest(self) -> LatestStep:
        """Its step that began last. Any thread may ask."""


class Begun:
    """The steps that began in one process, whoever numbers them. Any thread may ask."""

    def __init__(self) -> None:
        self._engines: tuple[Engine, ...] = ()
        #: Of what `begin` numbered, and of engines that left. As a `LatestStep`, but a plain tuple, which is
        #: made without a call: `begin` is on the step path.
        self._latest = (0, 0, 0, 0)

    @property
    def latest(self) -> LatestStep:
        """Of all of them."""
        latest = [engine.latest() for engine in self._engines]
        # This one is read last: an engine that leaves puts its step there.
        return LatestStep(*max([*latest, self._latest]))

    def begin(self, phase: int, tokens: int, time_ns: int) -> int:
        """A step of somebody who does not number them begins. Returns its number."""
        last = self.latest if self._engines else self._latest
        number = last[0] + 1
        self._latest = (number, time_ns, phase, tokens)
        return number

    def join(self, engine: Engine) -> None:
        """From here on ``engine`` numbers its steps itself, behind the latest one, and never calls `begin`.

        So that its step path touches nothing for it but what it has in hand.
        """
        self._engines = (*self._engines, engine)
        for joined in self._engines:
            joined.alone = len(self._engines) == 1

    def leave(self, engine: Engine) -> None:
        """It begins no more steps."""
        if engine in self._engines:
            self._latest = self.latest
            self._engines = tuple(joined for joined in self._engines if joined is not engine)
