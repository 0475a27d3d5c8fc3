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


class BatchReader:
    """Follows the requests of one engine from step to step."""

    def __init__(self, windows: tuple[int | None, ...] = (None,)) -> None:
        #: Visible window of each KV-cache group in tokens, None where everything is visible.
        self.windows = windows
        #: Requests whose prompt (or what they had when they were resumed) is not computed yet → its length.
        self._prefilling: dict[str, int] = {}
        self._prompt: dict[str, int] = {}

    def read(self, scheduled: Any) -> Batch | None:
        """The batch in a ``SchedulerOutput``, or None for one without tokens (a "flush")."""
        for finished in scheduled.finished_req_ids:
            self._prefilling.pop(finished, None)
            self._prompt.pop(finished, None)
        for new in scheduled.scheduled_new_reqs:
            # The V2 runner re-sends a resumed request as new, with all the tokens it must recompute.
            tokens = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids
            if tokens is not None:
                length = len(tokens)
            else:
                embeds = getattr(new, "prompt_embeds", None)
                length = embeds.shape[0] if embeds is not None else 0
            self._prompt[new.req_id] = length
            self._prefilling[new.req_id] = length
        total = scheduled.total_num_scheduled_tokens
        if total == 0:
            return None
        cached = scheduled.scheduled_cached_reqs
        resumed = _resumed(cached)
        for req_id, output in resumed:
            self._prefilling[req_id] = self._prompt.get(req_id, 0) + output
        counts = scheduled.num_scheduled_tokens
        if (
            not scheduled.scheduled_new_reqs
            and total == len(counts)
            and not (self._prefilling and any(req_id in self._prefilling for req_id in counts))
        ):
            return self._plain_decode(cached.num_computed_tokens, total)
        return self._any(scheduled, counts)

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

    def _any(self, scheduled: Any, counts: dict[str, int]) -> Batch:
        drafts = scheduled.scheduled_spec_decode_tokens
        cached = scheduled.scheduled_cached_reqs
        computed: dict[str, int] = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
        groups = len(self.windows)
        context = ([0] * groups, [0] * groups)
        pairs = ([0] * groups, [0] * groups)
        tokens = [0, 0]
        prefill_requests = draft_tokens = sampled = 0
        for req_id, query in counts.items():
            before = computed.get(req_id, 0)
            drafted = len(drafts[req_id]) if req_id in drafts else 0
            target = self._prefilling.get(req_id)
            decoding = query - drafted <= 1 and (target is None or before >= target)
            if target is not None and before + query >= target:
                self._prefilling.pop(req_id, None)
            if decoding:
                draft_tokens += drafted
                sampled += 1 + drafted
            else:
                prefill_requests += 1
                if target is None or before + query >= target:
                    sampled += 1
            tokens[decoding] += query
            for group, window in enumerate(self.windows):
                visible, seen = visible_attention(before, query, window)
                context[decoding][group] += visible
                pairs[decoding][group] += seen
        if not tokens[1]:
            phase = _PREFILL
        elif not tokens[0]:
            phase = _DECODE
        else:
            phase = _MIXED
        return Batch(
            phase,
            (len(counts), prefill_requests, tokens[0], tokens[1], draft_tokens, sampled),
            (*_pad(context[0]), *_pad(context[1]), *_pad(pairs[0]), *_pad(pairs[1])),
        )


def _resumed(cached: Any) -> list[tuple[str, int]]:
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
