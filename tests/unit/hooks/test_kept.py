"""What the step path keeps of a scheduler's output: little, and all that the records need."""

from __future__ import annotations

import random
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.hooks.attention import visible_attention
from llmprobe.hooks.vllm.batch import Noted
from llmprobe.record.clock import HostClock, Stamps
from llmprobe.record.layout import STEP, Phase

from .scheduled import New, Scheduled, cached, new
from .stepping import Rig


class Ids(list[str]):
    """Can be watched until it is gone."""


class Counts(dict[str, int]):
    """Likewise."""


class Finished(set[str]):
    """Likewise."""


class Keeping(HostClock):
    """Keeps its stamps until the next `harvest`, as a device's clock does."""

    def harvest(self, most: int = 1 << 62) -> list[Stamps]:
        self.kept = super().harvest(most)
        return self.kept


def decode(context: int) -> Scheduled:
    """A step of two requests, one token each, in containers that can be watched."""
    step = cached(a=(context, 1), b=(context, 1))
    step.scheduled_cached_reqs.req_ids = Ids(step.scheduled_cached_reqs.req_ids)
    step.num_scheduled_tokens = Counts(step.num_scheduled_tokens)
    step.finished_req_ids = Finished()
    return step


def test_of_a_plain_decode_two_lists_are_kept_until_it_is_written_and_nothing_else(rig: Rig) -> None:
    rig.use(Keeping())
    step = decode(4)
    parts = (step, step.scheduled_cached_reqs, step.num_scheduled_tokens, step.finished_req_ids)
    others = [weakref.ref(part) for part in parts]
    ids, computed = (
        weakref.ref(step.scheduled_cached_reqs.req_ids),
        step.scheduled_cached_reqs.num_computed_tokens,
    )
    rig.run(step)
    (row,) = rig.steps._rows
    assert Noted(*row[2:]) == ((), 2, ["a", "b"], [4, 4], None, (), {}, None)
    assert Noted(*row[2:]).computed is computed
    del step, parts, row
    assert [other() for other in others] == [None] * 4
    rig.run(cached(c=(7, 1)))  # the worker knows the step that it began last
    assert ids() is not None
    assert list(rig.written()["requests"]) == [2, 1]
    assert ids() is None


def test_of_an_output_without_tokens_only_what_ended_is_kept(rig: Rig) -> None:
    rig.begin(Scheduled({}, finished_req_ids={"a"}))
    (row,) = rig.steps._rows
    assert Noted(*row[2:]) == ({"a"}, 0, (), (), None, (), {}, None)


def test_a_last_chunk_of_one_token_among_decodes_is_its_prompts(rig: Rig) -> None:
    """Every request has one token: how many each has is not kept, and which is a prompt has to be known."""
    rig.run(new("a", 5, scheduled=4))
    rig.run(cached(a=(4, 1), b=(30, 1)))
    rig.run(cached(a=(5, 1), b=(31, 1)))
    steps = rig.written()
    assert list(steps["phase"]) == [Phase.PREFILL, Phase.MIXED, Phase.DECODE]
    assert list(steps["prompt_tokens"]) == [4, 1, 0]
    assert list(steps["decode_tokens"]) == [0, 1, 2]


def test_a_resumed_request_of_which_one_token_is_left_is_prefill(rig: Rig) -> None:
    """The others were found in the prefix cache."""
    rig.run(new("a", 10))
    rig.run(cached(a=(10, 1)))
    again = cached(a=(11, 1))
    again.scheduled_cached_reqs.resumed_req_ids = {"a"}
    again.scheduled_cached_reqs.num_output_tokens = [2]
    rig.run(again)
    assert list(rig.written()["phase"]) == [Phase.PREFILL, Phase.DECODE, Phase.PREFILL]


def test_counts_that_are_not_those_of_the_cached_requests_are_kept(rig: Rig) -> None:
    """As no vLLM known does it: a request that is told of and has no token in this step."""
    step = cached(a=(4, 1), b=(9, 1))
    del step.num_scheduled_tokens["b"]
    rig.run(step)
    (row,) = rig.steps._rows
    assert Noted(*row[2:]).counts == {"a": 1}


@pytest.mark.swallows
@pytest.mark.parametrize("other", [None, []])
def test_what_is_no_cached_request_data_makes_no_record_and_fails_no_step(rig: Rig, other: Any) -> None:
    step = cached(a=(4, 1))
    step.scheduled_cached_reqs = other
    rig.run(step)
    assert len(rig.written()) == 0
    assert rig.probe.guard.errors["vllm.read"] == 1


@dataclass
class Flagged:
    """CachedRequestData of vLLM 0.11, which tells by a list who comes back."""

    req_ids: list[str]
    num_computed_tokens: list[int]
    num_output_tokens: list[int]
    resumed_from_preemption: list[bool]


