"""What llmprobe runs in every step of one vLLM worker, in the engine's own thread: it stamps times.

Everything there costs ten times what it costs elsewhere, because the model has just emptied the caches: each
function called and each object looked at is one more wait for memory. So the hooks below do inline what would
read better as calls, and note references; see docs/decisions/what-the-step-path-writes.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import seams
from llmprobe.hooks.vllm.batch import note_drafts, note_new
from llmprobe.hooks.vllm.phase import PhaseReader
from llmprobe.hooks.vllm.records import StepRecords
from llmprobe.hooks.vllm.unread import FORGET, NO_ROW, Row
from llmprobe.record.begun import LatestStep
from llmprobe.record.clock import Stamps, StepClock
from llmprobe.record.layout import PHASES, UNKNOWN_PHASE, Flag, Phase
from llmprobe.record.nvtx import FORWARD, SAMPLE, ranges
from llmprobe.record.recorder import Recorder

_now = time.monotonic_ns
#: Steps wait for the housekeeping thread. After so many without it the step path looks whether they get too
#: many, and then writes some at a time.
UNSEEN_AT_MOST = 128
_AT_ONCE = 4
#: On a device's clock a stamp is a CUDA event, which costs the engine 7 to 10 us: where the forward ends and
#: sampling begins is stamped in every fifth step only (no multiple of two: steps may alternate).
_PARTS_EVERY = 5
_NO_SAMPLE, _NO_PARTS = int(Flag.NO_SAMPLE), int(Flag.NO_PARTS)
_DUMMY, _DECODE = int(Phase.DUMMY), Phase.DECODE.label
_NO_DRAFTS: dict[str, int] = {}
#: A seam that was not called in so many steps in a row is given up.
SEAM_MISSED_AT_MOST = 200


class _NothingCached:
    """What is read of vLLM's ``CachedRequestData``, for a step that works on no request."""

    req_ids = num_computed_tokens = resumed_req_ids = ()


class _Padding:
    """What is read of a scheduler's output, for a step that works on no request."""

    total_num_scheduled_tokens = -1
    finished_req_ids = scheduled_new_reqs = ()
    scheduled_cached_reqs = _NothingCached
    num_scheduled_tokens = scheduled_spec_decode_tokens = _NO_DRAFTS


