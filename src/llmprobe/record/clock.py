"""The step clock: when a step's forward and sampling began and ended, on the device that did the work.

Two back ends behind `StepClock`. Both give a step four times in nanoseconds of ``CLOCK_MONOTONIC``: e0
forward start, e1 forward end, e2 sampling start, e3 step end. Use::

    stamps = clock.begin(payload)         # None: no stamps left, the step is dropped and counted
    clock.mark(stamps, 0)                 # ... 1 and 2 may be left out ...
    clock.mark(stamps, 3)
    clock.finish(stamps)                  # or discard(stamps) when the step failed
    for done in clock.harvest(): ...      # done.payload, done.times, done.restarted, done.encode_ns

What a multimodal model's encoder takes before e0 is timed by `encode_begin` and `encode_end`.

Nothing here ever waits for the device.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from llmprobe.record.layout import Clock

_monotonic_ns = time.monotonic_ns
POOL_SIZE = 512  #: steps that wait to be harvested at most, on a device's clock
_ENCODES_AT_MOST = 8  # timed in one step
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

    @property
    def times(self) -> tuple[int, int, int, int]:
        """(e0, e1, e2, e3) in nanoseconds of ``CLOCK_MONOTONIC``.

        A step not marked at e1 counts as one forward up to e3; one not marked at e2 samples from e1 on.
        """
        e0, e1, e2, e3 = self.ns
        e1 = e1 or e3
        return e0, e1, e2 or e1, e3


class StepClock(Protocol):
    """What hooks stamp steps with. Methods are safe in several threads and never block."""

    name: str  #: ``host`` or ``cuda``
    kind: int  #: the same as `llmprobe.record.layout.Clock`
    dropped: int  #: steps that got no stamps, or lost them
    elsewhere: bool  #: whether another thread may `harvest` while the engine's works
    #: Whether a mark is just the host's time: who has just read it may put it into `Stamps.ns` himself.
    immediate: bool

    @property
    def crowded(self) -> bool:
        """Whether somebody should `harvest` soon, or steps are lost."""

    def begin(self, payload: Any) -> Stamps | None:
        """Stamps for a new step, or None when all are in flight. ``payload`` comes back from `harvest`."""

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

    def __init__(self) -> None:
        self.dropped = 0
        self._restarted = True
        self._lost = False  # the last step looked at was dropped
        self._done: deque[Stamps] = deque(maxlen=HOST_STEPS_KEPT)
        #: See `StepClock.finish`.
        self.finish: Callable[[Stamps], None] = self._done.append

    def begin(self, payload: Any) -> Stamps | None:
        """See `StepClock.begin`; never None."""
        stamps = Stamps()
        stamps.ns = [0, 0, 0, 0]
        stamps.payload = payload
        if self._restarted:
            stamps.restarted = True
            self._restarted = False
        return stamps

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
        self._restarted = True

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
        self._restarted = True


class CudaClock:
    """CUDA events on the stream that is current at a step's first mark; only its last one is ever queried.

    Device times are chained: each step is placed by ``elapsed_time`` from the end of the one before, which
    keeps the single-precision milliseconds of CUDA exact to half a microsecond. The chain is tied to
    ``CLOCK_MONOTONIC`` by what cannot be otherwise: an event never happens before the host recorded it,
    nor after the host saw it done. Whenever the device waits for the host (every first step of a request)
    the first bound is tight to a few microseconds, so that the chain also follows the drift between both.

    `begin` to `finish` of a step run in one thread; `harvest` in any thread if ``elsewhere``, otherwise only
    while no other thread captures a CUDA graph, which asking for an event would break.
    """

    name = "cuda"
    kind = int(Clock.CUDA)
    immediate = False

    def __init__(self, device: Any = None, pool_size: int = POOL_SIZE, *, in_captures: bool = True) -> None:
        """
        Args:
            device: the CUDA device whose current stream is marked; None is the current device.
            pool_size: steps in flight at most.
            in_captures: whether a step may begin or end while its stream is captured into a CUDA graph.
                Asking the driver takes a step 5 us.
        """
        import torch

        self.dropped = 0
        self._in_captures = in_captures
        self._cuda = torch.cuda
        self._device = device
        self._capturing = torch.cuda.is_current_stream_capturing
        if getattr(self._capturing, "__module__", None) == "torch.cuda.graphs":  # it only calls this one
            self._capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", self._capturing)
        self._free: deque[Stamps] = deque()
        for _ in range(pool_size):
            stamps = Stamps()
            stamps.events = [self._new_event() for _ in range(4)]
            self._give_back(stamps)
        self._few = pool_size // 4
        #: For encoders; made when they are needed, so that a model without one pays for none.
        self._free_events: deque[Any] = deque(maxlen=2 * pool_size)
        self._flying: deque[Stamps] = deque()
        self._lost = False  # the last step looked at was dropped
        #: See `StepClock.finish`.
        self.finish: Callable[[Stamps], None] = self._flying.append
        self._harvested: list[Stamps] = []
        self._harvesting = threading.Lock()  # only ever tried, never waited for
        self._restarted = True
        self._last_event: Any = None  # the event of the last harvested step's end ...
        self._last_ns = 0  # ... and when that was
        self._home = threading.get_ident()
        self._visitors = threading.local()
        self.elsewhere = _capture_mode_switch() is not None
        # torch's own methods look up device and stream, and make an object of it, at every call: several
        # microseconds a mark. Where its parts below them are known, those are used.
        event = self._free[0].events[0]
        base = getattr(torch._C, "_CudaEventBase", type(event))
        self._record = (base if isinstance(event, base) else type(event)).record
        self._index = None if device is None else torch.device(device).index
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        if self._index is None:
            self._raw_stream = None
        self._stream: tuple[int, Any] = (-1, None)  # the last stream's handle, and torch's object for it

    def _new_event(self) -> Any:
        return self._cuda.Event(enable_timing=True)

    def _give_back(self, stamps: Stamps) -> None:
        stamps.payload = None
        stamps.ns = [0, 0, 0, 0]
        stamps.marked = 0
        stamps.restarted = False
        stamps.encode_ns = 0
        if stamps.encodes:
            self._free_events.extend(stamps.encodes)
            stamps.encodes = ()
        self._free.append(stamps)

    def begin(self, payload: Any) -> Stamps | None:
        """See `StepClock.begin`."""
        try:
            stamps = self._free.pop()  # used a moment ago: what the driver keeps of its events may be cached
        except IndexError:
            self.dropped += 1
            self._restarted = True
            return None
        stamps.payload = payload
        if self._restarted:
            stamps.restarted = True
            self._restarted = False
        return stamps

    def mark(self, stamps: Stamps, index: int) -> None:
        """See `StepClock.mark`. If ``in_captures``, nothing while the stream is captured into a graph."""
        if index and not stamps.marked:
            return
        # A step that began or ended in a capture has no times, whatever lies between.
        if self._in_captures and index in (0, 3) and self._capturing():
            return
        if index:
            stream = stamps.stream
        else:
            if self._raw_stream is None:
                stream = self._cuda.current_stream(self._device)
            else:
                handle, stream = self._stream
                current = self._raw_stream(self._index)
                if current != handle:
                    stream = self._cuda.current_stream(self._device)
                    self._stream = (current, stream)
            stamps.stream = stream
            stamps.ns[0] = _monotonic_ns()
        self._record(stamps.events[index], stream)
        stamps.marked |= 1 << index

    def encode_begin(self, stamps: Stamps) -> None:
        """See `StepClock.encode_begin`. Nothing while the stream is being captured, or after too many."""
        if len(stamps.encodes) % 2 == 0 and len(stamps.encodes) < 2 * _ENCODES_AT_MOST:
            self._mark_encode(stamps)

    def encode_end(self, stamps: Stamps) -> None:
        """See `StepClock.encode_end`."""
        if len(stamps.encodes) % 2 == 1:
            self._mark_encode(stamps)

    def _mark_encode(self, stamps: Stamps) -> None:
        if self._capturing():
            return
        try:
            event = self._free_events.popleft()
        except IndexError:
            event = self._new_event()
        self._record(event, self._cuda.current_stream(self._device))
        stamps.encodes += (event,)

    def discard(self, stamps: Stamps) -> None:
        """See `StepClock.discard`."""
        self._restarted = True
        self._give_back(stamps)

    @property
    def crowded(self) -> bool:
        """See `StepClock.crowded`."""
        return not self.elsewhere or len(self._free) < self._few

    def harvest(self, most: int = sys.maxsize) -> list[Stamps]:
        """See `StepClock.harvest`. Empty while another thread harvests, or a CUDA graph is captured.

        Raises:
            RuntimeError: the device has an error, or a step's events cannot be read: that step is dropped.
        """
        if self._capturing() or not self._harvesting.acquire(blocking=False):
            return []
        try:
            if threading.get_ident() != self._home and not hasattr(self._visitors, "at_home"):
                self._visit()
                self._visitors.at_home = True
            for stamps in self._harvested:
                self._give_back(stamps)
            self._harvested = []
            while len(self._harvested) < most and self._flying:
                stamps = self._flying[0]
                whole = stamps.marked & 0b1001 == 0b1001
                try:
                    if whole:
                        if not stamps.events[3].query():
                            break
                        self._place(stamps)
                except Exception as error:
                    if _IN_A_CAPTURE not in str(error):
                        if not self._harvested:
                            self._drop(self._flying.popleft())  # it must not come up for ever
                            raise
                        break  # those that are good first; it comes up again
                    whole = False
                self._flying.popleft()
                if not whole:
                    self._drop(stamps)
                    continue
                if self._lost:
                    self._lost = False
                    stamps.restarted = True
                self._harvested.append(stamps)
            return self._harvested
        finally:
            self._harvesting.release()

    def _drop(self, stamps: Stamps) -> None:
        self.dropped += 1
        self._lost = True
        self._give_back(stamps)

    def restart(self) -> None:
        """See `StepClock.restart`."""
        self._restarted = True

    def _visit(self) -> None:
        """Prepare a thread that is not the engine's."""
        # Asking for an event in a thread whose current device is another one can make a context there, which
        # takes half a gigabyte of that device's memory.
        if self._device is not None:
            self._cuda.set_device(self._device)
        switch = _capture_mode_switch()
        if switch is not None:
            switch(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))

    def _place(self, stamps: Stamps) -> None:
        """Replace the host's times of the marks by the device's."""
        seen = _monotonic_ns()
        e0, e1, e2, e3 = stamps.events
        recorded = stamps.ns[0]
        start = recorded
        if self._last_event is not None:
            start = max(recorded, self._last_ns + _ns(self._last_event.elapsed_time(e0)))
        span = _ns(e0.elapsed_time(e3))
        if start + span > seen:
            start = max(seen - span, recorded)
        marked = stamps.marked
        forward = start + _ns(e0.elapsed_time(e1)) if marked & 2 else 0
        sample = start + _ns(e0.elapsed_time(e2)) if marked & 4 else 0
        stamps.ns = [start, forward, sample, start + span]
        # On the same stream it is done with the step. Elsewhere it may not be, and asking would raise.
        encodes = iter(stamps.encodes)
        stamps.encode_ns = sum(
            _ns(begin.elapsed_time(end)) for begin, end in zip(encodes, encodes, strict=False) if end.query()
        )
        self._last_ns = start + span
        # The pooled event would be recorded anew before the next step is placed against it: swap it out.
        if self._last_event is None:
            self._last_event = self._new_event()
        stamps.events[3], self._last_event = self._last_event, e3


#: What CUDA says of an event that was recorded in a capture (``cudaErrorCapturedEvent``); it has no time.
_IN_A_CAPTURE = "last recorded in a capturing stream"
#: ``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: calls of this thread do not break captures of others.
_THREAD_LOCAL = 1


def _capture_mode_switch() -> Any:
    """The driver's ``cuThreadExchangeStreamCaptureMode``; None where there is none (ROCm)."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)


def step_clock(device: Any, *, in_captures: bool = True) -> StepClock:
    """The clock for a ``torch.device`` (or its name): CUDA events on GPUs, else the host's clock.

    Args:
        in_captures: as for `CudaClock`.
    """
    kind = getattr(device, "type", None) or str(device).partition(":")[0]
    return CudaClock(device, in_captures=in_captures) if kind == "cuda" else HostClock()