@dataclass
class Request:
    prompt: int
    target: int  # tokens until which it is prefill
    computed: int = 0
    generated: int = 0
    known: bool = False  # to the worker
    preempted: bool = False


@dataclass
class Engine:
    """Schedules as vLLM does, and knows what each step asks of a model without a window."""

    chance: random.Random
    form: str  #: who is told of preempted requests that come back, and how
    requests: dict[str, Request] = field(default_factory=dict)
    made: int = 0

    def likely(self, chance: float) -> bool:
        return self.chance.random() < chance

    def schedule(self) -> tuple[Any, tuple[int, ...]]:
        """An output; and phase, counts, context and pairs of its step, nothing if it has no tokens."""
        output: Any = Scheduled({})
        for name, request in list(self.requests.items()):
            if request.generated and self.likely(0.1):
                del self.requests[name]
                output.finished_req_ids.add(name)
            elif request.known and self.likely(0.1):
                request.preempted, request.computed = True, 0
        if self.likely(0.3):
            self.made += 1
            prompt = self.chance.randint(1, 12)
            self.requests[f"r{self.made}"] = Request(prompt, prompt)
        sums = [0] * 10  # counts as in the record, then context and pairs, of prefill and decode each
        for name, request in self.requests.items():
            back = request.preempted
            if back and self.likely(0.5):
                continue
            if back:
                request.preempted, request.target = False, request.prompt + request.generated
                request.computed = request.target - 1 if self.likely(0.3) else 0  # in the prefix cache
            self._tell(output, name, request, back)
            left = request.target - request.computed
            prompt = left > 0
            drafts = 0 if prompt or not self.likely(0.2) else self.chance.randint(1, 3)
            count = self.chance.randint(1, left) if prompt else 1 + drafts
            output.num_scheduled_tokens[name] = count
            if drafts:
                output.scheduled_spec_decode_tokens[name] = [7] * drafts
            sampled = 1 + drafts if count >= left else 0
            visible, pairs = visible_attention(request.computed, count, None)
            asked = (1, prompt, count * prompt, count * (not prompt), drafts, sampled)
            shares = (visible * prompt, visible * (not prompt), pairs * prompt, pairs * (not prompt))
            sums = [before + more for before, more in zip(sums, (*asked, *shares), strict=True)]
            request.computed += count if prompt else 1
            request.generated += sampled > 0
        if self.form == "0.11":
            told = output.scheduled_cached_reqs
            flags = [name in told.resumed_req_ids for name in told.req_ids]
            output.scheduled_cached_reqs = Flagged(
                told.req_ids, told.num_computed_tokens, told.num_output_tokens, flags
            )
        if not output.num_scheduled_tokens:
            return output, ()
        phase = Phase.DECODE if not sums[2] else Phase.PREFILL if not sums[3] else Phase.MIXED
        return output, (phase, *sums)

    def _tell(self, output: Scheduled, name: str, request: Request, back: bool) -> None:
        if not request.known or (back and self.form == "V2 runner"):
            tokens = [1] * request.target if request.known else None
            output.scheduled_new_reqs.append(New(name, [1] * request.prompt, request.computed, tokens))
            request.known = True
            return
        told = output.scheduled_cached_reqs
        told.req_ids.append(name)
        told.num_computed_tokens.append(request.computed)
        told.num_output_tokens.append(request.generated)
        if back:
            told.resumed_req_ids.add(name)


@pytest.mark.parametrize("form", ["0.11", "V1 runner", "V2 runner"])
@given(st.randoms(use_true_random=False), st.integers(0, 3))
@settings(max_examples=40)
def test_whatever_is_scheduled_the_records_say_what_it_asked(
    form: str, chance: random.Random, dummies: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        try:
            engine, expected = Engine(chance, form), []
            for number in range(30):
                output, asked = engine.schedule()
                if asked:
                    rig.run(output)
                    expected.append(asked)
                else:
                    rig.begin(output)
                if dummies and number % (3 * dummies) == 0:
                    rig.steps.entered_dummy(None)
                    rig.steps.dummy_end(None)
                    expected.append((Phase.DUMMY, *[0] * 10))
                del output
            steps = rig.written()
            names = STEP.names or ()
            counts = names[names.index("requests") : names.index("sampled") + 1]
            sums = ("context_prefill", "context_decode", "pairs_prefill", "pairs_decode")
            found = [
                (*(int(step[name]) for name in ("phase", *counts)), *(int(step[name][0]) for name in sums))
                for step in steps
            ]
            assert found == expected
        finally:
            rig.probe.remove_patches()
            rig.probe.disarm()