class StepPath:
    """The step in progress, and the hooks that it goes through. Each is called guarded."""

    def __init__(self, probe: Probe, running: seams.Running | None = None) -> None:
        """
        Args:
            running: shared by all workers of the process.
        """
        # What every step looks at comes first, so that it lies together in memory.
        self.armed = False
        self.depth = 0  # wrapped methods call each other through super()
        self._stale = False
        self._off = False  # with `_stale`: the open step is given up, and none begins
        self._marked = False
        self._immediate = True
        self.alone = True  #: See `llmprobe.record.begun.Engine`.
        self._parts = True
        self._stamps: Stamps | None = None  # of the open step
        self._row = NO_ROW  # of the step that began last
        # Of the clock and the recorder, bound once (`use`): so that no step has to look at those.
        self._spare: Stamps | None = None
        self._finish: Callable[[Stamps], None]
        self._record: Callable[[Any, Any], None] | None = None
        self._stream: Any = None  # on which marks were set last
        self._own = 0
        self._unseen = 0  # about so many steps since `write` came by
        self._unseen_most = UNSEEN_AT_MOST
        found = ranges(probe.settings.nvtx).of_one_thread()
        self._nvtx = found if found.listening else None
        self._phases = PhaseReader()  # for ranges
        self._seam: seams.Seam | None = None
        self._running = running or seams.Running()
        self._clock: StepClock | None = None
        self._recorder: Recorder | None = None
        self._records = StepRecords(probe.guard)
        self._unread = self._records.unread
        self._rows = self._unread.rows
        self._probe = probe
        self._seam_missed = (0, 0)  # in how many steps in a row; the last of them
        probe.on_paused.append(self._paused)
        probe.on_resumed.append(self._resumed)
        probe.open_ranges.append(self._in_range)

    def entered(self, scheduled: Any) -> None:
        """``execute_model`` is entered, with a ``SchedulerOutput``."""
        entered = _now()
        if self._stale and not self._start_again():
            return
        if self._stamps is not None:  # the step before never came to its sampling
            self.sample_end(None, _NO_SAMPLE)
        total = scheduled.total_num_scheduled_tokens
        new, drafts = scheduled.scheduled_new_reqs, scheduled.scheduled_spec_decode_tokens
        finished = scheduled.finished_req_ids or ()
        if new:
            new = note_new(new)
            self._stream = None  # a program may run its model on another stream with each call
        else:
            new = ()
        drafts = note_drafts(drafts) if drafts else _NO_DRAFTS
        if not total:  # nothing to run, but requests ended
            self._rows.append((0, entered, finished, 0, (), (), None, new, drafts, None))
            if self._nvtx is not None:
                self._phases.read(finished, 0, (), (), None, new, drafts, None)
            return
        # Of vLLM's containers as few as will do: what is kept, the collection of garbage goes through.
        cached, counts = scheduled.scheduled_cached_reqs, scheduled.num_scheduled_tokens
        whole = None
        try:
            ids, computed = cached.req_ids, cached.num_computed_tokens
            if cached.resumed_req_ids:
                whole = cached
            elif total == len(counts) == len(ids):  # one token each, and none is new
                counts = None
        except AttributeError:  # 0.11; what is missing otherwise is told of where it is read
            ids, computed, whole = None, None, cached
        if self._clock is None:
            return
        number = (self._row[0] if self.alone else self._latest_of_all()) + 1
        row = number, entered, finished, total, ids, computed, counts, new, drafts, whole
        self._rows.append(row)
        self._row = row
        name = _DECODE
        if self._nvtx is not None and (
            counts is not None or total < 0 or finished or self._phases.prefilling
        ):
            name = self._phase(row)  # also of a step that gets no stamps: who follows prompts misses none
        stamps = self._spare
        if stamps is None:
            stamps = self._clock.spare()
            if stamps is None:
                self._none_left()
                return
        self._spare = stamps.next
        stamps.payload = row
        self._stamps = stamps  # from here on, `abandon` gives it back
        self._marked = False
        if self._nvtx is not None:
            self._nvtx.begin(name, max(total, 0))
        if not self._immediate:
            self._parts = number % _PARTS_EVERY == 0
        self._running.steps = self
        self._own += _now() - entered
        # Dummy batches go round the seam, and so does every step of a vLLM without one: their preparation
        # then counts as busy.
        if total < 0 or self._seam is None:
            self.forward_start()

    def _phase(self, row: Row) -> str:
        """The name of the step's range."""
        phase: int | None = None
        try:
            if row[3] > 0:
                phase = self._phases.read(*row[2:])
        except Exception as error:  # noqa: BLE001 - the step is good without its name
            self._probe.guard.failed("vllm.phase", error)
        return PHASES[_DUMMY if phase is None else phase]

    def entered_dummy(self, argument: None) -> None:
        """``execute_dummy_batch`` is entered: padding, so that other data-parallel ranks can go on."""
        self.entered(_Padding)

    def forward_start(self) -> None:
        """The model is about to run. Called by the seam, guarded here."""
        entered = _now()
        stamps = self._stamps
        if stamps is None or self._marked or self._stale:
            return
        try:
            self._marked = True
            if self._nvtx is not None:
                self._nvtx.part(FORWARD)
            if self._immediate:
                stamps.ns[0] = left = _now()
            else:
                if self._parts or self._record is None or self._stream is None:
                    self._clock.mark(stamps, 0)  # type: ignore[union-attr]
                    self._stream = stamps.stream
                else:  # the same; which stream is current, is asked in every fifth step and with new requests
                    stamps.ns[0] = entered
                    stamps.stream = self._stream
                    self._record(stamps.events[0], stamps.stream)
                    stamps.marked = 1
                left = _now()
            self._own += left - entered
        except Exception as error:  # noqa: BLE001 - on vLLM's own call path
            self._probe.guard.failed("vllm.forward_start", error)

    def encode_start(self) -> None:
        """The encoder of a multimodal model is about to run. Called by its seam, guarded here."""
        stamps, clock = self._stamps, self._clock
        if stamps is None or clock is None or self._stale:
            return
        try:
            clock.encode_begin(stamps)
        except Exception as error:  # noqa: BLE001 - on vLLM's own call path
            self._probe.guard.failed("vllm.encode_start", error)

    def encode_end(self) -> None:
        """The encoder has run, on the host. Called by its seam, guarded here."""
        stamps, clock = self._stamps, self._clock
        if stamps is None or clock is None or self._stale:
            return
        try:
            clock.encode_end(stamps)
        except Exception as error:  # noqa: BLE001 - on vLLM's own call path
            self._probe.guard.failed("vllm.encode_end", error)

    def forward_end(self, output: Any) -> None:
        """``execute_model`` returned; with an output, no sampling call follows and the step ends with it."""
        if not self._parts and self._unseen <= self._unseen_most and self._nvtx is None and output is None:
            return  # nothing to stamp; whether the step is stale, its end looks at
        entered = _now()
        stamps = self._stamps
        if stamps is None:
            return
        if self._stale:
            self.abandon()
            return
        if self._immediate:
            stamps.ns[1] = entered
        elif self._parts:
            self._clock.mark(stamps, 1)  # type: ignore[union-attr]
        if self._nvtx is not None:
            self._nvtx.part(None)
        # Here a device has just been given its work, whether or not steps overlap.
        if self._unseen > self._unseen_most:
            self._lend_a_hand()
        self._own += _now() - entered
        if output is not None:
            self.sample_end(None, _NO_SAMPLE)

    def sample_start(self, grammar: Any) -> None:
        """``sample_tokens`` is entered."""
        if not self._parts and self._nvtx is None:
            return  # nothing to stamp; whether the step is stale, its end looks at
        entered = _now()
        stamps = self._stamps
        if stamps is None:
            return
        if self._stale:
            self.abandon()
            return
        if self._nvtx is not None:
            self._nvtx.part(SAMPLE)
        if self._immediate:
            stamps.ns[2] = left = _now()
        else:
            if self._parts:
                self._clock.mark(stamps, 2)  # type: ignore[union-attr]
            left = _now()
        self._own += left - entered

    def sample_end(self, output: Any, flags: int = 0) -> None:
        """``sample_tokens`` returned: the step is over on the host.

        Args:
            flags: those of the step; `Flag.NO_SAMPLE` where another call ended it.
        """
        entered = _now()
        stamps, clock = self._stamps, self._clock
        if stamps is None or clock is None:
            return
        if not self._marked or self._stale:
            self._not_passed()
            self.abandon()
            return
        if self._immediate:
            stamps.ns[3] = entered
        else:
            if self._record is None or not stamps.marked:
                clock.mark(stamps, 3)
            else:  # the same
                self._record(stamps.events[3], stamps.stream)
                stamps.marked |= 8
            if not self._parts:
                flags |= _NO_PARTS
        self._unseen += 1
        if self._nvtx is not None:
            self._nvtx.end()
        # Before the clock has it: from then on another thread may write it.
        stamps.flags = flags
        stamps.own_ns = self._own + _now() - entered
        self._own = 0
        self._stamps = None
        self._finish(stamps)

    def dummy_end(self, output: Any) -> None:
        """``execute_dummy_batch`` returned."""
        self.sample_end(None, _NO_SAMPLE)
        if self._unseen > self._unseen_most:
            # As `forward_end`, which it does not come by. This time is booked on the next step.
            entered = _now()
            self._lend_a_hand()
            self._own += _now() - entered

    def abandon(self) -> None:
        """The host's own call raised, or the model never ran: close the NVTX range and forget the step."""
        stamps = self._stamps
        self._stamps = None
        if stamps is None or self._clock is None:
            return
        try:
            if self._nvtx is not None:  # first: whatever else fails, no range stays open
                self._nvtx.end()
        finally:
            self._clock.discard(stamps)
        if self._recorder is not None:
            self._recorder.abandon(self._row[0])

    def _not_passed(self) -> None:
        """The open step is over, and the seam was not called in it: the model never ran, or ran elsewhere."""
        if self._marked or self._stale or self._clock is None:
            return
        self._clock.dropped += 1
        number, (missed, last) = self._row[0], self._seam_missed
        missed = missed + 1 if number == last + 1 else 1
        self._seam_missed = missed, number
        if missed == SEAM_MISSED_AT_MOST:
            self._seam = None  # steps begin with their entry from here on; `write` says it

    def _paused(self) -> None:
        """The probe is being switched off, mostly by another thread than the engine's.

        The open step belongs to the engine's thread: whichever hook is called next there gives it up. While
        the probe is off, the recorder says that no step is running.
        """
        self._off = True
        self._stale = True
        if self._nvtx is not None and self._nvtx.open:  # this is the engine's thread
            self.abandon()

    def _resumed(self) -> None:
        """The probe is being switched on again. Called in another thread than the engine's."""
        self._off = False
        self._stale = True

    def _in_range(self) -> bool:
        """Whether the engine's thread has an NVTX range open, which only its next hook can close."""
        return self._nvtx is not None and self._stamps is not None

    def _start_again(self) -> bool:
        """Whether the probe is on again; requests came and went unseen."""
        self.abandon()  # the step in which it was switched off, if no hook was called since
        self._stale = False  # before the look: what is switched meanwhile sets it again
        if self._off:
            self._stale = True
            return False
        self._rows.append(FORGET)
        self._phases = PhaseReader()
        self._stream = None
        if self._clock is not None:
            self._clock.restart()
        return True

    def latest(self) -> LatestStep:
        """The step that began last. Any thread may ask."""
        number, time_ns, _, total, *_ = self._row
        return LatestStep(number, time_ns, UNKNOWN_PHASE, max(total, 0))

    def _latest_of_all(self) -> int:
        """Where several workers number their steps for one recorder: the last number of all."""
        return self._row[0] if self._recorder is None else self._recorder.begun

    def _none_left(self) -> None:
        """A step began, and all stamps are in flight."""
        clock, recorder = self._clock, self._recorder
        if clock is not None and recorder is not None:
            clock.dropped += 1
            clock.restart()
            recorder.abandon(self._row[0])
            self._lend_a_hand()

    def _lend_a_hand(self) -> None:
        """The housekeeping thread has not come for long: see that nothing is lost."""
        if self._clock is not None and self._clock.crowded:
            self._records.write(_AT_ONCE)
