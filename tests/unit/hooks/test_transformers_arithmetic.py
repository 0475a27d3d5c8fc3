"""What the transformers hooks compute on the host, without a model running."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.hooks.attention import visible_attention
from llmprobe.hooks.transformers_generation import REQUEST, Generation

torch = pytest.importorskip("torch")


@given(
    before=st.integers(0, 60),
    query=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 50)),
)
def test_visible_keys_and_pairs_equal_an_enumerated_mask(before: int, query: int, window: int | None) -> None:
    pairs = {
        (position, key)
        for position in range(before, before + query)
        for key in range(position + 1)
        if window is None or position - key < window
    }
    assert visible_attention(before, query, window) == (len({key for _, key in pairs}), len(pairs))


def call_of() -> Generation:
    return Generation(REQUEST, None, None, 0, 0)


def after(call: Generation, tokens: int) -> Generation:
    call.token_times = [1000 * (index + 1) for index in range(tokens)]
    return call


def test_rows_are_counted_up_to_their_end_of_sequence_token() -> None:
    call = after(call_of(), 4)
    call.read_inputs((torch.zeros(3, 2, dtype=torch.long),), {})
    config = SimpleNamespace(eos_token_id=[9, 8], pad_token_id=0)
    call.read_loop("_sample", (torch.zeros(3, 2, dtype=torch.long),), {"generation_config": config})
    result = torch.tensor([[1, 1, 5, 9, 0, 0], [1, 1, 5, 5, 5, 5], [1, 1, 8, 0, 0, 0]])
    assert call.returned_tokens(result) == ([2, 4, 1], [2, 4, 1])
    assert call.late_gaps([2, 4, 1]) == {1000: 2 + 1 + 1}


def test_several_sequences_belong_to_the_request_that_asked_for_them() -> None:
    call = after(call_of(), 3)
    call.read_inputs((torch.zeros(2, 2, dtype=torch.long),), {})
    config = SimpleNamespace(eos_token_id=9, pad_token_id=None)
    call.read_loop("_sample", (torch.zeros(4, 2, dtype=torch.long),), {"generation_config": config})
    result = torch.tensor([[1, 1, 9, 9, 9], [1, 1, 5, 9, 9], [1, 1, 5, 5, 5], [1, 1, 5, 5, 9]])
    assert call.returned_tokens(SimpleNamespace(sequences=result)) == ([3, 6], [2, 3])


@pytest.mark.parametrize(
    ("args", "kwargs", "requests", "prompts"),
    [
        ((), {}, 1, [0]),
        ((), {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, 2, [5, 5]),
        ((None,), {"inputs_embeds": torch.zeros(2, 7, 16)}, 2, [7, 7]),
        ((), {"input_features": torch.zeros(3, 80, 100)}, 3, [0, 0, 0]),
        (
            (torch.zeros(2, 4, dtype=torch.long),),
            {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])},
            2,
            [2, 4],
        ),
    ],
)
def test_batch_and_prompt_are_read_from_what_the_caller_passed(
    args: tuple[Any, ...], kwargs: dict[str, Any], requests: int, prompts: list[int]
) -> None:
    call = call_of()
    call.read_inputs(args, kwargs)
    assert (call.requests, call.prompts) == (requests, prompts)
