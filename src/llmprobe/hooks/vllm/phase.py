"""Which phase a step is, told as it begins: for ranges of a profiler that listens.

`BatchReader` tells it too, once the step is over and off the step path, with all that the step asks of the
model; that takes tens of microseconds where the model has emptied the caches. This looks at prompts that are
not computed yet alone, which most steps have none of.
"""

from __future__ import annotations

from typing import Any

from llmprobe.hooks.vllm.batch import NewRequest, resumed
from llmprobe.record.layout import Phase

_PREFILL, _DECODE, _MIXED = int(Phase.PREFILL), int(Phase.DECODE), int(Phase.MIXED)


class PhaseReader:
    """Follows the prompts of one worker from step to step. Tells the phases that `BatchReader` tells."""

    def __init__(self) -> None:
        #: Requests whose prompt (or what they had when they were resumed) is not computed yet → its length.
        self.prefilling: dict[str, int] = {}
        self._prompt: dict[str, int] = {}

    def read(
        self,
        finished: Any,
        total: int,
        ids: Any,
        computed: Any,
        counts: dict[str, int] | None,
        new: tuple[NewRequest, ...],
        drafts: dict[str, int],
        cached: Any,
    ) -> int | None:
        """The phase of a step; None of an output without tokens. The fields are those of `Noted`.

        Every output of the engine must come by once, in order.
        """
        prefilling = self.prefilling
        for req_id in finished:
            prefilling.pop(req_id, None)
            self._prompt.pop(req_id, None)
        for request in new:
            self._prompt[request.req_id] = prefilling[request.req_id] = request.length
        if not total:
            return None
        if cached is not None:
            ids, computed = cached.req_ids, cached.num_computed_tokens
            for req_id, output in resumed(cached):
                prefilling[req_id] = self._prompt.get(req_id, 0) + output
        if counts is None:  # one token each
            if not prefilling or prefilling.keys().isdisjoint(ids):
                return _DECODE
            counts = dict.fromkeys(ids, 1)
        alone = {request.req_id: request.computed for request in new}
        chunks = [req_id for req_id in prefilling if req_id in counts and req_id not in alone]
        if chunks:
            known = dict(zip(ids, computed, strict=True))
            alone.update((req_id, known[req_id]) for req_id in chunks)
        prompt = generated = 0
        rest = total
        for req_id, before in alone.items():
            scheduled, of_drafts, target = counts[req_id], drafts.get(req_id, 0), prefilling.get(req_id)
            rest -= scheduled
            if target is not None and before >= target and scheduled - of_drafts <= 1:
                del prefilling[req_id]
                generated += scheduled
                continue
            if target is not None and before + scheduled >= target:
                del prefilling[req_id]
            prompt += scheduled
        if rest - sum(drafts.values()) == len(counts) - len(alone):
            generated += rest
        else:  # such as requests that nobody saw begin: they came while the probe was off
            for req_id in ids:
                if req_id not in alone:
                    scheduled = counts.get(req_id, 0)
                    many = scheduled - drafts.get(req_id, 0) > 1
                    prompt, generated = prompt + scheduled * many, generated + scheduled * (not many)
        return _PREFILL if not generated else _DECODE if not prompt else _MIXED
