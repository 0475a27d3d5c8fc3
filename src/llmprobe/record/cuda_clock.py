"""The step clock of a CUDA device: events between its work, placed on the host's clock."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from llmprobe.record.clock import HOLE, SPARE, Stamps, leave_hole
from llmprobe.record.layout import Clock

_monotonic_ns = time.monotonic_ns
POOL_SIZE = 512  #: steps that wait to be harvested at most
_ENCODES_AT_MOST = 8  # timed in one step
_LOOKED_BACK = 4  # steps from the newest on: engines run one or two ahead of their device


class CudaClock:
    """CUDA events on the stream that is current at a step's first mark (hooks may ask less often); only
    its last one is ever queried.
    Of steps of one stream that are done only the newest is: those before it on that stream are done too.

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
            # What a step sets has its place from the start: CPython makes each of many objects a dictionary
            # of its own for names that come later.
            stamps.stream, stamps.flags, stamps.own_ns, stamps.next = None, 0, 0, None
            self._give_back(stamps)
        self._few = pool_size // 4
        #: For encoders; made when they are needed, so that a model without one pays for none.
        self._free_events: deque[Any] = deque(maxlen=2 * pool_size)
        self._flying: deque[Stamps] = deque()
        self._lost = True  # the step before the next one is not known
        #: See `StepClock.finish`.
        self.finish: Callable[[Stamps], None] = self._flying.append
        self._harvested: list[Stamps] = []
        self._harvesting = threading.Lock()  # only ever tried, never waited for
        self._last_event: Any = None  # the event of the last harvested step's end ...
        self._last_ns = 0  # ... and when that was
        self._home = threading.get_ident()
        self._switch_mode = _capture_mode_switch()
        self.elsewhere = self._switch_mode is not None
        # torch's own methods look up device and stream, and make an object of it, at every call: several
        # microseconds a mark. Where its parts below them are known, those are used.
        event = self._free[0].events[0]
        base = getattr(torch._C, "_CudaEventBase", type(event))
        below = base if isinstance(event, base) else type(event)
        #: See `StepClock.record`. Nothing may be captured into a graph meanwhile.
        self.record: Callable[[Any, Any], None] | None = below.record
        self._record, self._done, self._elapsed_ms = below.record, below.query, below.elapsed_time
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
            leave_hole(self._flying)
            return None
        stamps.payload = payload
        return stamps

    def spare(self) -> Stamps | None:
        """See `StepClock.spare`."""
        spare: Stamps | None = None
        try:
            for _ in range(SPARE):
                stamps = self._free.pop()  # as in `begin`
                stamps.next = spare
                spare = stamps
        except IndexError:
            pass
        return spare

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
        leave_hole(self._flying)
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
        if not self._harvesting.acquire(blocking=False):
            return []
        try:
            if threading.get_ident() == self._home:
                return self._harvest(most)
            with self._visit():
                return self._harvest(most)
        finally:
            self._harvesting.release()

    def _harvest(self, most: int) -> list[Stamps]:
        if self._capturing():
            return []
        for stamps in self._harvested:
            self._give_back(stamps)
        self._harvested = []
        done = self._newest_done(most)
        while len(self._harvested) < most and self._flying:
            stamps = self._flying[0]
            if stamps is HOLE:
                self._flying.popleft()
                self._lost = True
                continue
            whole = _whole(stamps)
            try:
                if whole:
                    if done is None or not (stamps.stream is done.stream or stamps.stream == done.stream):
                        if not self._done(stamps.events[3]):
                            break
                    elif stamps is done:
                        done = None  # those behind it have to be asked
                    self._place(stamps)
            except Exception as error:
                if done is not None:
                    # It has not been asked: of two threads on one stream the one that finished first may
                    # have been the last to record its end. It comes up again, as any other.
                    done = None
                    continue
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

    def _newest_done(self, most: int) -> Stamps | None:
        """The newest of the first ``most`` steps that is seen to be done, if it is among the last few.

        Each question is a call into the driver with the interpreter lock held, which an engine is short of.
        """
        last = min(most, len(self._flying)) - 1
        for index in range(last, max(last - _LOOKED_BACK, 0), -1):  # the oldest is asked anyway
            stamps = self._flying[index]
            try:
                if _whole(stamps) and self._done(stamps.events[3]):
                    return stamps
            except Exception:  # noqa: BLE001 - it raises again when its turn comes
                continue
        return None

    def _drop(self, stamps: Stamps) -> None:
        self.dropped += 1
        self._lost = True
        self._give_back(stamps)

    def restart(self) -> None:
        """See `StepClock.restart`."""
        leave_hole(self._flying)

    @contextlib.contextmanager
    def _visit(self) -> Iterator[None]:
        """In a thread that is not the engine's: its device is the current one, and calls break no capture.

        Afterwards both are as they were: it may be a thread of the program. Asking for an event while another
        device is the current one can make a context there, which takes half a gigabyte of its memory.
        """
        switch, mode = self._switch_mode, ctypes.c_int(_THREAD_LOCAL)
        with contextlib.ExitStack() as stack:
            if self._device is not None:
                stack.enter_context(self._cuda.device(self._device))
            if switch is not None:
                switch(ctypes.byref(mode))  # which then holds the mode before
                stack.callback(switch, ctypes.byref(mode))
            yield

    def _place(self, stamps: Stamps) -> None:
        """Replace the host's times of the marks by the device's."""
        seen = _monotonic_ns()
        e0, e1, e2, e3 = stamps.events
        elapsed_ms = self._elapsed_ms
        recorded = stamps.ns[0]
        start = recorded
        if self._last_event is not None:
            start = max(recorded, self._last_ns + _ns(elapsed_ms(self._last_event, e0)))
        span = _ns(elapsed_ms(e0, e3))
        if start + span > seen:
            start = max(seen - span, recorded)
        marked = stamps.marked
        forward = start + _ns(elapsed_ms(e0, e1)) if marked & 2 else 0
        sample = start + _ns(elapsed_ms(e0, e2)) if marked & 4 else 0
        stamps.ns = [start, forward, sample, start + span]
        # On the same stream it is done with the step. Elsewhere it may not be, and asking would raise.
        if stamps.encodes:
            encodes = iter(stamps.encodes)
            stamps.encode_ns = sum(
                _ns(elapsed_ms(begin, end))
                for begin, end in zip(encodes, encodes, strict=False)
                if self._done(end)
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


def _whole(stamps: Stamps) -> bool:
    return stamps.marked & 0b1001 == 0b1001


def _ns(milliseconds: float) -> int:
    return round(milliseconds * 1e6)
