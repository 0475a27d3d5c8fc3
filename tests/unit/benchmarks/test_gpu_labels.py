"""The rules that label runs on a GPU, on figures that were seen on an H100."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support import gpu_labels
from support.gpu_labels import Facts, Model
from support.gpu_models import CONFIGURATIONS
from support.labels import Client
from support.nsys_idle import Idle

#: Of an H100 80GB HBM3: nominal bandwidth, and dense bf16 products.
BANDWIDTH, FLOPS = 3352e9, 989.4e12
DENSE = Model.of(CONFIGURATIONS["dense"])
#: One request of 512 + 256 tokens, CUDA graphs: its time per token, and NVML's counters over it.
GRAPHS = Client(100, 0.02, 6.8e-3)
GRAPHS_COUNTED = {"graphics": 0.998, "sm": 0.726, "tensor": 0.018, "dram": 0.666}
EAGER = Client(100, 0.05, 28e-3)
EAGER_COUNTED = {"graphics": 0.407, "sm": 0.254, "tensor": 0.006, "dram": 0.242}
#: 32 prompts of 8000 tokens at a time: 37 000 prompt tokens a second.
PREFILL_COUNTED = {"graphics": 0.924, "sm": 0.887, "tensor": 0.737, "dram": 0.264}


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "model": DENSE,
        "bandwidth": BANDWIDTH,
        "flops": FLOPS,
        "counters": GRAPHS_COUNTED,
        "client": GRAPHS,
        "reference": None,
        "batch": 1,
        "prompt_tokens": 512,
        "output_tokens": 256,
        "engine": {},
        "tokens": 1000.0,
    }
    return Facts(**{**values, **changes})


def test_the_dense_configuration_has_eight_billion_parameters() -> None:
    """As Qwen3's 8 billion, without the input embedding and the few of its norms."""
    assert DENSE.layer_params + DENSE.head_params == 7_568_097_280
    assert DENSE.kv_bytes(1) == 147_456


