from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute import steps as known
from llmprobe.compute.facts import ModelFacts
from llmprobe.compute.traffic import traffic, traffic_by_kind, work
from llmprobe.record.layout import PHASES, Flag, Phase

from .builders import facts, group, steps

# A Llama in bfloat16: 2 layers, hidden 64, 4 query and 2 KV heads of 16, MLP 128, 100 words, untied.
HIDDEN, MLP, WORDS, LAYERS = 64, 128, 100, 2
PER_LAYER = HIDDEN * (64 + 32 + 32) + 64 * HIDDEN + 3 * HIDDEN * MLP  # q, k, v; o; gate, up, down
LLAMA = ModelFacts.from_json(
    facts(
        # K and V, 2 heads of 16, 2 bytes, every layer; QK and PV, 4 heads of 16, 2 FLOPs each.
        group(bytes_per_token=2 * 2 * 16 * 2 * LAYERS, flops_per_pair=2 * 2 * 4 * 16 * LAYERS),
        linear={"bytes": 2 * PER_LAYER * LAYERS, "params": PER_LAYER * LAYERS},
        head={"bytes": 2 * HIDDEN * WORDS, "params": HIDDEN * WORDS},
    )
)


def test_phases_and_flags_are_those_of_the_journal() -> None:
    assert known.PHASES == PHASES
    assert (known.DRAFT, known.DUMMY, known.ENCODE) == (Phase.DRAFT, Phase.DUMMY, Phase.ENCODE)
    flags = Flag.RESTARTED, Flag.EMPTY, Flag.NO_PARTS
    assert flags == (known.RESTARTED, known.EMPTY, known.NO_PARTS)


def test_a_llama_by_hand() -> None:
    batch = steps(
        # a prompt of 10 tokens, its last position sampled: 10·11/2 causal pairs
        {"requests": 1, "prompt_tokens": 10, "sampled": 1, "context_prefill": [10], "pairs_prefill": [55]},
        # three requests decode at contexts 11, 20 and 30
        {"requests": 3, "decode_tokens": 3, "sampled": 3, "context_decode": [61], "pairs_decode": [61]},
    )
    linear_bytes, head_bytes = 147456, 12800
    np.testing.assert_array_equal(
        traffic(batch, LLAMA),
        [
            [linear_bytes, 256 * 10 + 256 * 10, 0, head_bytes],
            [linear_bytes, 256 * 61 + 256 * 3, 0, head_bytes],
        ],
    )
    np.testing.assert_array_equal(
        work(batch, LLAMA),
        [
            [2 * 73728 * 10, 512 * 55, 0, 2 * 6400 * 1],
            [2 * 73728 * 3, 512 * 61, 0, 2 * 6400 * 3],
        ],
    )


def test_a_chunk_that_samples_nothing_reads_no_head() -> None:
    chunk = steps({"requests": 1, "prompt_tokens": 8, "context_prefill": [8], "pairs_prefill": [36]})
    assert traffic(chunk, LLAMA)[0, 3] == 0
    assert work(chunk, LLAMA)[0, 3] == 0


def test_experts_are_read_as_far_as_the_batch_is_expected_to_reach_them() -> None:
    model = ModelFacts.from_json(facts(experts={"bytes": 800, "params": 400, "count": 8, "top_k": 2}))
    batch = steps({"decode_tokens": 1}, {"decode_tokens": 2}, {"decode_tokens": 1000}, {})
    # One token reaches 2 of 8; a second one reaches 2/8 of the remaining 6/8.
    np.testing.assert_allclose(traffic(batch, model)[:, 2], [200, 350, 800, 0])
    # Two of eight experts of 50 parameters each serve a token.
    np.testing.assert_allclose(work(batch, model)[:, 2], [200, 400, 200_000, 0])


def test_expected_experts_are_the_mean_over_all_ways_to_route_a_batch() -> None:
    model = ModelFacts.from_json(facts(experts={"bytes": 5, "params": 5, "count": 5, "top_k": 2}))
    choices = [set(chosen) for chosen in itertools.combinations(range(5), 2)]
    for count in (1, 2, 3):
        reached = [len(set().union(*routes)) for routes in itertools.product(choices, repeat=count)]
        moved = traffic(steps({"decode_tokens": count}), model)[0, 2]
        assert moved == pytest.approx(sum(reached) / len(reached))


def test_experts_that_all_serve_every_token_are_read_whole() -> None:
    model = ModelFacts.from_json(facts(experts={"bytes": 800, "params": 400, "count": 4, "top_k": 4}))
    np.testing.assert_array_equal(traffic(steps({"decode_tokens": 1}, {}), model)[:, 2], [800, 0])


