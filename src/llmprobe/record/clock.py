"""The step clock: when a step's forward and sampling began and ended, on the device that did the work.

Two back ends behind `StepClock`: `HostClock`, and `CudaClock` in a file of its own; `llmprobe.record.clocks`
chooses. Both give a step four times in nanoseconds of ``CLOCK_MONOTONIC``: e0 forward start, e1 forward end,
e2 sampling start, e3 step end. Use::

    stamps = clock.begin(payload)         # None: no stamps left, the step is dropped and counted
    clock.mark(stamps, 0)                 # ... 1 and 2 may be left out ...
    clock.mark(stamps, 3)
    clock.finish(stamps)                  # or discard(stamps) when the step failed
    for done in clock.harvest(): ...      # done.payload, done.times, done.restarted, done.encode_ns

What a multimodal model's encoder takes before e0 is timed by `encode_begin` and `encode_end`.

Nothing here ever waits for the device.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from llmprobe.record.layout import Clock

_monotonic_ns = time.monotonic_ns
SPARE = 16  #: stamps handed out at once, see `StepClock.spare`
HOST_STEPS_KEPT = 1024  #: steps that wait to be harvested at most, on a host clock


class Stamps:
    """The marks of one step; ``times`` are there once `StepClock.harvest` has returned it."""

    # No constructor: one is made at each step on a CPU, and running one would cost more than all its marks.
    ns: list[int]  #: Host nanoseconds of each mark; afterwards the step's times. 0 where not marked.
    payload: Any = None
    events: Any = None
    stream: Any = None  # where they are recorded
    marked = 0  # bit i: mark i was set
    #: The step before this one was lost, or there is none: the gap before it is not known.
    restarted = False
    encode_ns = 0  #: How long the device worked for an encoder in this step, before e0.
    encodes: tuple[Any, ...] = ()  # pairs of events around it
    # For the hooks; beside `payload`, because a tuple more a step is one more for the collection of garbage.
    flags = 0  #: `llmprobe.record.layout.Flag`
    own_ns = 0  #: llmprobe's own host time in the step.
    next: Stamps | None = None  #: See `StepClock.spare`.

    @property
    def times(self) -> tuple[int, int, int, int]:
        """(e0, e1, e2, e3) in nanoseconds of ``CLOCK_MONOTONIC``.

        A step not marked at e1 counts as one forward up to e3; one not marked at e2 samples from e1 on.
        """
        e0, e1, e2, e3 = self.ns
        e1 = e1 or e3
        return e0, e1, e2 or e1, e3


#: Among finished steps: here some are missing, and how long the gap before the next one was is not known. So
#: that who takes stamps need not look for it.
HOLE = Stamps()


def leave_hole(finished: deque[Stamps]) -> None:
    """Put a `HOLE` behind the last finished step, unless there is one."""
    try:
        if finished[-1] is HOLE:
            return
    except IndexError:
        pass
    finished.append(HOLE)


class StepClock(Protocol):
    """What hooks stamp steps with. Methods are safe in several threads and never block."""

    name: str  #: ``host`` or ``cuda``
    kind: int  #: the same as `llmprobe.record.layout.Clock`
    dropped: int  #: steps that got no stamps, or lost them
    elsewhere: bool  #: whether another thread may `harvest` while the engine's works
    #: Whether a mark is just the host's time: who has just read it may put it into `Stamps.ns` himself.
    immediate: bool
    #: What `mark` calls with an event of `Stamps.events` and `Stamps.stream`, if a mark is an event.
    record: Callable[[Any, Any], None] | None

    @property
    def crowded(self) -> bool:
        """Whether somebody should `harvest` soon, or steps are lost."""

    def begin(self, payload: Any) -> Stamps | None:
        """Stamps for a new step, or None when all are in flight. ``payload`` comes back from `harvest`."""

    def spare(self) -> Stamps | None:
        """Stamps for some steps to come, linked by `Stamps.next`: so that not each step has to ask the clock.
        None when all are in flight.

        Who uses one sets its ``payload``. Who needs one and gets none counts the step in `dropped` and calls
        `restart`.
        """

    def mark(self, stamps: Stamps, index: int) -> None:
        """Stamp time ``index`` (0 to 3) of the step, at this place in the device's queue of work."""

    def encode_begin(self, stamps: Stamps) -> None:
        """An encoder is about to run, before mark 0."""

    def encode_end(self, stamps: Stamps) -> None:
        """It has been given all of its work. May happen again in the same step."""

    def finish(self, stamps: Stamps) -> None:
        """The step is over on the host; without marks 0 and 3 it is dropped when its turn comes."""

    def discard(self, stamps: Stamps) -> None:
        """Forget a step that failed."""

    def harvest(self, most: int = sys.maxsize) -> list[Stamps]:
        """Steps that are complete on the device, in the order of `finish`, the first ``most`` of them. They
        are the caller's until the next `harvest`."""

    def restart(self) -> None:
        """The next step follows a time without stamps (the probe was off)."""


class HostClock:
    """For work that is done when the call returns: a CPU device."""

    name = "host"
    kind = int(Clock.HOST)
    elsewhere = True
    immediate = True
    record: Callable[[Any, Any], None] | None = None

    def __init__(self) -> None:
        self.dropped = 0
        self._lost = True  # the step before the next one is not known
        self._done: deque[Stamps] = deque(maxlen=HOST_STEPS_KEPT)
        #: See `StepClock.finish`.
        self.finish: Callable[[Stamps], None] = self._done.append

    def begin(self, payload: Any) -> Stamps | None:
        """See `StepClock.begin`; never None."""
        stamps = Stamps()
        stamps.ns = [0, 0, 0, 0]
        stamps.payload = payload
        return stamps

    def spare(self) -> Stamps | None:
        """See `StepClock.spare`; never None."""
        spare: Stamps | None = None
        for _ in range(SPARE):
            stamps = Stamps()
            stamps.ns, stamps.next = [0, 0, 0, 0], spare
            spare = stamps
        return spare

    def mark(self, stamps: Stamps, index: int) -> None:
        """See `StepClock.mark`."""
        stamps.ns[index] = _monotonic_ns()

    def encode_begin(self, stamps: Stamps) -> None:
        """See `StepClock.encode_begin`."""
        stamps.encodes = (_monotonic_ns(),)

    def encode_end(self, stamps: Stamps) -> None:
        """See `StepClock.encode_end`."""
        if stamps.encodes:
            stamps.encode_ns += _monotonic_ns() - stamps.encodes[0]
            stamps.encodes = ()

    def discard(self, stamps: Stamps) -> None:
        """See `StepClock.discard`."""
        leave_hole(self._done)

    @property
    def crowded(self) -> bool:
        """See `StepClock.crowded`."""
        return len(self._done) >= HOST_STEPS_KEPT // 2

    def harvest(self, most: int = sys.maxsize) -> list[Stamps]:
        """See `StepClock.harvest`: everything finished so far."""
        done: list[Stamps] = []
        try:
            while len(done) < most:
                stamps = self._done.popleft()
                if stamps is HOLE:
                    self._lost = True
                    continue
                if not (stamps.ns[0] and stamps.ns[3]):
                    self.dropped += 1
                    self._lost = True
                    continue
                if self._lost:
                    self._lost = False
                    stamps.restarted = True
                done.append(stamps)
        except IndexError:
            pass
        return done

    def restart(self) -> None:
        """See `StepClock.restart`."""
        leave_hole(self._done)