def test_a_window_bounds_what_is_read_and_what_is_multiplied() -> None:
    """Against every pair of tokens, counted one by one."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    model = Model.of(config)
    assert model.kv_bytes(100) == (32 + 100 + 32) * 2 * 2 * 16 * 2
    assert model.kv_bytes(20) == 3 * 20 * 2 * 2 * 16 * 2
    assert model.layer_params == 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    pairs = sum(min(token + 1, window) for window in (32, 10**9, 32) for token in range(500))
    products = 2 * model.layer_params * 500 + 2 * 64_000
    assert model.prefill_flops(500) == pytest.approx(products + 4 * pairs * 64, rel=1e-3)


def test_decode_with_graphs_reads_memory_and_eager_decode_does_not() -> None:
    label = gpu_labels.reads_memory(facts())
    assert label.holds
    assert label.rule.startswith("(weights + KV) ÷ TPOT ÷ peak = 0.67 ")
    assert not gpu_labels.reads_memory(facts(client=EAGER, counters=EAGER_COUNTED)).holds


def test_decode_without_async_scheduling_is_on_neither_side_of_the_line() -> None:
    """As seen twice: 8.4 and 8.6 ms a token, the device idle for a fifth of them."""
    counted = {"graphics": 0.797, "sm": 0.569, "tensor": 0.016, "dram": 0.532}
    label = gpu_labels.reads_memory_or_waits(facts(client=Client(5, 0.045, 8.6e-3), counters=counted))
    assert label.holds
    assert label.classes == ("memory_bound", "sync_bound")
    assert not gpu_labels.reads_memory_or_waits(facts()).holds
    assert not gpu_labels.reads_memory_or_waits(facts(client=EAGER, counters=EAGER_COUNTED)).holds


def test_a_cache_is_read_where_it_is_larger_than_the_weights() -> None:
    long = facts(batch=16, prompt_tokens=8800, output_tokens=1400, client=Client(16, 4.0, 16e-3))
    assert long.kv_bytes / DENSE.weights_bytes == pytest.approx(1.48, abs=0.01)
    assert gpu_labels.reads_cache(long).holds
    assert not gpu_labels.reads_cache(facts()).holds


def test_prompts_multiply_by_their_own_time_and_by_the_rate_of_all() -> None:
    mixed = facts(prompt_tokens=8000, prompt_rate=37_000.0, counters=PREFILL_COUNTED)
    assert mixed.prompts_share == pytest.approx(0.61, abs=0.01)
    assert gpu_labels.multiplies_beside_decode(mixed).holds
    assert not gpu_labels.multiplies_beside_decode(replace(mixed, prompt_rate=20_000.0)).holds
    assert not gpu_labels.multiplies_beside_decode(replace(mixed, counters=GRAPHS_COUNTED)).holds
    alone = replace(mixed, client=Client(50, 8000 / 37_000, None))
    assert alone.prefill_share == pytest.approx(mixed.prompts_share)
    assert gpu_labels.multiplies(alone).holds


def test_float32_is_held_against_its_own_peak_and_wants_advice() -> None:
    small = Model.of(CONFIGURATIONS["small"], 4)
    plain = facts(model=small, flops=66.9e12, prompt_tokens=3500, client=Client(50, 0.25, None))
    label = gpu_labels.multiplies_plainly(plain)
    assert label.holds and label.advice == "compute_bound.dtype"
    assert not gpu_labels.multiplies_plainly(replace(plain, client=Client(50, 0.5, None))).holds


def test_without_nsys_the_client_says_what_a_thing_adds() -> None:
    eager = facts(client=EAGER, reference=GRAPHS, counters=EAGER_COUNTED)
    label = gpu_labels.launches_one_by_one(eager)
    assert label.holds and label.rule.startswith("1 − TPOT with graphs ÷ TPOT = 0.76 (≥ 0.25)")
    assert not gpu_labels.launches_one_by_one(replace(eager, reference=None)).holds
    assert gpu_labels.launches_unseen(eager).classes == ("sync_bound",)
    assert gpu_labels.launches_unseen(replace(eager, counters={})).classes == ("unknown",)


def test_nsys_goes_before_what_a_client_says() -> None:
    slow = facts(client=Client(100, 0.02, 17e-3), reference=GRAPHS)
    assert gpu_labels.waits_for_host(slow).holds
    assert not gpu_labels.waits_for_host(replace(slow, traced=Idle(0.20, 0.0, 30))).holds
    assert gpu_labels.starved(replace(slow, reference=None, traced=Idle(0.30, 0.0, 30))).holds
    between, inside = Idle(0.75, 0.05, 30), Idle(0.75, 0.69, 30)
    assert not gpu_labels.launches_one_by_one(replace(slow, traced=between)).holds
    assert gpu_labels.launches_one_by_one(replace(slow, traced=inside)).holds


def test_a_starved_engine_has_to_be_seen_to_be_starved() -> None:
    assert gpu_labels.starved(facts()).evidence == ("host_run_queue", "host_involuntary_switches")


@pytest.mark.parametrize(
    ("idle", "classes", "holds"),
    [
        (None, ("sync_bound", "inefficient_kernels"), True),
        (0.60, ("sync_bound",), True),
        (0.05, ("inefficient_kernels",), True),
        (0.15, ("inefficient_kernels",), False),
    ],
)
def test_a_tiny_model_is_what_nsys_says(idle: float | None, classes: tuple[str, ...], holds: bool) -> None:
    traced = None if idle is None else Idle(idle, 0.0, 30)
    counted = {"graphics": 0.1, "sm": 0.01, "tensor": 0.0, "dram": 0.0}
    label = gpu_labels.leaves_it_idle(facts(counters=counted, traced=traced))
    assert (label.classes, label.holds) == (classes, holds)


def test_no_roof_is_reached_where_a_busy_gpu_moves_and_multiplies_little() -> None:
    counted = {"graphics": 0.97, "sm": 0.9, "tensor": 0.2, "dram": 0.3}
    assert gpu_labels.reaches_no_roof(facts(counters=counted)).holds
    assert gpu_labels.reaches_no_roof(facts(counters=counted, traced=Idle(0.02, 0.0, 30))).holds
    assert not gpu_labels.reaches_no_roof(facts(counters=counted, traced=Idle(0.2, 0.0, 30))).holds
    for name, value in {"graphics": 0.8, "tensor": 0.31, "dram": 0.41}.items():
        assert not gpu_labels.reaches_no_roof(facts(counters={**counted, name: value})).holds, name
    assert not gpu_labels.reaches_no_roof(facts(counters={})).holds


def test_a_clock_has_to_lie_so_much_that_it_shows() -> None:
    assert gpu_labels.is_lied_to(facts(clock_ratio=0.5)).holds
    assert not gpu_labels.is_lied_to(facts(clock_ratio=0.7)).holds


def test_nothing_holds_where_nothing_was_counted() -> None:
    """Neither on a machine without a GPU, nor where no request ended."""
    blind = facts(counters={}, bandwidth=float("inf"), flops=float("inf"), client=Client(0, None, None))
    rules = (
        gpu_labels.reads_memory, gpu_labels.reads_cache, gpu_labels.multiplies, gpu_labels.multiplies_plainly,
        gpu_labels.multiplies_beside_decode, gpu_labels.reaches_no_roof, gpu_labels.launches_one_by_one,
        gpu_labels.launches_unseen, gpu_labels.waits_for_host, gpu_labels.starved, gpu_labels.runs_nothing,
        gpu_labels.lightly_loaded, gpu_labels.leaves_it_idle, gpu_labels.waits_for_cache,
        gpu_labels.is_lied_to,
    )  # fmt: skip
    assert [rule.__name__ for rule in rules if rule(blind).holds] == []


def test_a_small_model_with_many_requests_outruns_the_host_or_not() -> None:
    """As seen with 4 billion parameters and 128 requests: the GPU at work 0.72 of the time."""
    label = gpu_labels.outruns_host(facts(counters={"graphics": 0.72, "dram": 0.42, "tensor": 0.18}))
    assert label.holds
    assert (label.classes, label.cause) == (("sync_bound",), "host_between_steps")
    assert label.rule.startswith("idle by GPU active 0.28 ")
    assert not gpu_labels.outruns_host(facts()).holds
    assert not gpu_labels.outruns_host(facts(traced=Idle(0.05, 0.01, 20))).holds
