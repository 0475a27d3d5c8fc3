"""What one scheduled batch asks of the model: phase, tokens, context and attention pairs.

Read off vLLM's ``SchedulerOutput``. vLLM's own helpers take any request with more than one scheduled
token for a prompt (so drafts look like prefill) and resumed requests for decoding; here a request is
prefilling until the tokens it had when it was (re)admitted are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llmprobe.hooks.attention import visible_attention
from llmprobe.record.layout import KV_GROUPS, Phase

_PREFILL, _DECODE, _MIXED = int(Phase.PREFILL), int(Phase.DECODE), int(Phase.MIXED)
_ZEROS = (0,) * KV_GROUPS
_FEW = 8  # prompts looked up one by one beside many decodes


class Batch(NamedTuple):
    """Counts of one step, in the order of the step record; see `llmprobe.record.layout.STEP` for each."""

    phase: int
    #: requests, prefill requests, prompt tokens, decode tokens, draft tokens, sampled positions
    counts: tuple[int, int, int, int, int, int]
    #: context of prefilling and of decoding requests, then pairs likewise, `KV_GROUPS` numbers each
    attention: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Query tokens."""
        return self.counts[2] + self.counts[3]


DUMMY = Batch(int(Phase.DUMMY), (0, 0, 0, 0, 0, 0), (0,) * (4 * KV_GROUPS))


class NewRequest(NamedTuple):
    """A request that this step is the first to work on."""

    req_id: str
    length: int  # tokens of its prompt, or all it had when it was resumed
    computed: int  # of them, by the prefix cache


class Noted(NamedTuple):
    """What a ``SchedulerOutput`` says, kept to be read when the step is over.

    vLLM makes these containers anew for each step and leaves them alone; what it goes on changing (the tokens
    of a request, drafts) is here as numbers.
    """

    finished: Any  # ids of requests that ended since the last output
    total: int  # scheduled tokens
    ids: Any  # of the requests that are not new
    computed: Any  # their tokens before this step
    counts: dict[str, int] | None  # id → scheduled tokens; None: one for each of `ids`, and none is new
    new: tuple[NewRequest, ...]
    drafts: dict[str, int]  # id → draft tokens among them
    #: vLLM's CachedRequestData where requests come back, or where it does not say so in one word (0.11); then
    #: it is what counts, and not `ids` and `computed`.
    cached: Any


def note_new(requests: Any) -> tuple[NewRequest, ...]:
    """Note ``SchedulerOutput.scheduled_new_reqs``."""
    return tuple(map(_new_request, requests))


def note_drafts(drafts: Any) -> dict[str, int]:
    """Note ``SchedulerOutput.scheduled_spec_decode_tokens``."""
    return {req_id: len(tokens) for req_id, tokens in drafts.items()}


def _new_request(new: Any) -> NewRequest:
    # The V2 runner re-sends a resumed request as new, with all the tokens it must recompute.
    tokens = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids
    if tokens is not None:
        length = len(tokens)
    else:
        embeds = getattr(new, "prompt_embeds", None)
        length = embeds.shape[0] if embeds is not None else 0
    return NewRequest(new.req_id, length, new.num_computed_tokens)


class BatchReader:
    """Follows the requests of one engine from step to step."""

    def __init__(self, windows: tuple[int | None, ...] = (None,)) -> None:
        #: Visible window of each KV-cache group in tokens, None where everything is visible.
        self.windows = windows
        #: Requests whose prompt (or what they had when they were resumed) is not computed yet → its length.
        self._prefilling: dict[str, int] = {}
        self._prompt: dict[str, int] = {}

    def read(self, noted: Noted) -> Batch | None:
        """The batch of a noted ``SchedulerOutput``, or None for one without tokens (a "flush").

        Every output of the engine must come by once, in order.
        """
        finished, total, ids, computed, counts, new, _, cached = noted
        for req_id in finished:
            self._prefilling.pop(req_id, None)
            self._prompt.pop(req_id, None)
        for request in new:
            self._prompt[request.req_id] = self._prefilling[request.req_id] = request.length
        if total == 0:
            return None
        if cached is not None:
            ids, computed = cached.req_ids, cached.num_computed_tokens
            for req_id, output in resumed(cached):
                self._prefilling[req_id] = self._prompt.get(req_id, 0) + output
        one_each = counts is None or (total == len(counts) and not new)
        prefilling = self._prefilling
        if one_each and not (
            prefilling and any(req_id in prefilling for req_id in (ids if counts is None else counts))
        ):
            return self._plain_decode(computed, total)
        if counts is None:
            counts = dict.fromkeys(ids, 1)
        return self._any(noted._replace(ids=ids, computed=computed), counts)

    def _plain_decode(self, computed: list[int], total: int) -> Batch:
        """One token for every request: the common step, kept to a few microseconds."""
        full = sum(computed) + total
        context: tuple[int, ...]
        if self.windows == (None,):
            context = (full, 0, 0, 0)
        else:
            lengths = np.asarray(computed, dtype=np.int64) + 1
            context = _pad(
                full if window is None else int(np.minimum(lengths, window).sum()) for window in self.windows
            )
        # One query each: as many pairs as visible keys.
        return Batch(_DECODE, (total, 0, 0, total, 0, total), (*_ZEROS, *context, *_ZEROS, *context))

    def _any(self, noted: Noted, counts: dict[str, int]) -> Batch:
        """Any batch: requests that generate are counted together, the others one by one."""
        drafts = noted.drafts
        total = _Counts(self.windows)
        one_by_one = [(new.req_id, new.computed) for new in noted.new]
        ids: list[str] = noted.ids
        if ids and not drafts and self.windows == (None,) and self._plain(noted, counts, one_by_one, total):
            pass
        elif ids:
            prefilling = self._prefilling
            before = np.array(noted.computed, dtype=np.int64)
            query = np.array([counts.get(req_id, 0) for req_id in ids], dtype=np.int64)
            drafted = np.zeros_like(query)
            if drafts:
                drafted = np.array([drafts.get(req_id, 0) for req_id in ids], dtype=np.int64)
            alone = query - drafted > 1
            if prefilling:
                alone |= np.array([req_id in prefilling for req_id in ids])
            if alone.any():
                one_by_one += [(ids[row], int(before[row])) for row in np.flatnonzero(alone)]
                rest = ~alone
                before, query, drafted = before[rest], query[rest], drafted[rest]
            total.add_decodes(before, query, drafted)
        for req_id, computed in one_by_one:
            scheduled_tokens = counts.get(req_id, 0)
            drafted_tokens = drafts.get(req_id, 0)
            target = self._prefilling.get(req_id)
            if target is not None and computed >= target and scheduled_tokens - drafted_tokens <= 1:
                self._prefilling.pop(req_id, None)
                total.add(True, computed, scheduled_tokens, 1 + drafted_tokens, drafted_tokens)
                continue
            complete = target is None or computed + scheduled_tokens >= target
            if complete:
                self._prefilling.pop(req_id, None)
            total.add(False, computed, scheduled_tokens, int(complete), 0)
        return total.batch(len(counts))

    def _plain(
        self, noted: Noted, counts: dict[str, int], one_by_one: list[tuple[str, int]], total: _Counts
    ) -> bool:
        """The common mixed step, cheaply: all but a few prompts generate one token each.

        Counts those and appends the prompts to ``one_by_one``; False, with nothing done, if it is not so.
        """
        ids: list[str] = noted.ids
        computed: list[int] = noted.computed
        new = {req_id for req_id, _ in one_by_one}
        chunks = [req_id for req_id in self._prefilling if req_id in counts and req_id not in new]
        decodes = len(ids) - len(chunks)
        prompts = sum(counts[req_id] for req_id in (*new, *chunks))
        if len(chunks) > _FEW or noted.total - prompts != decodes:
            return False
        rows = [ids.index(req_id) for req_id in chunks]
        total.add_plain_decodes(decodes, sum(computed) - sum(computed[row] for row in rows))
        one_by_one += [(ids[row], computed[row]) for row in rows]
        return True


