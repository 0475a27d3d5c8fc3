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

from .verdicts import counters, figures, kernels, seen

LIMITS = Thresholds()
SECONDS, SPAN = 9.9, 9.8  # of a window of 10
#: 1 byte/s and 1 FLOP/s: bytes and FLOPs are seconds.
ONE = Peaks(1.0, 1.0, "bfloat16", "nominal", "made for these tests")


def decoded(experts: float, others: float, compute: float = 0.0, steps: int = 1000) -> PhaseFigures:
    """A window of steps, all of it seconds: what memory takes for experts and for all else, and compute.

    Floors end at the time that steps took, as in accounting.
    """
    floor = experts + others + compute
    cut = min(SPAN / floor, 1.0)
    parts = {"experts": (experts, 0.0), "linear": (others, 0.0), "head": (0.0, compute)}
    return figures(
        steps=steps,
        span=SPAN,
        gap=SECONDS - SPAN,
        mbu=(experts + others) / SPAN,
        mfu=0.01,
        floor_seconds=floor / steps,
        components={
            "floor_memory": (experts + others) * cut,
            "floor_compute": compute * cut,
            "host_gap": SECONDS - SPAN,
            "sample_gap": 0.0,
            "unattributed": SPAN - floor * cut,
        },
        operator_floors={name: (memory * cut, of * cut) for name, (memory, of) in parts.items()},
    )


def observed(
    found: PhaseFigures, whole: float, dram: float, count: int = 64, top_k: int = 6, **changes: object
) -> Observation:
    """``whole``: seconds for all experts of a rank in every step; ``dram``: of the window's 10 s."""
    experts = Experts(whole / found.steps, 1.0, count, top_k)
    values = {"peaks": ONE, "experts": experts, "counters": counters(dram / 10, 0.05), "one_graph": True}
    return seen(found, **{**values, **changes})


#: vLLM 0.24, an H200, 32 tokens a step, made-up weights whose scores all tie: each takes the same 6 of 64
#: experts. MBU 1.097 by the model, DRAM counter 0.267; experts are 0.87 of the modelled bytes.
TIED = observed(decoded(1.097 * 9.9 * 0.871, 1.097 * 9.9 * 0.129), 1.097 * 9.9 * 0.871 / 0.957, 2.67)


def test_a_batch_that_reads_the_experts_of_one_token_is_judged_by_the_counter() -> None:
    assert classify(TIED, LIMITS).cause == "contradiction"
    after = by_counter(TIED, LIMITS)
    assert after.figures is not None
    assert after.figures.mbu_step == pytest.approx(0.2697, abs=0.0001)
    assert after.routing is not None
    assert after.routing.even_ratio == pytest.approx(0.957, abs=0.001)
    assert 6 / 64 < after.routing.read_ratio < 9 / 64
    assert after.routing.weight == 1
    verdict = classify(after, LIMITS)
    assert verdict.bottleneck == "inefficient_kernels"
    assert "MBU 0.27" in verdict.reason
    assert "MBU 1.10 if routing were even" in verdict.reason
    assert "read 13% of the experts' weights instead of 96%" in verdict.reason
    shown = {item.quantity: item for item in verdict.evidence}
    assert (shown["mbu_busy"].source, shown["intensity_flops_per_byte"].source) == ("counter", "counter")
    read = shown["experts_read_ratio"]
    assert (read.value, read.threshold) == (after.routing.read_ratio, after.routing.even_ratio)


@pytest.mark.parametrize(
    ("label", "before"),
    [
        ("even routing, as on an H200", observed(decoded(3.5, 0.52), 3.56, 4.10)),
        ("a counter that is only a little below", observed(decoded(5.0, 1.0), 5.2, 5.6)),
        ("no experts", observed(decoded(8.0, 1.0), 8.5, 2.7, experts=None)),
        ("less than one token's experts need", observed(decoded(8.0, 1.0), 8.5, 1.0)),
        ("experts that compute bounds", observed(decoded(0.0, 6.0, 2.0), 0.5, 2.0)),
        (
            "counters of others too",
            observed(decoded(8.0, 1.0), 8.5, 3.0, counters=counters(0.3, 0.1, shared=True)),
        ),
        ("most of the window something else", observed(decoded(8.0, 1.0), 8.5, 3.0, window_seconds=20.0)),
        ("a counter that stands still", observed(decoded(8.0, 0.3), 8.5, 0.0, expert_parallel=True)),
        ("no steps", observed(decoded(8.0, 1.0), 8.5, 3.0, figures=None)),
    ],
)
def test_all_else_stays_as_it_was(label: str, before: Observation) -> None:
    assert by_counter(before, LIMITS) is before


def test_a_rank_without_favoured_experts_reads_none_where_whole_experts_are_spread() -> None:
    found = decoded(8.0, 1.0)
    assert by_counter(observed(found, 8.5, 1.2), LIMITS).routing is None
    after = by_counter(observed(found, 8.5, 1.2, expert_parallel=True), LIMITS)
    assert after.routing is not None
    assert after.routing.read_ratio == pytest.approx(0.2 / 8.5)
    none = by_counter(observed(found, 8.5, 0.8, expert_parallel=True), LIMITS)  # a counter that reads low
    assert none.routing is not None
    assert none.figures is not None
    assert none.routing.read_ratio == 0
    assert none.figures.operator_floors["experts"] == (0, 0)


