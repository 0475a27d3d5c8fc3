"""The one object through which hooks write: steps, requests and load of this process into its journal.

Several threads may record at once (``generate`` in many threads). Nobody ever waits: whoever finds the
writer busy leaves its event in a queue and goes on, and the busy one writes it.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprobe.record import layout
from llmprobe.record.begun import Begun
from llmprobe.record.directory import prepare_directory
from llmprobe.record.events import CountedStep, JournalEvents
from llmprobe.record.journal import JournalWriter

_QUEUE_LIMIT = 4096
_GIVEN_UP_KEPT = 64  # the last ones are the highest
_LOAD_EVERY_NS = 50_000_000  # twice between two looks of the agent
# Plain integers: enum members cost a microsecond a step.
_KIND_REQUEST = int(layout.Kind.REQUEST)
_KIND_PENDING = int(layout.Kind.PENDING)
_HOST = int(layout.Clock.HOST)
_NONE = (0,) * layout.KV_GROUPS


class Recorder:
    """Writes this process's journal. Methods may be called from any thread and never block."""

    def __init__(self, writer: JournalWriter, facts: Mapping[str, Any]) -> None:
        self.writer = writer
        self._events = JournalEvents(writer)
        self.pid = os.getpid()
        self._facts = dict(facts)
        self._busy = threading.Lock()  # only ever tried, never waited for
        self.closed = False
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque(maxlen=_QUEUE_LIMIT)
        self.steps_begun = Begun()
        self._given_up: deque[int] = deque(maxlen=_GIVEN_UP_KEPT)
        self._described = (0, 0, 0)
        self._published = (0, 0, 0)
        #: When, then what `load` was told.
        self._load: tuple[int, int, int, float, int] = (0, 0, 0, float("nan"), 0)
        self._tokenless = 0
        self._load_due = False
        self._load_written_ns = 0
        self._status = (True, False)
        of = "request" if facts.get("role") == "frontend" else "step"
        self._thread_counter = layout.COUNTER_INDEX[f"thread_ns_{of}"]

    @classmethod
    def open(
        cls, directory: Path, role: str, facts: Mapping[str, Any], size: int = layout.DEFAULT_SIZE
    ) -> Recorder:
        """Make the journal of this process in ``directory``.

        Args:
            directory: the shared directory (``Settings.directory``); made with mode 0700 if missing.
            role: ``worker`` or ``frontend`` of a server, or ``program``.
            facts: see docs/how-it-works.md, "What a journal says about its process".
            size: bytes of the journal.

        Raises:
            JournalError: no journal can be made there.
        """
        journals = prepare_directory(directory)
        path = journals / f"{role}-{os.getpid()}-{secrets.token_hex(4)}.journal"
        return cls(JournalWriter.create(path, facts, size), facts)

    def close(self, remove: bool = False) -> None:
        """End the journal; the agent then drops this process. Waits for a write that is under way."""
        with self._busy:
            self.closed = True
            self._queue.clear()
            self.writer.close(remove=remove)

    @property
    def begun(self) -> int:
        """How many steps began so far."""
        return self.steps_begun.latest.number

    @property
    def facts(self) -> dict[str, Any]:
        """A copy of what the journal says about this process."""
        return dict(self._facts)

    def update_facts(self, **changes: Any) -> None:
        """Change some of the facts. Not for the step path."""
        self._facts.update(changes)
        self._submit(self.writer.set_facts, (dict(self._facts),))

    def begin(self, phase: int, tokens: int, time_ns: int) -> int:
        """A step begins on the host. Returns its number, to be given to `step` or `abandon`.

        Costs no write: `publish` tells readers of it a few times a second, which is soon enough to tell a
        stalled engine from an idle one. ``phase`` may be `layout.UNKNOWN_PHASE` until `describe` tells it.
        """
        return self.steps_begun.begin(phase, tokens, time_ns)

    def describe(self, number: int, phase: int, tokens: int) -> None:
        """What the running step works on, for `publish`; ignored once another one began."""
        self._described = (number, phase, tokens)

    def abandon(self, number: int) -> None:
        """A step that `begin` announced will never be recorded. Costs no write either: `publish` tells it."""
        self._given_up.append(number)

    def step(
        self,
        number: int,
        time_ns: int,
        phase: int,
        clock: int,
        flags: int,
        times: tuple[int, int, int, int],
        *,
        requests: int,
        prefill_requests: int,
        prompt_tokens: int,
        decode_tokens: int,
        draft_tokens: int = 0,
        sampled: int = 0,
        new_tokens: int = 0,
        own_ns: int = 0,
        kv_used_bytes: int = 0,
        encode_ns: int = 0,
        context_prefill: tuple[int, ...] = _NONE,
        context_decode: tuple[int, ...] = _NONE,
        pairs_prefill: tuple[int, ...] = _NONE,
        pairs_decode: tuple[int, ...] = _NONE,
    ) -> None:
        """A step is complete; fields as in `layout.STEP`, ``times`` are e0 to e3."""
        self.step_counted(
            number,
            time_ns,
            phase,
            clock,
            flags,
            times,
            (requests, prefill_requests, prompt_tokens, decode_tokens, draft_tokens, sampled),
            (*context_prefill, *context_decode, *pairs_prefill, *pairs_decode),
            own_ns,
            new_tokens,
            kv_used_bytes,
            encode_ns,
        )

    def step_counted(
        self,
        number: int,
        time_ns: int,
        phase: int,
        clock: int,
        flags: int,
        times: tuple[int, int, int, int],
        counts: tuple[int, ...],
        attention: tuple[int, ...],
        own_ns: int,
        new_tokens: int = 0,
        kv_used_bytes: int = 0,
        encode_ns: int = 0,
    ) -> None:
        """`step` with its counts in the order of the record: the same, a few microseconds cheaper.

        Args:
            counts: requests, prefill requests, prompt, decode and draft tokens, sampled positions.
            attention: context and pairs, prefill and decode each: 16 numbers.
        """
        arguments = (
            number, time_ns, phase, clock, flags, times, counts, attention, own_ns, new_tokens, kv_used_bytes,
            encode_ns,
        )  # fmt: skip
        if not self.closed and not self._queue and self._busy.acquire(False):
            try:
                self._events.step(*arguments)
            finally:
                self._busy.release()
            if self._queue:
                self._drain()
        else:
            self._submit(self._events.step, arguments)

    def steps(self, steps: Sequence[CountedStep], packed: Sequence[bytes]) -> None:
        """Several steps are complete, in order, each with what `CountedStep.packed` gave: with one write.

        A write gives the interpreter lock away, and an engine that is short of it waits for it to come back.
        """
        if steps:
            self._submit(self._events.steps, (steps, packed))

    def publish(self) -> None:
        """Publish the running step, the totals of steps, and what was left for later; off the step path.

        While the hooks are switched off, no step is running: nobody would tell of its end.
        """
        begun, time_ns, phase, tokens = self.steps_begun.latest
        given_up = [self._given_up.popleft() for _ in range(len(self._given_up))]
        if not self._status[0] and begun > self._events.ended:
            given_up.append(begun)
        if given_up:
            self._submit(self._events.end, (max(given_up),))
        described = self._described
        if described[0] == begun:
            _, phase, tokens = described
        state = (begun, self._events.ended, phase)
        if state != self._published:
            self._published = state
            self._submit(self.writer.progress, (begun, time_ns, self._events.ended, phase, tokens))
        if self._events.unflushed:
            self._submit(self._events.flush_steps, ())
        if self._load_due:
            self._submit(self._write_load, ())
        if self._events.tokens_due:
            self._submit(self._events.flush_requests, ())

    def pending(self, time_ns: int, unfinished: int, engine: int = 0) -> None:
        """Work became pending at ``time_ns`` (``unfinished`` > 0), or nothing is pending from then on."""
        self._submit(
            self._events.pending,
            ((time_ns, _KIND_PENDING, 0, _HOST, 0, unfinished, engine),),
        )

    def load(
        self,
        running: int,
        waiting: int,
        kv_usage: float = float("nan"),
        unfinished: int = 0,
        *,
        later: bool = False,
        time_ns: int | None = None,
    ) -> None:
        """Publish the load as it is now; ``kv_usage`` is a ratio of the KV cache's capacity.

        Args:
            later: with the next `publish`, if it was published a moment ago.
            time_ns: CLOCK_MONOTONIC now, for whoever knows it.
        """
        now = time.monotonic_ns() if time_ns is None else time_ns
        self._load = (now, running, waiting, kv_usage, unfinished)
        if later and now - self._load_written_ns < _LOAD_EVERY_NS:
            self._load_due = True
        else:
            self._load_written_ns = now
            self._submit(self._write_load, ())

    def tokenless(self, requests: int) -> None:
        """So many requests of this front end, at whichever engine, had no token yet. With the next `publish`.

        Not a part of `load`: an engine tells that to one of its front ends, and each knows its own requests.
        """
        if requests != self._tokenless:
            self._tokenless = requests
            self._load_due = True

    def status(self, *, armed: bool, inert: bool) -> None:
        """Publish whether the hooks of this process are at work."""
        self._status = (armed, inert)
        self._submit(self._write_load, ())

    def _write_load(self) -> None:
        self._load_due = False
        self.writer.load(*self._load, *self._status, self._tokenless)

    def tokens(
        self,
        prompt: int = 0,
        generated: int = 0,
        *,
        cached: int = 0,
        preemptions: int = 0,
        first_token_ns: tuple[int, ...] = (),
        first_token_queue_ns: tuple[int, ...] = (),
        inter_token_ns: Mapping[int, int] | None = None,
        own_ns: int = 0,
        later: bool = False,
    ) -> None:
        """Tokens that reached the client side: counts, times to first token, and gaps between tokens.

        Args:
            first_token_queue_ns: how long the requests of ``first_token_ns`` were queued; those of which that
                is not known are left out.
            inter_token_ns: duration → how many tokens had it; the tokens of one step share theirs.
            later: publish them with the next `publish`, or with the next `request` that is written at once.
        """
        self._submit(
            self._events.tokens,
            (
                prompt,
                generated,
                cached,
                preemptions,
                first_token_ns,
                first_token_queue_ns,
                inter_token_ns or {},
                own_ns,
                later,
            ),
        )

    def output_lags(self, lags_ns: tuple[int, ...]) -> None:
        """How long after the engine core had made them outputs were ready for their streams, in nanoseconds.

        One an iteration of the engine: what its tokens waited in the front end, detokenizing included.
        Published with the next `publish`.
        """
        self._submit(self._events.output_lags, (lags_ns,))

    def request(
        self,
        time_ns: int,
        duration_ns: int,
        *,
        ttft_ns: int = -1,
        tpot_ns: int = -1,
        queue_ns: int = -1,
        prompt_tokens: int = 0,
        generated_tokens: int = 0,
        cached_tokens: int = 0,
        preemptions: int = 0,
        engine: int = 0,
        finish: int = 0,
        aborted: bool = False,
        known: bool = True,
        later: bool = False,
    ) -> None:
        """A request ended. Times to first token are counted by `tokens`, when they happen, not here.

        Args:
            known: whether ``duration_ns`` is; only then it goes into the histogram.
            later: write it with the next `publish`, or with the next request that ends without this.
        """
        fields = (
            time_ns,
            _KIND_REQUEST,
            0,
            _HOST,
            0,
            duration_ns,
            ttft_ns,
            tpot_ns,
            queue_ns,
            prompt_tokens,
            generated_tokens,
            cached_tokens,
            preemptions,
            engine,
            finish,
        )
        duration = duration_ns if known else -1
        self._submit(self._events.request, (fields, duration, tpot_ns, queue_ns, aborted, later))

    def own_thread(self, cpu_ns: int) -> None:
        """llmprobe's own thread of this process took so much processor time so far. With the next totals."""
        self.writer.counters[self._thread_counter] = cpu_ns

    def error(self) -> None:
        """llmprobe itself failed somewhere in this process."""
        self._submit(self._events.error, ())

    def lost(self, count: int) -> None:
        """So many steps ran and cannot be recorded."""
        self._submit(self._events.lost, (count,))

    def _submit(self, write: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self.closed:
            return
        if not self._queue and self._busy.acquire(blocking=False):
            try:
                write(*arguments)
            finally:
                self._busy.release()
        else:
            if len(self._queue) == _QUEUE_LIMIT:
                self._events.overrun()
            self._queue.append((write, arguments))
        self._drain()

    def _drain(self) -> None:
        # Whoever was busy may have looked at the queue just before something was added to it.
        while self._queue and self._busy.acquire(blocking=False):
            try:
                queued, rest = self._queue.popleft()
                queued(*rest)
            except IndexError:  # another thread took the last one
                pass
            finally:
                self._busy.release()
