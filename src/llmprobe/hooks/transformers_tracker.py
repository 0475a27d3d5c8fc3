"""Follows the ``generate`` calls of this process and records their steps, tokens and requests.

The wrappers in `llmprobe.hooks.transformers` call it through the guard, always in the thread of the call.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.transformers_cache import cache_among, cache_length, cache_of, measure_cache
from llmprobe.hooks.transformers_generation import DRAFT, NESTED, REQUEST, Generation, is_assistant
from llmprobe.hooks.transformers_program import Program
from llmprobe.hooks.transformers_requests import first_tokens, record_requests, tell_load
from llmprobe.hooks.transformers_steps import Step, write_steps
from llmprobe.record.clock import Stamps, StepClock
from llmprobe.record.layout import PHASES, Phase
from llmprobe.record.nvtx import FORWARD, SAMPLE, Ranges, ranges

_now = time.monotonic_ns
_PREFILL, _DECODE, _DRAFT = int(Phase.PREFILL), int(Phase.DECODE), int(Phase.DRAFT)
#: The housekeeping thread writes the steps: between two steps it would cost several times more, because the
#: model has just emptied the caches. After so many without it the step path looks whether they get too many,
#: and then writes some at a time.
_STEPS_HELD = 128
_AT_ONCE = 4
#: Where that thread may not ask for a device's events the step path writes them: so many together ...
_STEPS_HELD_HERE = 16
_STEPS_HELD_HERE_NS = 20_000_000  # ... or those of so long a time
_CACHE_WALKS = 2  # after the prompt, and once more when sliding windows have settled


class _Current(threading.local):
    top: Generation | None = None


class Tracker:
    """One a process; made by `llmprobe.hooks.transformers.install`."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        #: ``current.top`` is the innermost call running in this thread, or None.
        self.current = _Current()
        self._program: Program | None = None
        self._nvtx: Ranges | None = None
        self._making = threading.RLock()  # once a process, when the journal is made
        probe.writers.append(self.write)

    # Calls ------------------------------------------------------------------------------------------

    def enter(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation | None:
        """A call begins; None if it is not to be followed. Pair with `pop` and `leave`."""
        started = _now()
        outer = self.current.top
        if outer is not None and outer.model is model and not outer.looping and not outer.boundaries:
            return None  # generate handing over to itself (a recipe from the Hub)
        kind = REQUEST if outer is None else DRAFT if is_assistant(model, kwargs) else NESTED
        program = self._program_for(model)
        if program is None or not program.adopt(model, kind == DRAFT):
            return None
        call = Generation(kind, model, outer, started, self._probe.generation)
        call.read_inputs(args, kwargs)
        call.groups = program.groups_of(model)
        # PEFT puts its own method on the instance, which may go round the class's.
        call.unprepared = "prepare_inputs_for_generation" in vars(model)
        if kind == REQUEST:
            self._begin_request(program, call)
        self.current.top = call
        call.own_request_ns += _now() - started
        return call

    def _begin_request(self, program: Program, call: Generation) -> None:
        with program.lock:
            program.running[id(call)] = call
            try:
                if len(program.running) == 1:
                    program.recorder.pending(call.started, call.requests)
                tell_load(program)
            except Exception:
                del program.running[id(call)]
                raise

    def enter_loop(self, call: Generation, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoding loop of a call begins."""
        entered = _now()
        call.read_loop(name, args, kwargs)
        if call.unprepared:
            self._open(call, call.rows, max(call.prompts), entered)
            call.provisional = call.stamps is not None
        call.own_request_ns += _now() - entered

    def pop(self, call: Generation) -> None:
        """The call is over, however it ended. Cannot fail, so that nothing is kept alive."""
        self.current.top = call.parent
        if self._program is not None:
            self._program.running.pop(id(call), None)

    def leave(self, call: Generation, result: Any, failed: bool) -> None:
        """Record a call that is over and popped. ``result`` is what it returned, None if it failed."""
        entered = _now()
        program = self._program
        if program is None or program.recorder is not self._probe.recorder:  # disabled meanwhile
            if call.stamps is not None and self._nvtx is not None:
                self._nvtx.end()
            call.stamps = None
            return
        active = self._probe.active and call.generation == self._probe.generation and not call.stale
        try:
            if call.stamps is not None:  # what else is known of the call counts, should that fail
                self._probe.guard.call_even_inert(
                    "transformers.abandon", self._abandon, program, call, active
                )
            call.cache = None
            if call.kind == REQUEST:  # others are calls in the middle of one
                self._write(program, [call], wait=True)  # what was measured before the probe was off counts
            if call.kind == REQUEST and active:
                record_requests(program, call, result, failed, entered)
        finally:
            if call.kind == REQUEST:
                with program.lock:
                    if not program.running:
                        program.recorder.pending(entered, 0)
                    tell_load(program)
                if active:
                    program.look(call.model)

    def _program_for(self, model: Any) -> Program | None:
        program, recorder = self._program, self._probe.recorder
        if program is not None and program.recorder is recorder:
            return program
        if recorder is not None:
            return None  # this process is an engine's; its own hooks record
        if self._probe.refused:
            return None  # before the model is looked at, which takes milliseconds
        with self._making:
            if self._program is None or self._program.recorder is not self._probe.recorder:
                self._program = Program.make(self._probe, model)
                found = ranges(self._probe.settings.nvtx)
                self._nvtx = found if found.listening else None
            return self._program

    # Steps ------------------------------------------------------------------------------------------

    def before_prepare(self, call: Generation) -> None:
        """The next forward is being prepared: one that is still open was a chunk of the prompt."""
        if not call.provisional:
            self._close(call, 0)

    def begin_step(
        self, call: Generation, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A forward is about to run on ``inputs``, what prepare_inputs_for_generation returned."""
        entered = _now()
        ids = inputs.get("input_ids")
        if ids is None:
            ids = inputs.get("decoder_input_ids")
            if ids is None:
                ids = inputs.get("inputs_embeds")
                if ids is None:
                    return
        shape = ids.shape
        rows, query = shape[0], shape[1]
        if not call.number and call.kind != DRAFT:
            self._first_step(call, inputs, args, kwargs, query)
        if query == 1 and not call.assisted:
            call.keep = 1
        else:
            self._many_queries(call, inputs, args, kwargs, query)
        self._open(call, rows, query, entered)

    def _many_queries(
        self, call: Generation, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], query: int
    ) -> None:
        """How many positions go through the output head, and how many of them are drafted tokens."""
        call.candidates = 0
        if call.assisted:
            whole = args[0] if args else kwargs.get("input_ids")
            if whole is not None:
                known = call.sequence_start + len(call.token_times)
                call.candidates = max(int(whole.shape[1]) - known, 0)
        keep = inputs.get("logits_to_keep", None)
        if keep is None:
            keep = inputs.get("num_logits_to_keep", None)  # before 4.48
        if call.assisted and keep is not None:
            keep = call.candidates + 1  # set by the loop after this
        call.keep = min(keep, query) if isinstance(keep, int) and keep else query

    def _first_step(
        self, call: Generation, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], query: int
    ) -> None:
        """How much of the prompt is in the cache already (a conversation that goes on)."""
        past = cache_length(cache_among(inputs))
        if past is None:
            mask = kwargs.get("attention_mask")
            past = int(mask.shape[1]) - query if mask is not None and len(mask.shape) == 2 else 0
        call.past = max(past, 0) if call.use_cache else 0
        if call.past:
            call.cached = max(max(call.prompts) - query, 0)

    def _open(self, call: Generation, rows: int, query: int, entered: int) -> None:
        program = self._program
        if program is None or call.generation != self._probe.generation:
            call.stale = True
            return
        if call.stamps is not None:  # opened at the boundary before; now it is known better
            call.provisional = False
            call.step_rows, call.query = rows, query
            if self._nvtx is not None:
                self._nvtx.part(FORWARD)
            call.own_ns += _begin(program.clock, call.stamps) - entered
            return
        clock = program.clock
        if program.generation != call.generation:
            program.generation = call.generation
            clock.restart()
        stamps = clock.begin(None)
        if stamps is None:
            return
        call.stamps, call.forwarded = stamps, False
        call.step_rows, call.query = rows, query
        phase = _DRAFT if call.kind == DRAFT else _DECODE if call.token_times else _PREFILL
        call.phase = phase
        call.step_time = entered
        call.number = program.recorder.begin(phase, rows * query, entered)
        if self._nvtx is not None:
            self._nvtx.begin(PHASES[phase], rows * query)
            self._nvtx.part(FORWARD)
        call.own_ns += _begin(clock, stamps) - entered

    def forward_end(self, call: Generation, outputs: Any, new_tokens: int) -> None:
        """The forward's outputs are there; ``new_tokens`` a row follow from them."""
        entered = _now()
        # A tensor in older releases' assisted decoding, which has just read it itself to slice by it.
        call.new_tokens = int(new_tokens)
        stamps = call.stamps
        program = self._program
        if stamps is None or program is None or call.forwarded:
            return  # a class and its base class may both call
        call.forwarded = True
        clock = program.clock
        if clock.immediate:
            stamps.ns[1] = entered
        else:
            clock.mark(stamps, 1)
        if self._nvtx is not None:
            self._nvtx.part(SAMPLE)
        if call.kv_walks < _CACHE_WALKS and call.kind == REQUEST:
            call.cache = cache_of(outputs)
        if clock.elsewhere:
            if program.unwritten >= _STEPS_HELD and clock.crowded:
                self._write(program, [], wait=False, most=_AT_ONCE)
        elif program.unwritten >= _STEPS_HELD_HERE or entered - program.written_at > _STEPS_HELD_HERE_NS:
            self._write(program, [call], wait=False)
        call.own_ns += _now() - entered

    def end_step(self, call: Generation) -> None:
        """The loop looks whether to go on: a step whose forward is over ends here."""
        stamps = call.stamps
        if stamps is None:
            return
        if call.new_tokens or call.boundaries:
            self._close(call, call.new_tokens or 1)

    def _close(self, call: Generation, new_tokens: int) -> None:
        program, stamps = self._program, call.stamps
        if program is None or stamps is None:
            return
        clock = program.clock
        entered = _now()
        if clock.immediate:
            stamps.ns[3] = entered
        else:
            try:
                clock.mark(stamps, 3)
            except Exception:
                self._drop(program, call)
                raise
        call.stamps = None
        call.provisional = False
        if self._nvtx is not None:
            self._nvtx.end()
        before, query, rows = call.past, call.query, call.step_rows
        if not call.use_cache:
            before = 0
        else:
            call.past = before + query
            if call.candidates:
                call.past -= max(call.candidates - max(new_tokens - 1, 0), 0)
        call.new_tokens = new_tokens
        if call.cache is not None:  # a cache that cannot be read costs its size, not the step
            self._probe.guard.call("transformers.cache", self._measure_cache, program, call, rows)
        stamps.payload = Step(
            call.number,
            call.step_time,
            call.phase,
            rows,
            query,
            before,
            call.candidates,
            call.keep,
            new_tokens,
            call.own_ns,
            call.groups,
            call.cross_length,
            call.kv_size,
            call.past,
            0 if len(program.running) <= 1 else program.kv_bytes(),
        )
        clock.finish(stamps)
        program.unwritten += 1
        call.own_ns = _now() - entered  # this end is booked on the next step

    def boundary(self, call: Generation, going_on: bool) -> None:
        """The loop has looked whether to go on, and so waited for the device: new tokens are there."""
        now = _now()
        program = self._program
        if program is None or call.stale:
            return
        call.boundaries += 1
        new_tokens, call.new_tokens = call.new_tokens, 0
        if new_tokens:
            times = call.token_times
            times.append(now)
            if new_tokens > 1:
                times.extend((now,) * (new_tokens - 1))
            if call.tokens_written == 0 and call.kind == REQUEST:
                first_tokens(program.recorder, call, new_tokens, now)
        if going_on and call.unprepared:
            call.keep = 1
            self._open(call, call.rows, 1 if call.token_times else max(call.prompts), now)
            call.provisional = call.stamps is not None
        else:
            call.own_ns += _now() - now

    def _measure_cache(self, program: Program, call: Generation, rows: int) -> None:
        """Walk the cache at the first tokens of a request; from then on the number of tokens tells."""
        walks, cache = call.kv_walks, call.cache
        call.kv_walks, call.cache = _CACHE_WALKS, None  # not again, should it fail
        call.kv_size = size = measure_cache(cache, call.past)
        program.measured(call, cache, rows)
        # Once more after the first decode step: only then do sliding layers drop what they can.
        if any(cap != float("inf") for _, cap in size.growth):
            call.kv_walks = walks + 1

    def _abandon(self, program: Program, call: Generation, active: bool) -> None:
        """Close the step of a call that failed inside it, or during which the probe was switched off."""
        stamps = call.stamps
        if stamps is None:
            return
        if active and call.forwarded:
            self._close(call, 0)  # the forward was complete; what followed it failed
            return
        self._drop(program, call)

    def _drop(self, program: Program, call: Generation) -> None:
        """Forget the open step of a call, and close its range first."""
        stamps, call.stamps = call.stamps, None
        if stamps is None:
            return
        if self._nvtx is not None:
            self._nvtx.end()
        program.clock.discard(stamps)
        program.recorder.abandon(call.number)

    def write(self) -> None:
        """Write what the step path has kept. Runs in the housekeeping thread, a few times a second.

        Where asking for a device's events here would break a graph that another thread captures (ROCm), they
        are left to the thread that runs the model.
        """
        program = self._program
        if program is not None and program.clock.elsewhere:
            self._write(program, list(program.running.values()), wait=False)

    def _write(self, program: Program, calls: list[Generation], wait: bool, most: int | None = None) -> None:
        """Write the steps that are complete on the device, and the tokens of ``calls``.

        Args:
            wait: for another thread that is writing; not on the step path.
            most: steps; None is all.
        """
        if not program.writing.acquire(blocking=wait):
            return
        try:
            if most is None:
                program.unwritten, program.written_at = 0, _now()
                write_steps(program.recorder, program.clock)
            else:
                write_steps(program.recorder, program.clock, most)
            for call in calls:
                if call.live and call.kind == REQUEST and call.tokens_written:
                    tokens, gaps = call.new_gaps()
                    if tokens:
                        program.recorder.tokens(0, tokens, inter_token_ns=gaps)
        finally:
            program.writing.release()


def _begin(clock: StepClock, stamps: Stamps) -> int:
    """Stamp the start of a forward; returns the host's time right after it."""
    if clock.immediate:
        stamps.ns[0] = left = _now()
        return left
    clock.mark(stamps, 0)
    return _now()
