"""What each event does to a journal: a record in its ring, counters, histograms.

Whoever holds the writer calls these, one at a time; see `llmprobe.record.recorder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmprobe.record import layout
from llmprobe.record.journal import JournalWriter

_INDEX = layout.COUNTER_INDEX
_SPAN = _INDEX["span_ns_prefill"]  # steps_* come first, each family in the order of the phases
_GAP = _INDEX["gap_ns_prefill"]
_FIRST_STEP_HISTOGRAM = layout.HISTOGRAM_INDEX["step_prefill"]
_STEP_HISTOGRAMS = sum(name.startswith("step_") for name in layout.HISTOGRAMS)
_FLUSH_AT_LATEST = 1024  # steps: well before the ring comes round, should nobody call publish()
_ENDED_AT_MOST = 256  # requests, likewise
_STEP_PACK = layout.STEP_PACK
_OWN_AT_MOST = 0xFFFFFFFF
_TTFT = layout.HISTOGRAM_INDEX["time_to_first_token"]
_TPOT = layout.HISTOGRAM_INDEX["time_per_output_token"]
_ITL = layout.HISTOGRAM_INDEX["inter_token_latency"]
_DURATION = layout.HISTOGRAM_INDEX["request_duration"]
_QUEUE = layout.HISTOGRAM_INDEX["request_queue"]
_LAG = layout.HISTOGRAM_INDEX["output_lag"]
_STEP_PROMPT = _INDEX["step_prompt_tokens"]
_STEP_DECODE = _INDEX["step_decode_tokens"]
_OWN_STEP = _INDEX["own_ns_step"]
_OWN_REQUEST = _INDEX["own_ns_request"]
_PROMPT = _INDEX["prompt_tokens"]
_GENERATED = _INDEX["generated_tokens"]
_CACHED = _INDEX["cached_tokens"]
_PREEMPTIONS = _INDEX["preemptions"]
_REQUESTS = _INDEX["requests"]
_ABORTED = _INDEX["requests_aborted"]
_SUM_TTFT = _INDEX["sum_ns_time_to_first_token"]
_SUM_TPOT = _INDEX["sum_ns_time_per_output_token"]
_SUM_ITL = _INDEX["sum_ns_inter_token_latency"]
_SUM_DURATION = _INDEX["sum_ns_request_duration"]
_SUM_QUEUE = _INDEX["sum_ns_request_queue"]
_SUM_LAG = _INDEX["sum_ns_output_lag"]
_FIRST_QUEUED = _INDEX["first_tokens_queued"]
_SUM_FIRST_QUEUE = _INDEX["sum_ns_first_token_queue"]
# Plain integers: enum members cost a microsecond a step.
_KIND_STEP = int(layout.Kind.STEP)
_RESTARTED = int(layout.Flag.RESTARTED)


class CountedStep(NamedTuple):
    """A step that is complete; fields as in `llmprobe.record.layout.STEP`, ``times`` are e0 to e3.

    ``counts``: requests, prefill requests, prompt, decode and draft tokens, sampled positions.
    ``attention``: context and pairs, prefill and decode each: 16 numbers.
    """

    number: int
    time_ns: int
    phase: int
    clock: int
    flags: int
    times: tuple[int, int, int, int]
    counts: tuple[int, ...]
    attention: tuple[int, ...]
    own_ns: int
    new_tokens: int = 0
    kv_used_bytes: int = 0
    encode_ns: int = 0

    def packed(self) -> bytes:
        """Its record, without a ``seq`` yet. struct.error if a field does not fit."""
        # Unpacked at once: twelve names looked up one by one take longer than all the packing.
        number, time_ns, phase, clock, flags, times, counts, attention, own_ns, new, kv_used, encode_ns = self
        if own_ns > _OWN_AT_MOST:
            own_ns = _OWN_AT_MOST
        return _STEP_PACK.pack(
            0, time_ns, _KIND_STEP, phase, clock, flags, number, *times, *counts, new, own_ns, kv_used,
            encode_ns, *attention,
        )  # fmt: skip


class JournalEvents:
    """Writes events into the journal of one process. Not thread-safe; the arguments are the recorder's."""

    def __init__(self, writer: JournalWriter) -> None:
        self._writer = writer
        self.ended = 0  # the highest number of a step that is over
        self.unflushed = 0  # steps that were written and whose totals readers do not see yet
        self.tokens_due = False
        self._last_end = 0
        self._ended: list[bytes] = []  # records of requests, left for later

    def end(self, number: int) -> None:
        """A step is over, recorded or not."""
        # As all that is read and then written, not outside: it must not go back.
        if number > self.ended:
            self.ended = number

    def step(
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
        new_tokens: int,
        kv_used_bytes: int,
        encode_ns: int,
    ) -> None:
        """A step is complete; as `Recorder.step_counted`."""
        writer = self._writer
        e0, _, _, e3 = times
        if own_ns > _OWN_AT_MOST:
            own_ns = _OWN_AT_MOST
        writer.append(
            _STEP_PACK, time_ns, _KIND_STEP, phase, clock, flags, number, *times, *counts, new_tokens, own_ns,
            kv_used_bytes, encode_ns, *attention,
        )  # fmt: skip
        self._count(number, phase, flags, e0, e3, counts, own_ns)
        if self.unflushed >= _FLUSH_AT_LATEST:
            self.flush_steps()

    def steps(self, steps: Sequence[CountedStep], packed: Sequence[bytes]) -> None:
        """Several are complete, in order, with the record of each: one write, and no further one each."""
        writer = self._writer
        before = writer.written
        try:
            writer.append_packed(packed)
        finally:  # those that are in the journal count, also where the write of the others failed
            self._count_several(steps[: writer.written - before])

    def _count_several(self, steps: Sequence[CountedStep]) -> None:
        for step in steps:
            number, _, phase, _, flags, (e0, _, _, e3), counts, _, own_ns, _, _, _ = step
            self._count(number, phase, flags, e0, e3, counts, min(own_ns, _OWN_AT_MOST))
        if self.unflushed >= _FLUSH_AT_LATEST:
            self.flush_steps()

    def _count(
        self, number: int, phase: int, flags: int, e0: int, e3: int, counts: tuple[int, ...], own_ns: int
    ) -> None:
        """Add a step to the totals."""
        counters = self._writer.counters
        counters[phase] += 1
        span = e3 - e0
        if span > 0:
            counters[_SPAN + phase] += span
        last = self._last_end
        if e0 > last and last and not flags & _RESTARTED:
            counters[_GAP + phase] += e0 - last
        if e3 > last:
            self._last_end = e3
        counters[_STEP_PROMPT] += counts[2]
        counters[_STEP_DECODE] += counts[3]
        counters[_OWN_STEP] += own_ns
        if number > self.ended:
            self.ended = number
        if phase < _STEP_HISTOGRAMS:
            self._writer.observe(_FIRST_STEP_HISTOGRAM + phase, span)
        self.unflushed += 1

    def flush_steps(self) -> None:
        """Let readers see the totals of the steps written so far."""
        self.unflushed = 0
        self._writer.flush_steps()

    def tokens(
        self,
        prompt: int,
        generated: int,
        cached: int,
        preemptions: int,
        first_token_ns: tuple[int, ...],
        first_token_queue_ns: tuple[int, ...],
        inter_token_ns: Mapping[int, int],
        own_ns: int,
        later: bool,
    ) -> None:
        """Tokens reached the client side; as `Recorder.tokens`."""
        writer = self._writer
        counters = writer.counters
        counters[_PROMPT] += prompt
        counters[_GENERATED] += generated
        counters[_CACHED] += cached
        counters[_PREEMPTIONS] += preemptions
        counters[_OWN_REQUEST] += own_ns
        counters[_SUM_TTFT] += sum(first_token_ns)
        counters[_FIRST_QUEUED] += len(first_token_queue_ns)
        counters[_SUM_FIRST_QUEUE] += sum(first_token_queue_ns)
        counters[_SUM_ITL] += sum(duration * times for duration, times in inter_token_ns.items())
        for duration in first_token_ns:
            writer.observe(_TTFT, duration)
        for duration, times in inter_token_ns.items():
            writer.observe(_ITL, duration, times)
        if later:
            self.tokens_due = True
        else:
            self.flush_requests()

    def output_lags(self, lags_ns: tuple[int, ...]) -> None:
        """The front end was done with outputs of the engine; as `Recorder.output_lags`."""
        for lag in lags_ns:
            self._writer.observe(_LAG, lag)
        self._writer.counters[_SUM_LAG] += sum(lags_ns)
        self.tokens_due = True

    def flush_requests(self) -> None:
        """Let readers see the requests that were left for later, and the totals of requests and tokens."""
        self._write_ended()
        self.tokens_due = False
        self._writer.flush_requests()

    def _write_ended(self) -> None:
        if self._ended:
            ended, self._ended = self._ended, []
            self._writer.append_packed(ended)

    def pending(self, fields: tuple[Any, ...]) -> None:
        """Work is pending, or nothing is any more: fields of that record. Ends of requests come before it."""
        self._write_ended()
        self._writer.append(layout.PENDING_PACK, *fields)

    def request(
        self,
        fields: tuple[Any, ...],
        duration_ns: int,
        tpot_ns: int,
        queue_ns: int,
        aborted: bool,
        later: bool,
    ) -> None:
        """A request ended: fields of its record, and durations in nanoseconds, negative where not known."""
        writer = self._writer
        # Packed here: one that does not fit costs none of the others.
        self._ended.append(layout.REQUEST_PACK.pack(0, *fields))
        counters = writer.counters
        counters[_REQUESTS] += 1
        counters[_ABORTED] += aborted
        counters[_SUM_DURATION] += max(duration_ns, 0)
        counters[_SUM_TPOT] += max(tpot_ns, 0)
        counters[_SUM_QUEUE] += max(queue_ns, 0)
        if duration_ns >= 0:
            writer.observe(_DURATION, duration_ns)
        if tpot_ns >= 0:
            writer.observe(_TPOT, tpot_ns)
        if queue_ns >= 0:
            writer.observe(_QUEUE, queue_ns)
        if later and len(self._ended) < _ENDED_AT_MOST:
            self.tokens_due = True
        else:
            self.flush_requests()

    def error(self) -> None:
        """llmprobe itself failed somewhere in this process."""
        self._writer.counters[_INDEX["errors"]] += 1
        self._writer.flush_requests()

    def lost(self, count: int) -> None:
        """So many steps ran and cannot be recorded."""
        self._writer.counters[_INDEX["dropped"]] += count
        self._writer.flush_requests()

    def overrun(self) -> None:
        """An event was lost because too many wait. Called by any thread: readers see it at the next flush."""
        self._writer.counters[_INDEX["dropped"]] += 1