class _Counts:
    """Sums over the requests of one batch; index 0 is prefill, 1 decode."""

    def __init__(self, windows: tuple[int | None, ...]) -> None:
        self._windows = windows
        self._tokens = [0, 0]
        self._prefill_requests = self._drafted = self._sampled = 0
        self._context = ([0] * len(windows), [0] * len(windows))
        self._pairs = ([0] * len(windows), [0] * len(windows))

    def add(self, decoding: bool, before: int, query: int, sampled: int, drafted: int) -> None:
        """One request."""
        self._prefill_requests += not decoding
        self._tokens[decoding] += query
        self._sampled += sampled
        self._drafted += drafted
        for group, window in enumerate(self._windows):
            visible, seen = visible_attention(before, query, window)
            self._context[decoding][group] += visible
            self._pairs[decoding][group] += seen

    def add_plain_decodes(self, requests: int, computed: int) -> None:
        """Requests of one query each that see everything before it: ``computed`` tokens in all."""
        self._tokens[1] += requests
        self._sampled += requests
        self._context[1][0] += computed + requests
        self._pairs[1][0] += computed + requests

    def add_decodes(self, before: np.ndarray, query: np.ndarray, drafted: np.ndarray) -> None:
        """Requests that generate; the formulas of `visible_attention`, for all of them at once."""
        self._tokens[1] += int(query.sum())
        drafts = int(drafted.sum())
        self._drafted += drafts
        self._sampled += len(query) + drafts
        end = before + query
        whole = query * before + query * (query + 1) // 2
        for group, window in enumerate(self._windows):
            if window is None:
                visible, pairs = end, whole
            else:
                growing = np.clip(window - before, 0, query)
                beyond = growing * before + growing * (growing + 1) // 2 + (query - growing) * window
                visible = np.minimum(end, window + query - 1)
                pairs = np.where(end <= window, whole, beyond)
            self._context[1][group] += int(visible.sum())
            self._pairs[1][group] += int(pairs.sum())

    def batch(self, requests: int) -> Batch:
        """The sums as a `Batch`."""
        prompt, generated = self._tokens
        phase = _PREFILL if not generated else _DECODE if not prompt else _MIXED
        return Batch(
            phase,
            (requests, self._prefill_requests, prompt, generated, self._drafted, self._sampled),
            (
                *_pad(self._context[0]),
                *_pad(self._context[1]),
                *_pad(self._pairs[0]),
                *_pad(self._pairs[1]),
            ),
        )


def resumed(cached: Any) -> list[tuple[str, int]]:
    """Requests that come back from preemption in this step, with how many tokens they had generated."""
    ids = getattr(cached, "resumed_req_ids", None)
    if ids is None:  # 0.11: a list of flags
        flags = getattr(cached, "resumed_from_preemption", ())
        ids = {req_id for req_id, flag in zip(cached.req_ids, flags, strict=False) if flag}
    if not ids:
        return []
    outputs = getattr(cached, "num_output_tokens", None) or [0] * len(cached.req_ids)
    return [(req_id, count) for req_id, count in zip(cached.req_ids, outputs, strict=True) if req_id in ids]


def _pad(values: Any) -> tuple[int, ...]:
    padded = tuple(values)[:KV_GROUPS]
    return padded + (0,) * (KV_GROUPS - len(padded))
