"""Uneven routing by the DRAM counter: runs seen on an H200, and experts whose number is known."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprobe.compute.classify import classify
from llmprobe.compute.facts import Experts
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.routing import by_counter
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import Observation

from .verdicts import counters, figures, seen

LIMITS = Thresholds()
H200 = Peaks(4814e9, 989.4e12, "bfloat16", "nominal", "made for these tests")
#: 14 layers, the first of them dense, with 64 experts each: `latent` of the benchmarks.
LATENT = Experts(13 * 64 * 3 * 2048 * 1408 * 2, 13 * 64 * 3 * 2048 * 1408, 64, 6)
#: 16 layers with 64 experts each on two GPUs: `moe` of the benchmarks, half of it.
MOE = Experts(16 * 32 * 3 * 2048 * 768 * 2, 16 * 32 * 3 * 2048 * 768, 64, 8)


def decoded(step_ms: float, mbu: float, batch: int = 32, experts_share: float = 0.9) -> PhaseFigures:
    """Ten seconds of decode; ``mbu`` is of whole steps, by the model, of which experts have that share.

    Floors end at the time that steps took, as in accounting.
    """
    steps = round(9.9 / step_ms * 1e3)
    found = figures(
        steps=steps, span=9.8, gap=0.1, mbu=mbu * 9.9 / 9.8, mfu=0.01, decode_tokens=batch * steps
    )
    memory = min(found.components["floor_memory"], 9.8)
    parts = {"experts": (memory * experts_share, 0.0), "linear": (memory * (1 - experts_share), 0.0)}
    components = {**found.components, "floor_memory": memory, "unattributed": 9.8 - memory}
    return dataclasses.replace(found, components=components, operator_floors=parts)


def observed(found: PhaseFigures, experts: Experts | None, dram: float, **changes: object) -> Observation:
    values = {"peaks": H200, "experts": experts, "counters": counters(dram, 0.05), "one_graph": True}
    return seen(found, **{**values, **changes})


def test_a_batch_that_reaches_the_experts_of_one_token_is_judged_by_the_counter() -> None:
    # vLLM 0.24, H200, made-up weights whose scores all tie: MBU 1.097 by the model, DRAM counter 0.267
    before = observed(decoded(2.998, 1.097), LATENT, 0.267)
    assert classify(before, LIMITS).cause == "contradiction"
    after = by_counter(before, LIMITS)
    assert after.figures is not None
    assert after.figures.mbu_step == pytest.approx(0.267)
    assert after.routing is not None
    assert 6 <= after.routing.reached < 9
    assert after.routing.even == pytest.approx(61.3, abs=0.1)
    verdict = classify(after, LIMITS)
    assert verdict.bottleneck == "inefficient_kernels"
    assert "MBU 0.27" in verdict.reason
    assert "reach some 8 of 64 experts, where even routing would reach 61" in verdict.reason
    shown = {item.quantity: item for item in verdict.evidence}
    assert shown["mbu_busy"].source == "counter"
    assert (shown["experts_reached"].value, shown["experts_reached"].threshold) == (
        after.routing.reached,
        after.routing.even,
    )


def test_the_floor_is_that_of_what_was_read() -> None:
    before = decoded(3.896, 0.935)
    after = by_counter(observed(before, LATENT, 0.302), LIMITS).figures
    assert after is not None
    assert before.floor_seconds is not None
    assert after.floor_seconds == pytest.approx(before.floor_seconds * 0.302 / 0.935)
    assert sum(after.components.values()) == pytest.approx(sum(before.components.values()))
    assert after.operator_floors["linear"] == pytest.approx(before.operator_floors["linear"])
    memory = sum(memory for memory, _ in after.operator_floors.values())
    assert memory == pytest.approx(after.components["floor_memory"])
    assert after.intensity == pytest.approx((before.intensity or 0) * 0.935 / 0.302)


@pytest.mark.parametrize(
    ("label", "found", "experts", "dram"),
    [
        ("even routing, as on an H200", decoded(3.08, 0.406), MOE, 0.410),
        ("a counter not far below", decoded(3.08, 0.60), MOE, 0.46),
        ("no experts", decoded(2.998, 1.0), None, 0.267),
        ("less than one token's experts need", decoded(3.896, 0.935), LATENT, 0.1),
        ("no counters of this phase", dataclasses.replace(decoded(3.896, 0.935), seconds=5.0), LATENT, 0.3),
        ("no step", decoded(3.896, 0.935, batch=0), LATENT, 0.3),
    ],
)
def test_all_else_stays_as_it_was(
    label: str, found: PhaseFigures, experts: Experts | None, dram: float
) -> None:
    before = observed(found, experts, dram)
    assert by_counter(before, LIMITS) is before


def test_others_on_the_gpu_make_its_counter_nobodys() -> None:
    before = observed(decoded(3.896, 0.935), LATENT, 0.3, counters=counters(0.3, 0.05, shared=True))
    assert by_counter(before, LIMITS) is before


def test_without_a_counter_an_mbu_above_the_peak_names_routing_among_its_reasons() -> None:
    verdict = classify(observed(decoded(2.998, 1.3), LATENT, 0.0, counters=None), LIMITS)
    assert verdict.cause == "contradiction"
    assert "fewer experts than even routing" in verdict.reason
    dense = classify(observed(decoded(2.998, 1.3), None, 0.0, counters=None), LIMITS)
    assert "experts" not in dense.reason


def test_a_counter_alone_is_one_witness() -> None:
    """The model's MBU, put right by the counter, does not bear the counter out."""
    moved = observed(decoded(3.896, 0.95), LATENT, 0.78)
    uneven = classify(by_counter(moved, LIMITS), LIMITS)
    even = classify(observed(decoded(3.896, 0.80), LATENT, 0.78), LIMITS)
    assert uneven.bottleneck == even.bottleneck == "memory_bound"
    assert uneven.confidence < even.confidence


@given(
    idle=st.integers(1, 500),
    top_k=st.integers(1, 16),
    tokens=st.integers(1, 256),
    uneven=st.floats(0, 1),
    others=st.floats(0.001, 0.3),
    whole=st.floats(0.2, 2),
    extra=st.floats(0, 0.05),
)
def test_the_number_of_experts_is_found(
    idle: int, top_k: int, tokens: int, uneven: float, others: float, whole: float, extra: float
) -> None:
    """Shares of what memory could move: ``whole`` (all experts), ``others``, ``extra`` (in no model)."""
    count = top_k + idle
    one = whole / count
    even = count * (1 - (1 - top_k / count) ** tokens)
    reached = top_k + (max(even, top_k) - top_k) * uneven
    modelled, counted = others + one * even, others + one * reached + extra
    found = decoded(3.0, modelled, tokens, one * even / modelled)
    could_move = H200.bandwidth_bytes_per_second * found.seconds / found.steps
    experts = Experts(one * count * could_move, 1.0, count, top_k)
    after = by_counter(observed(found, experts, counted), LIMITS)
    if modelled - counted <= LIMITS.counter_disagreement_ratio:
        if modelled - counted < LIMITS.counter_disagreement_ratio - 1e-9:
            assert after.routing is None
        return
    assert after.routing is not None
    assert after.figures is not None
    assert after.routing.reached == pytest.approx(reached + extra / one, rel=1e-6)
    assert after.routing.reached <= after.routing.even
    assert after.figures.mbu_step == pytest.approx(counted)
    assert all(part >= -1e-9 for part in after.figures.components.values())
    assert all(part >= 0 for pair in after.figures.operator_floors.values() for part in pair)
    assert sum(after.figures.components.values()) == pytest.approx(sum(found.components.values()))