def test_what_kernel_windows_saw_is_told_by_the_work_of_the_model() -> None:
    """Bubbles are busy time beyond what windows saw kernels take for a modelled floor, and for no other."""
    found = decoded(8.0, 1.0)
    window = kernels(0.01, busy_per_floor=1.05, floor_step_seconds=found.floor_seconds, step_tokens=1.0)
    for dram in (8.9, 8.2, 7.4, 6.6, 5.0):
        verdict = classify(by_counter(observed(found, 8.5, dram, kernels=window), LIMITS), LIMITS)
        assert verdict.bottleneck != "sync_bound", dram
        shown = {item.quantity: item.value for item in verdict.evidence}
        assert shown["launch_gap_ratio"] == pytest.approx((SPAN - 1.05 * 9.0) / SPAN)


def test_an_mbu_does_not_jump_where_the_counter_begins_to_count() -> None:
    found, last = decoded(6.0, 1.0), None
    for step in range(200):
        dram = 7.2 - step * 0.02
        after = by_counter(observed(found, 6.3, dram), LIMITS)
        assert after.figures is not None
        mbu = after.figures.mbu_step
        assert mbu is not None
        if last is not None:
            assert 0 <= last - mbu < 0.006  # the counter itself goes down by 0.002
        last = mbu


def test_without_a_counter_an_mbu_above_the_peak_names_routing_among_its_reasons() -> None:
    verdict = classify(dataclasses.replace(TIED, counters=None, figures=decoded(12.0, 1.0)), LIMITS)
    assert verdict.cause == "contradiction"
    assert "fewer experts than even routing" in verdict.reason
    dense = classify(
        dataclasses.replace(TIED, counters=None, figures=decoded(12.0, 1.0), experts=None), LIMITS
    )
    assert "experts" not in dense.reason


def test_a_counter_alone_is_one_witness() -> None:
    """The model's MBU, put right by the counter, does not bear the counter out."""
    uneven = classify(by_counter(observed(decoded(8.4, 1.0), 9.0, 7.7), LIMITS), LIMITS)
    even = classify(by_counter(observed(decoded(6.8, 1.0), 9.0, 7.7), LIMITS), LIMITS)
    assert uneven.bottleneck == even.bottleneck == "memory_bound"
    assert 0 < uneven.confidence < even.confidence


def test_both_roofs_near_are_not_told_by_the_memory_alone() -> None:
    found = dataclasses.replace(decoded(6.5, 1.0), mfu_busy=0.6, mfu_step=0.6, intensity=0.9)
    verdict = classify(by_counter(observed(found, 7.0, 5.5), LIMITS), LIMITS)
    assert verdict.bottleneck == "balanced"
    assert verdict.confidence > 0


@given(
    idle=st.integers(1, 500),
    top_k=st.integers(1, 16),
    even=st.floats(0, 1),
    uneven=st.floats(0, 1),
    others=st.floats(0.01, 3),
    compute=st.floats(0, 3),
    whole=st.floats(1, 30),
    extra=st.floats(0, 0.4),
)
def test_what_was_read_is_found(
    idle: int,
    top_k: int,
    even: float,
    uneven: float,
    others: float,
    compute: float,
    whole: float,
    extra: float,
) -> None:
    """Seconds of the memory: all experts (``whole``), all else (``others``), and ``extra`` in no model."""
    count = top_k + idle
    least = top_k / count
    even = least + (1 - least) * even
    read = least + (even - least) * uneven
    found = decoded(whole * even, others, compute)
    counted = others + whole * read + extra
    after = by_counter(observed(found, whole, counted, count, top_k), LIMITS)
    apart = (whole * even + others - counted) / SECONDS
    if apart <= LIMITS.counter_agreement_ratio:
        if apart < LIMITS.counter_agreement_ratio - 1e-9:
            assert after.routing is None
        return
    if after.routing is None:
        assert apart < LIMITS.counter_agreement_ratio + 1e-9
        return
    assert after.figures is not None
    assert after.routing.read_ratio == pytest.approx(read + extra / whole)
    assert after.routing.even_ratio == pytest.approx(even)
    assert counted / SECONDS - 1e-9 <= (after.figures.mbu_step or 0) <= (found.mbu_step or 0)
    if after.routing.weight == 1:
        assert after.figures.mbu_step == pytest.approx(counted / SECONDS)
    parts, floors = after.figures.components, after.figures.operator_floors
    assert all(part >= 0 for part in parts.values())
    assert sum(parts.values()) == pytest.approx(sum(found.components.values()))
    assert parts["floor_memory"] == pytest.approx(sum(memory for memory, _ in floors.values()))
    assert parts["floor_compute"] == pytest.approx(sum(of for _, of in floors.values()))
    if others + compute + whole * even <= SPAN:
        assert floors["linear"][0] == pytest.approx(others)
        assert floors["head"][1] == pytest.approx(compute)
