"""The fields of vLLM's SchedulerOutput that are read; the real one is seen in the integration tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmprobe.hooks.vllm.batch import Noted, note_drafts, note_new


@dataclass
class New:
    req_id: str
    prompt_token_ids: list[int] | None
    num_computed_tokens: int = 0
    prefill_token_ids: list[int] | None = None


@dataclass
class Cached:
    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)


@dataclass
class Scheduled:
    """The fields of vLLM's SchedulerOutput that are read; the real one is seen in the integration tests."""

    num_scheduled_tokens: dict[str, int]
    scheduled_new_reqs: list[New] = field(default_factory=list)
    scheduled_cached_reqs: Cached = field(default_factory=Cached)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


def new(name: str, prompt: int, scheduled: int | None = None, computed: int = 0) -> Scheduled:
    count = prompt - computed if scheduled is None else scheduled
    return Scheduled({name: count}, [New(name, [1] * prompt, computed)])


def cached(**computed_and_scheduled: tuple[int, int]) -> Scheduled:
    names = list(computed_and_scheduled)
    return Scheduled(
        {name: scheduled for name, (_, scheduled) in computed_and_scheduled.items()},
        scheduled_cached_reqs=Cached(
            names, [c for c, _ in computed_and_scheduled.values()], [1] * len(names)
        ),
    )


def noted(scheduled: Scheduled) -> Noted:
    """As the step path notes it."""
    cached, counts = scheduled.scheduled_cached_reqs, scheduled.num_scheduled_tokens
    total, new = scheduled.total_num_scheduled_tokens, note_new(scheduled.scheduled_new_reqs)
    one_each = total == len(counts) == len(cached.req_ids) and not cached.resumed_req_ids and not new
    return Noted(
        scheduled.finished_req_ids,
        total,
        cached.req_ids,
        cached.num_computed_tokens,
        None if one_each else counts,
        new,
        note_drafts(scheduled.scheduled_spec_decode_tokens),
        cached if cached.resumed_req_ids else None,
    )
