"""Follows the ``generate`` calls of this process and records their steps, tokens and requests.

The wrappers in `llmprobe.hooks.transformers` call it through the guard, always in the thread of the call.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from llmprobe.hooks.probe import Probe
from llmprobe.hooks.transformers_cache import cache_length, measure_cache
from llmprobe.hooks.transformers_generation import DRAFT, NESTED, REQUEST, Generation, attention
from llmprobe.hooks.transformers_program import FULL_ONLY, Program
from llmprobe.record.layout import KV_GROUPS, PHASES, Flag, Phase
from llmprobe.record.nvtx import Ranges, ranges
from llmprobe.record.recorder import Recorder

_now = time.monotonic_ns
_PREFILL, _DECODE, _DRAFT = int(Phase.PREFILL), int(Phase.DECODE), int(Phase.DRAFT)
_NO_SAMPLE, _RESTARTED, _EMPTY = int(Flag.NO_SAMPLE), int(Flag.RESTARTED), int(Flag.EMPTY)
_ZEROS = (0,) * KV_GROUPS
_GAPS_HELD = 8  # gaps between tokens are written in groups of this many ...
_GAPS_HELD_NS = 100_000_000  # ... or this often
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

    # Calls ------------------------------------------------------------------------------------------

    def enter(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation | None:
        """A call begins; None if it is not to be followed. Pair with `pop` and `leave`."""
        started = _now()
        outer = self.current.top
        if outer is not None and outer.model is model and not outer.looping and not outer.boundaries:
            return None  # generate handing over to itself (a recipe from the Hub)
        kind = REQUEST if outer is None else DRAFT if _is_assistant(model, kwargs) else NESTED
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
                self._load(program)
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
        if program is None or program.recorder is not self._probe.recorder:
            return
        active = self._probe.active and call.generation == self._probe.generation and not call.stale
        if call.stamps is not None:
            self._abandon(program, call, active)
        call.cache = None
        if active:
            self._write(program)
        if call.kind != REQUEST:
            return
        if active:
            self._record_requests(program, call, result, failed, entered)
        with program.lock:
            if not program.running:
                program.recorder.pending(entered, 0)
            self._load(program)

    def _record_requests(
        self, program: Program, call: Generation, result: Any, failed: bool, ended: int
    ) -> None:
        recorder, times = program.recorder, call.token_times
        if call.live:
            sums = longest = [len(times)] * call.requests
            late = call.gaps
            generated = call.unwritten  # the others were counted as they came
        elif failed:
            sums = longest = [0] * call.requests  # the caller got none
            late, generated = {}, 0
        else:
            sums, longest = call.returned_tokens(result)
            late, generated = call.late_gaps(longest), sum(sums)
            if call.eos and program.device_type != "cpu":
                program.note("rows of a batch that end early are counted with their padding")
        call.own_request_ns += _now() - ended
        recorder.tokens(0, generated, inter_token_ns=late, own_ns=call.own_request_ns)
        ttft = times[0] - call.started if times else -1
        for prompt, total, last in zip(call.prompts, sums, longest, strict=False):
            tpot = -1
            if times and 1 < last <= len(times):
                tpot = (times[last - 1] - times[0]) // (last - 1)
            recorder.request(
                ended,
                ended - call.started,
                ttft_ns=ttft,
                tpot_ns=tpot,
                prompt_tokens=prompt,
                generated_tokens=total,
                cached_tokens=min(call.cached, prompt),
                aborted=failed,
            )

    def _load(self, program: Program) -> None:
        requests = sum(call.requests for call in list(program.running.values()))
        program.recorder.load(requests, 0, unfinished=requests)

    def _program_for(self, model: Any) -> Program | None:
        program, recorder = self._program, self._probe.recorder
        if program is not None and program.recorder is recorder:
            return program
        if recorder is not None:
            return None  # this process is an engine's; its own hooks record
        with self._making:
            if self._program is None or self._program.recorder is not self._probe.recorder:
                self._program = Program.make(self._probe, model)
                self._nvtx = ranges(self._probe.settings.nvtx)
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
        rows, query = ids.shape[:2]
        if not call.number and call.kind != DRAFT:
            self._first_step(call, inputs, args, kwargs, query)
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
        self._open(call, rows, query, entered)

    def _first_step(
        self, call: Generation, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], query: int
    ) -> None:
        """How much of the prompt is in the cache already (a conversation that goes on)."""
        cache = inputs.get("past_key_values")
        past = cache_length(cache)
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
            program.clock.mark(call.stamps, 0)
            call.own_ns += call.stamps.ns[0] - entered
            return
        clock = program.clock
        if program.generation != call.generation:
            program.generation = call.generation
            clock.restart()
        stamps = clock.begin(None)
        if stamps is None:
            return
        call.stamps = stamps
        call.step_rows, call.query = rows, query
        phase = _DRAFT if call.kind == DRAFT else _DECODE if call.token_times else _PREFILL
        call.phase = phase
        call.step_time = entered
        call.number = program.recorder.begin(phase, rows * query, entered)
        if self._nvtx is not None:
            self._nvtx.push(PHASES[phase], rows * query)
        clock.mark(stamps, 0)
        call.own_ns += stamps.ns[0] - entered

    def forward_end(self, call: Generation, outputs: Any, new_tokens: int) -> None:
        """The forward's outputs are there; ``new_tokens`` a row follow from them."""
        call.new_tokens = new_tokens
        stamps = call.stamps
        program = self._program
        if stamps is None or program is None or stamps.ns[1]:
            return  # a class and its base class may both call
        program.clock.mark(stamps, 1)
        if call.kv_walks < _CACHE_WALKS and call.kind == REQUEST:
            call.cache = getattr(outputs, "past_key_values", None)
        # Here, where a GPU still has this forward to run, the record of the step before costs it nothing.
        self._write(program)
        call.own_ns += _now() - stamps.ns[1]

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
        clock.mark(stamps, 3)
        call.stamps = None
        call.provisional = False
        if self._nvtx is not None:
            self._nvtx.pop()
        before, query, rows = call.past, call.query, call.step_rows
        if not call.use_cache:
            before = 0
        else:
            call.past = before + query
            if call.candidates:
                call.past -= max(call.candidates - max(new_tokens - 1, 0), 0)
        call.new_tokens = new_tokens
        prefill = call.phase == _PREFILL
        context = pairs = _ZEROS
        if call.kind != DRAFT:
            context, pairs = _visible(call, rows, before, query)
            self._follow_cache(program, call, rows)
        tokens = rows * query
        counts = (
            rows,
            rows if prefill else 0,
            tokens if prefill else 0,
            0 if prefill else tokens,
            rows * call.candidates,
            rows * call.keep,
        )
        stamps.payload = (
            call.number,
            call.step_time,
            call.phase,
            counts,
            (*context, *_ZEROS, *pairs, *_ZEROS) if prefill else (*_ZEROS, *context, *_ZEROS, *pairs),
            call.own_ns,
            rows * new_tokens,
            program.kv_bytes(call),
        )
        clock.finish(stamps)
        call.own_ns = _now() - stamps.ns[3]  # from here on it is booked on the next step

    def boundary(self, call: Generation, going_on: bool) -> None:
        """The loop has looked whether to go on, and so waited for the device: new tokens are there."""
        now = _now()
        program = self._program
        if program is None or call.stale:
            return
        call.boundaries += 1
        new_tokens, call.new_tokens = call.new_tokens, 0
        if new_tokens:
            self._tokens(program.recorder, call, new_tokens, now)
        if going_on and call.unprepared:
            self._open(call, call.rows, 1 if call.token_times else max(call.prompts), now)
            call.provisional = call.stamps is not None
        else:
            call.own_ns += _now() - now

    def _tokens(self, recorder: Recorder, call: Generation, new_tokens: int, now: int) -> None:
        times = call.token_times
        last = times[-1] if times else 0
        times.extend((now,) * new_tokens)
        if call.kind != REQUEST:
            return
        if not last:
            recorder.tokens(
                sum(call.prompts),
                new_tokens * call.requests if call.live else 0,
                cached=sum(min(call.cached, prompt) for prompt in call.prompts),
                first_token_ns=(now - call.started,) * call.requests,
            )
            call.gaps_since = now
        elif call.live:
            # As engines do: one gap a step, whatever number of tokens a verification accepts at once.
            gap = now - last
            call.gaps[gap] = call.gaps.get(gap, 0) + call.requests
            call.unwritten += new_tokens * call.requests
            if len(call.gaps) >= _GAPS_HELD or now - call.gaps_since > _GAPS_HELD_NS:
                recorder.tokens(0, call.unwritten, inter_token_ns=call.gaps)
                call.gaps, call.unwritten, call.gaps_since = {}, 0, now

    def _follow_cache(self, program: Program, call: Generation, rows: int) -> None:
        """Measure the cache at the first tokens of a request, then go by the number of tokens."""
        if call.cache is not None:
            call.kv_size = size = measure_cache(call.cache, call.past)
            program.measured(call, rows)
            call.kv_walks += 1
            # Once more after the first decode step: only then do sliding layers drop what they can.
            if not any(cap != float("inf") for _, cap in size.growth):
                call.kv_walks = _CACHE_WALKS
            call.cache = None
        if call.kv_size is not None:
            call.kv_bytes = call.kv_size.at(call.past)

    def _abandon(self, program: Program, call: Generation, active: bool) -> None:
        """Close the step of a call that failed inside it, or during which the probe was switched off."""
        stamps = call.stamps
        if stamps is None:
            return
        if active and stamps.ns[1]:
            self._close(call, 0)  # the forward was complete; what followed it failed
            return
        call.stamps = None
        if self._nvtx is not None:
            self._nvtx.pop()
        program.clock.discard(stamps)
        # The step was begun in the journal, so it has to end there too, or it would seem to stall.
        now = _now()
        program.recorder.step(
            call.number,
            call.step_time,
            call.phase,
            program.clock.kind,
            _EMPTY | _RESTARTED | _NO_SAMPLE,
            (now, now, now, now),
            requests=0,
            prefill_requests=0,
            prompt_tokens=0,
            decode_tokens=0,
        )

    def _write(self, program: Program) -> None:
        """Record the steps that are complete on the device."""
        clock, recorder = program.clock, program.recorder
        for done in clock.harvest():
            number, time_ns, phase, counts, visible, own_ns, new_tokens, kv_bytes = done.payload
            flags = _NO_SAMPLE | _RESTARTED if done.restarted else _NO_SAMPLE
            recorder.step_counted(
                number,
                time_ns,
                phase,
                clock.kind,
                flags,
                done.times,
                counts,
                visible,
                own_ns,
                new_tokens,
                kv_bytes,
            )


def _visible(call: Generation, rows: int, before: int, query: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Visible keys and (query, key) pairs of all rows, by KV group."""
    groups = call.groups
    if groups == FULL_ONLY:
        context, pairs = attention(before, query, None)
        return (rows * context, 0, 0, 0), (rows * pairs, 0, 0, 0)
    contexts, all_pairs = [], []
    for kind, window in groups:
        if kind == "recurrent":
            context = pairs = 0
        elif kind == "cross":
            context, pairs = call.cross_length, query * call.cross_length
        else:
            context, pairs = attention(before, query, window)
        contexts.append(rows * context)
        all_pairs.append(rows * pairs)
    padding = _ZEROS[len(groups) :]
    return (*contexts, *padding), (*all_pairs, *padding)


def _is_assistant(model: Any, kwargs: dict[str, Any]) -> bool:
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return bool(getattr(config, "is_assistant", False))