def test_a_window_limits_what_is_read_but_every_new_token_is_written() -> None:
    model = ModelFacts.from_json(
        facts(
            group(bytes_per_token=10, flops_per_pair=1),
            group(kind="sliding", window=4, bytes_per_token=30, flops_per_pair=3),
        )
    )
    # One request decodes at context 100: the recorder clamps the second column to the window.
    batch = steps({"requests": 1, "decode_tokens": 1, "context_decode": [100, 4], "pairs_decode": [100, 4]})
    kinds = traffic_by_kind(batch, model)
    assert kinds["kv_read"] == [10 * 100 + 30 * 4]
    assert kinds["kv_write"] == [10 + 30]
    assert work(batch, model)[0, 1] == 1 * 100 + 3 * 4


def test_layers_that_share_a_cache_read_it_and_write_nothing() -> None:
    model = ModelFacts.from_json(facts(group(bytes_per_token=30, bytes_written_per_token=20)))
    kinds = traffic_by_kind(steps({"requests": 1, "decode_tokens": 1, "context_decode": [100]}), model)
    assert (kinds["kv_read"], kinds["kv_write"]) == ([3000], [20])


def test_latent_attention_takes_prompts_and_decodes_in_its_own_ways() -> None:
    latent = group(
        kind="mla",
        flops_per_pair=34,
        flops_per_pair_prefill=4,
        flops_per_cached_key=7,
        flops_per_cached_key_prefill=9,
    )
    model = ModelFacts.from_json(facts(latent))
    batch = steps(
        # the second chunk of a prompt: 4 new tokens behind 6, of which keys are made again
        {"prompt_tokens": 4, "context_prefill": [10], "pairs_prefill": [34]},
        {"decode_tokens": 2, "context_decode": [50], "pairs_decode": [50]},
    )
    assert work(batch, model)[:, 1].tolist() == [4 * 34 + 9 * 6, 34 * 50 + 7 * 48]


def test_recurrent_state_is_read_and_written_once_a_request() -> None:
    model = ModelFacts.from_json(facts(group(kind="recurrent", bytes_per_request=500)))
    kinds = traffic_by_kind(steps({"requests": 3, "decode_tokens": 3}), model)
    assert kinds["kv_read"] == kinds["kv_write"] == [1500]


def test_cross_attention_reads_the_encoder_at_every_step_and_writes_it_with_the_prompt() -> None:
    model = ModelFacts.from_json(facts(group(kind="cross", bytes_per_token=2)))
    kinds = traffic_by_kind(
        steps(
            {"requests": 1, "prompt_tokens": 1, "context_prefill": [50]},
            {"requests": 1, "decode_tokens": 1, "context_decode": [50]},
        ),
        model,
    )
    np.testing.assert_array_equal(kinds["kv_read"], [100, 100])
    np.testing.assert_array_equal(kinds["kv_write"], [100, 0])


@pytest.mark.parametrize("phase", [Phase.DRAFT, Phase.ENCODE])
def test_another_model_s_steps_are_not_modelled(phase: Phase) -> None:
    batch = steps({"phase": phase, "requests": 1, "decode_tokens": 4, "sampled": 4, "context_decode": [9]})
    assert not traffic(batch, LLAMA).any()
    assert not work(batch, LLAMA).any()


def test_a_step_without_tokens_moves_nothing() -> None:
    model = ModelFacts.from_json(facts(group(kind="recurrent", bytes_per_token=1, bytes_per_request=500)))
    batch = steps({"requests": 3, "context_decode": [9]})
    assert not traffic(batch, model).any()
    assert not work(batch, model).any()


counts = st.integers(0, 2**32 - 1)


@given(st.lists(st.tuples(counts, counts, counts, counts, st.integers(0, 2**53)), min_size=1, max_size=5))
def test_both_views_of_the_bytes_agree_up_to_the_largest_counts(rows: list[tuple[int, ...]]) -> None:
    batch = steps(
        *(
            {
                "prompt_tokens": prompt,
                "decode_tokens": decode,
                "requests": requests,
                "context_decode": [context],
                "pairs_decode": [pairs],
            }
            for prompt, decode, requests, context, pairs in rows
        )
    )
    moved = traffic(batch, LLAMA)
    np.testing.assert_allclose(sum(traffic_by_kind(batch, LLAMA).values()), moved.sum(axis=1))
    assert (moved >= 0).all()
    assert (work(batch, LLAMA) >= 0).all()


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_more_tokens_never_move_fewer_bytes(fewer: int, more: int) -> None:
    model = ModelFacts.from_json(
        facts(group(bytes_per_token=7), experts={"bytes": 800, "params": 400, "count": 128, "top_k": 8})
    )
    low, high = sorted((fewer, more))
    moved = traffic(steps({"decode_tokens": low}, {"decode_tokens": high}), model)
    assert (moved[0] <= moved[1]).all()
    assert moved[1, 2] <= 800
