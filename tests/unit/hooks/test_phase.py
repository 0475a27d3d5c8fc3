"""Phases as steps begin are those that are recorded once they are over, whatever the scheduler does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.hooks.vllm.batch import BatchReader
from llmprobe.hooks.vllm.phase import PhaseReader
from llmprobe.record.layout import Phase

from .scheduled import Cached, New, Scheduled, cached, new, noted


def phases(*outputs: Scheduled) -> list[int | None]:
    reader = PhaseReader()
    return [reader.read(*noted(output)) for output in outputs]


def test_a_prompt_in_chunks_among_others() -> None:
    second = cached(a=(10, 1), b=(4, 2))
    assert phases(
        new("a", 10),
        new("b", 7, scheduled=4),
        second,
        cached(a=(11, 1), b=(6, 1)),
        cached(a=(12, 1), b=(7, 1)),
    ) == [Phase.PREFILL, Phase.PREFILL, Phase.MIXED, Phase.MIXED, Phase.DECODE]


def test_what_is_kept_ends_with_its_request() -> None:
    reader = PhaseReader()
    reader.read(*noted(new("a", 10, scheduled=4)))
    assert reader.read(*noted(Scheduled({}, finished_req_ids={"a"}))) is None
    assert (reader.prefilling, reader._prompt) == ({}, {})


class Engine:
    """Requests that are scheduled at random, as vLLM may: chunks, drafts, cached prefixes, preemptions."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.live: dict[str, list[int]] = {}  # tokens that it has, those that are computed, the prompt's
        self.waiting: dict[str, list[int]] = {}  # preempted
        self.finished: set[str] = set()
        self.made = 0

    def step(self) -> Scheduled:
        draw, step = self.draw, Scheduled({}, finished_req_ids=self.finished)
        self.finished = set()
        for req_id, request in list(self.live.items()):
            act = draw(st.sampled_from(["run", "run", "run", "skip", "preempt", "finish"]))
            if act == "finish":
                del self.live[req_id]
                self.finished.add(req_id)
            elif act == "preempt":
                self.waiting[req_id] = self.live.pop(req_id)
            elif act == "run":
                self.run(step, req_id, request)
        for req_id in list(self.waiting):
            if draw(st.booleans()):
                request = self.live[req_id] = self.waiting.pop(req_id)
                request[1] = 0
                tokens, _, prompt = request
                if draw(st.booleans()):  # the V2 runner: as new, with all that it has
                    again = New(req_id, [1] * prompt, 0, prefill_token_ids=[1] * tokens)
                    step.scheduled_new_reqs.append(again)
                    self.count(step, req_id, request)
                else:
                    step.scheduled_cached_reqs.resumed_req_ids.add(req_id)
                    self.run(step, req_id, request)
        for _ in range(draw(st.integers(0, 2))):
            self.made += 1
            prompt = draw(st.integers(1, 8))
            computed = draw(st.integers(0, prompt - 1))  # by the prefix cache
            request = self.live[f"r{self.made}"] = [prompt, computed, prompt]
            step.scheduled_new_reqs.append(New(f"r{self.made}", [1] * prompt, computed))
            self.count(step, f"r{self.made}", request)
        return step

    def run(self, step: Scheduled, req_id: str, request: list[int]) -> None:
        at: Cached = step.scheduled_cached_reqs
        at.req_ids.append(req_id)
        at.num_computed_tokens.append(request[1])
        at.num_output_tokens.append(request[0] - request[2])
        self.count(step, req_id, request)

    def count(self, step: Scheduled, req_id: str, request: list[int]) -> None:
        left = request[0] - request[1]
        if left > 1 or request[0] == request[2]:
            scheduled = self.draw(st.integers(1, max(left, 1)))
        else:
            drafts = self.draw(st.integers(0, 3))
            scheduled = 1 + drafts
            if drafts:
                step.scheduled_spec_decode_tokens[req_id] = [7] * drafts
        step.num_scheduled_tokens[req_id] = scheduled
        request[1] = min(request[1] + scheduled, request[0])
        if request[1] == request[0]:
            request[0] += 1  # the token that it samples


@settings(max_examples=300)
@given(st.data())
def test_they_are_those_of_what_is_recorded(data: st.DataObject) -> None:
    engine = Engine(data.draw)
    at_entry, recorded = PhaseReader(), BatchReader()
    for number in range(data.draw(st.integers(1, 12))):
        output = noted(engine.step())
        if number == data.draw(st.integers(0, 40)):  # switched off and on: what ran before is not known
            at_entry, recorded = PhaseReader(), BatchReader()
        batch = recorded.read(output)
        assert at_entry.read(*output) == (None if batch is None else batch.phase)
        assert at_entry.prefilling == recorded._prefilling


@pytest.mark.parametrize("windows", [(None,), (16,)])
def test_a_request_that_nobody_saw_begin(windows: tuple[int | None, ...]) -> None:
    for output in (cached(a=(100, 50)), cached(a=(100, 50), b=(3, 1)), cached(a=(100, 1), b=(3, 1))):
        batch = BatchReader(windows).read(noted(output))
        assert batch is not None
        assert PhaseReader().read(*noted(output)) == batch.phase
