"""Classes, causes and what is missing, on windows whose truth is known by construction."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmprobe.compute.classify import classify
from llmprobe.compute.confidence import HOST_CLOCK_LIMIT
from llmprobe.compute.evidence import CounterEvidence
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.host import ThreadLoad
from llmprobe.compute.stall import RunningStep
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import BOTTLENECKS, CAUSES, UNKNOWN_CAUSES, Observation

from .verdicts import ATTAINABLE, counters, figures, host, kernels, seen

LIMITS = Thresholds()


def active(graphics: float) -> CounterEvidence:
    """Counters of a GPU that was active for so much of the time, and otherwise near nothing."""
    return counters(0.2, 0.01, graphics_active_ratio=graphics)


CPU = {"clock": "host", "peaks": Peaks(50e9, 2e12, "bfloat16", "calibrated", "measured")}


@pytest.mark.parametrize(
    ("label", "observation", "bottleneck", "cause"),
    [
        # figures as they were seen on an H100 with an 8B model; see docs/verdicts.md
        ("graphs, batch 1", seen(figures(mbu=0.68, mfu=0.003, gap=0.09)), "memory_bound", None),
        (
            "graphs, batch 1, counters",
            seen(figures(mbu=0.68, mfu=0.003), counters=counters(0.67, 0.02)),
            "memory_bound",
            None,
        ),
        (
            "graphs, batch 128",
            seen(figures(mbu=0.55, mfu=0.2), counters=counters(0.68, 0.25)),
            "memory_bound",
            None,
        ),
        (
            "prefill",
            seen(figures(mbu=0.05, mfu=0.57), phase="prefill", counters=counters(0.26, 0.74)),
            "compute_bound",
            None,
        ),
        (
            "eager, windows",
            seen(figures(mbu=0.17, mfu=0.001), kernels=kernels(0.77)),
            "sync_bound",
            "launch_bubbles",
        ),
        ("eager, no windows", seen(figures(mbu=0.17, mfu=0.001)), "unknown", "no_kernel_windows"),
        (
            "eager, counters alone",
            seen(figures(mbu=0.17, mfu=0.001), counters=counters(0.24, 0.01)),
            "unknown",
            "no_kernel_windows",
        ),
        (
            "eager, the counter of activity",
            seen(figures(mbu=0.26, mfu=0.001, span=9.13, gap=0.67), counters=active(0.39)),
            "sync_bound",
            "launch_bubbles",
        ),
        (
            "eager, a counter that leaves room for bubbles",
            seen(figures(mbu=0.26, mfu=0.001, span=9.13, gap=0.67), counters=active(0.84)),
            "unknown",
            "no_kernel_windows",
        ),
        (
            "odd shapes, a counter that leaves none",
            seen(figures(mbu=0.01, mfu=0.14, span=9.4, gap=0.1), phase="prefill", counters=active(0.98)),
            "inefficient_kernels",
            None,
        ),
        (
            "odd shapes, for half of the window",
            seen(figures(mbu=0.01, mfu=0.14, span=4.7, gap=0.1), phase="prefill", counters=active(0.98)),
            "unknown",
            "no_kernel_windows",
        ),
        (
            "eager, for half of the window",
            seen(figures(mbu=0.26, mfu=0.001, span=4.5, gap=0.3), counters=active(0.2)),
            "unknown",
            "no_kernel_windows",
        ),
        (
            "host and the counter",
            seen(figures(mbu=0.66, mfu=0.002, span=4.8, gap=5.0), counters=active(0.49)),
            "sync_bound",
            "host_between_steps",
        ),
        (
            "tiny model, one graph",
            seen(figures(mbu=0.002, mfu=0.0, span=4.1, gap=5.6), counters=active(0.08), one_graph=True),
            "sync_bound",
            "host_between_steps",
        ),
        ("one graph", seen(figures(mbu=0.3, mfu=0.1), one_graph=True), "inefficient_kernels", None),
        (
            "one graph, gap",
            seen(figures(mbu=0.3, gap=9.0), one_graph=True),
            "sync_bound",
            "host_between_steps",
        ),
        ("host 3 ms a step", seen(figures(mbu=0.6, span=6.0, gap=3.0)), "sync_bound", "host_between_steps"),
        ("host before sampling", seen(figures(mbu=0.6, sample_gap=3.0)), "sync_bound", "sampling"),
        (
            "all-reduces, GPU active",
            seen(
                figures(mbu=0.4),
                kernels=kernels(0.02, 0.45),
                counters=counters(0.3, 0.1, graphics_active_ratio=0.98),
            ),
            "sync_bound",
            "communication",
        ),
        ("all-reduces", seen(figures(mbu=0.4), kernels=kernels(0.02, 0.3)), "sync_bound", "communication"),
        ("offload", seen(figures(mbu=0.1), kernels=kernels(0.02, 0.0, 0.6)), "sync_bound", "transfers"),
        ("odd shapes", seen(figures(mbu=0.2, mfu=0.1), kernels=kernels(0.02)), "inefficient_kernels", None),
        ("at the ridge", seen(figures(mbu=0.6, mfu=0.6)), "balanced", None),
        ("idle", seen(figures(steps=20, span=0.2, gap=0.0)), "idle", None),
        ("no step", Observation("decode", 10.0, None, "cuda"), "idle", None),
        ("few long steps", seen(figures(steps=20, mbu=0.05, mfu=0.6)), "compute_bound", None),
        ("a clock that lies", seen(figures(mbu=1.6)), "unknown", "contradiction"),
        ("a clock that kernels refute", seen(kernels=kernels(clock_ratio=1.6)), "unknown", "contradiction"),
        (
            "a model that the counter refutes",
            seen(figures(mbu=0.7), counters=counters(0.3, 0.02)),
            "unknown",
            "contradiction",
        ),
        ("somebody else's GPU too", seen(counters=counters(0.7, 0.1, shared=True)), "unknown", "shared_gpu"),
        ("workers alone", seen(figures(sync_gap_ratio=None)), "unknown", "no_front_end"),
        ("no peaks", seen(figures(mbu=None, mfu=None), peaks=None), "unknown", "no_peaks"),
        ("no model", seen(figures(mbu=None, mfu=None), no_model="two models"), "unknown", "no_model"),
        (
            "no peaks, yet it waits",
            seen(figures(mbu=None, mfu=None, gap=5.0), peaks=None),
            "sync_bound",
            "host_between_steps",
        ),
        (
            "old windows",
            seen(figures(mbu=0.17), kernels=kernels(0.02, age_seconds=300.0)),
            "unknown",
            "no_kernel_windows",
        ),
        ("CPU, near the roof", seen(figures(mbu=0.6), **CPU), "memory_bound", None),
        ("CPU, far from it", seen(figures(mbu=0.1), **CPU), "inefficient_kernels", None),
        ("CPU, in the cache", seen(figures(mbu=1.5), **CPU), "unknown", "contradiction"),
        ("CPU that waits", seen(figures(mbu=0.4, gap=5.0), **CPU), "sync_bound", "host_between_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_class_and_cause(label: str, observation: Observation, bottleneck: str, cause: str | None) -> None:
    found = classify(observation, LIMITS)
    assert (found.bottleneck, found.cause) == (bottleneck, cause), found.reason
    assert found.bottleneck in BOTTLENECKS
    assert found.cause is None or found.cause in {*CAUSES, *UNKNOWN_CAUSES}


@pytest.mark.parametrize(
    ("steps", "span", "running", "bottleneck"),
    [
        (0, 0.0, 0.0, "idle"),
        (0, 0.0, 4.9, "idle"),
        (0, 0.0, 5.1, "unknown"),
        (0, 0.0, 10.0, "unknown"),
        (10, 3.0, 1.0, "idle"),
        (10, 3.0, 2.1, "unknown"),
        (10, 6.0, 2.1, "memory_bound"),  # enough ended to be judged
        (500, 9.0, 0.9, "memory_bound"),
    ],
)
def test_a_step_that_runs_is_no_idleness(steps: int, span: float, running: float, bottleneck: str) -> None:
    ended = figures(steps=steps, span=span, gap=0.0) if steps else None
    step = RunningStep("decode", 700.0, running) if running else None
    found = classify(dataclasses.replace(seen(), figures=ended, running=step), LIMITS)
    assert found.bottleneck == bottleneck
    if bottleneck == "unknown":
        assert found.cause == "step_running"
        assert found.confidence == 0
        assert found.share_ratio == pytest.approx(min(span + running, 10) / 10)
        assert found.reason == f"{steps} steps in 10 s, and one has been running for 700 s"


@pytest.mark.parametrize(
    ("steps", "seconds", "said"), [(1, 20.430001, "1 step in 20.4 s"), (4, 10.0, "4 steps in 10 s")]
)
def test_idle_says_how_many_steps_in_words(steps: int, seconds: float, said: str) -> None:
    window = dataclasses.replace(seen(figures(steps=steps, span=0.1, gap=0.0)), window_seconds=seconds)
    assert classify(window, LIMITS).reason == said


def test_each_witness_that_agrees_makes_it_surer() -> None:
    plain = classify(seen(figures(mbu=0.72)), LIMITS)
    windows = classify(seen(figures(mbu=0.72), kernels=kernels()), LIMITS)
    all_of_them = classify(seen(figures(mbu=0.72), kernels=kernels(), counters=counters(0.75, 0.05)), LIMITS)
    assert plain.confidence < windows.confidence < all_of_them.confidence < 1


def test_windows_that_have_seen_nothing_of_a_phase_are_not_called_off() -> None:
    eager = figures(mbu=0.17, mfu=0.001)
    assert "kernel windows are off" in classify(seen(eager), LIMITS).reason
    found = classify(seen(eager, windows_on=True), LIMITS)
    assert (found.bottleneck, found.cause) == ("unknown", "no_kernel_windows")
    assert "kernel windows have seen too few of its steps" in found.reason


def test_a_counter_that_reads_what_the_model_says_confirms_it_short_of_its_own_threshold() -> None:
    """Seen on an H200: MBU 0.61 and DRAM counter 0.60; below 0.70 the counter used to say nothing."""

    def confidence(found: PhaseFigures, dram: float, tensor: float) -> float:
        return classify(seen(found, counters=counters(dram, tensor)), LIMITS).confidence

    reads = figures(mbu=0.61)
    alone = classify(seen(reads), LIMITS).confidence
    assert confidence(reads, 0.60, 0.03) > alone
    assert confidence(reads, 0.50, 0.03) == alone
    computes = figures(mbu=0.03, mfu=0.62)
    alone = classify(seen(computes), LIMITS).confidence
    assert confidence(computes, 0.2, 0.63) > alone
    assert confidence(computes, 0.2, 0.02) == alone  # float32: no tensor core has a part in it


def test_a_witness_that_objects_makes_it_less_sure() -> None:
    plain = classify(seen(figures(mbu=0.05, mfu=0.6)), LIMITS)
    against = classify(seen(figures(mbu=0.05, mfu=0.6), counters=counters(0.9, 0.3)), LIMITS)
    assert against.bottleneck in ("memory_bound", "compute_bound")
    assert against.confidence < plain.confidence / 2


def test_at_the_threshold_nothing_is_sure() -> None:
    assert classify(seen(figures(mbu=0.50)), LIMITS).confidence <= 0.35
    assert classify(seen(figures(span=8.0, gap=2.01)), LIMITS).confidence <= 0.35


def test_the_host_clock_of_a_cpu_is_never_very_sure() -> None:
    found = classify(seen(figures(mbu=0.95), **CPU, host=host()), LIMITS)
    assert 0 < found.confidence <= HOST_CLOCK_LIMIT
    assert found.clock == "host"


def test_host_signals_explain_a_wait_and_make_it_surer() -> None:
    waits = figures(span=6.0, gap=3.0)
    plain = classify(seen(waits, host=host()), LIMITS)
    busy = host(threads=(ThreadLoad("VLLM::EngineCor", 0.99, 0.0),))
    explained = classify(seen(waits, host=busy), LIMITS)
    assert explained.confidence > plain.confidence
    assert explained.signs == ("thread_busy",)
    assert "VLLM::EngineCor" in explained.reason
    throttled = classify(seen(waits, host=host(throttled_ratio=0.4)), LIMITS)
    assert throttled.signs == ("throttled",)


def test_hidden_bubbles_raise_the_mbu_of_busy_time() -> None:
    found = classify(seen(figures(mbu=0.45), kernels=kernels(0.15)), LIMITS)
    assert found.bottleneck == "memory_bound"
    shown = {item.quantity: item.value for item in found.evidence}
    assert shown["mbu_busy"] == pytest.approx(0.45 / 0.85)


def test_near_the_attainable_rate_is_healthy() -> None:
    found = classify(seen(figures(mbu=0.85), attainable=ATTAINABLE), LIMITS)
    assert found.near_roof is True
    assert found.healthy
    assert found.attained_ratio == pytest.approx(0.85 * 3352 / 3020)
    unmeasured = classify(seen(figures(mbu=0.85)), LIMITS)
    assert unmeasured.near_roof is None
    assert unmeasured.healthy
    far = classify(seen(figures(mbu=0.55), attainable=ATTAINABLE), LIMITS)
    assert far.near_roof is False
    assert not far.healthy


def test_headroom_is_what_a_step_takes_beyond_its_floor() -> None:
    found = classify(seen(figures(mbu=0.7, span=9.0, gap=0.1, steps=1000)), LIMITS)
    assert found.headroom_seconds == pytest.approx((9.1 - 0.7 * 9.0) / 1000)


def test_the_operator_with_the_largest_part_is_named() -> None:
    floors = {"linear": (2.0, 0.0), "attention": (4.0, 0.0), "head": (0.3, 0.0)}
    assert classify(seen(figures(operator_floors=floors)), LIMITS).bound_by_operator == "attention"


def test_evidence_names_value_threshold_source_and_age() -> None:
    found = classify(seen(figures(), kernels=kernels(age_seconds=7.0), counters=counters(0.7, 0.1)), LIMITS)
    by_name = {item.quantity: item for item in found.evidence}
    assert by_name["sync_gap_ratio"].source == "sampled"
    assert by_name["sync_gap_ratio"].age_seconds == 7.0
    assert by_name["mbu_busy"].threshold == LIMITS.memory_mbu_ratio
    assert by_name["mbu_busy"].source == "modelled"
    assert by_name["dram_active_ratio"].source == "counter"


def test_counters_say_nothing_of_a_phase_that_fills_little_of_the_window() -> None:
    little = figures(mbu=0.6, span=3.0, gap=0.0)
    alone, counted = (classify(seen(little, counters=c), LIMITS) for c in (None, counters(0.2, 0.1)))
    assert alone.bottleneck == counted.bottleneck == "memory_bound"
    assert alone.confidence == counted.confidence


def test_a_class_that_stands_is_kept_a_little_beyond_its_threshold() -> None:
    just_below = seen(figures(mbu=0.48))
    assert classify(just_below, LIMITS).bottleneck == "unknown"
    assert classify(just_below, LIMITS, current="memory_bound").bottleneck == "memory_bound"
    waits = seen(figures(mbu=0.7, span=8.0, gap=2.1))
    assert classify(waits, LIMITS).bottleneck == "sync_bound"
    assert classify(waits, LIMITS, current="memory_bound").bottleneck == "memory_bound"


def test_what_beats_the_peak_without_its_bubbles_is_a_contradiction() -> None:
    """1.05 may be noise; with the bubbles that windows saw in busy time it is 1.28."""
    assert classify(seen(figures(mbu=1.05)), LIMITS).bottleneck == "memory_bound"
    found = classify(seen(figures(mbu=1.05), kernels=kernels(0.18)), LIMITS)
    assert (found.bottleneck, found.cause) == ("unknown", "contradiction")
    assert found.reason.startswith("MBU 1.28 is above the peak")
    waits = classify(seen(figures(mbu=0.4), kernels=kernels(0.77)), LIMITS)
    assert waits.bottleneck == "sync_bound", "a wait that windows saw says nothing of the rate beside it"


ratios = st.floats(0, 1.05)


@settings(deadline=None)
@given(
    mbu=ratios,
    mfu=ratios,
    by_memory=ratios,
    by_compute=ratios,
    gap=st.floats(0, 5),
    windows=st.none() | st.tuples(ratios, ratios, ratios).map(lambda three: kernels(*three)),
    gpm=st.none() | st.builds(counters, ratios, ratios, graphics_active_ratio=st.none() | ratios),
    one_graph=st.booleans(),
    clock=st.sampled_from(["cuda", "host"]),
)
@example(0.52, 0.38, 0.22, 0.34, 0.1, None, None, False, "cuda")
def test_what_is_found_once_is_found_again_while_it_stands(  # type: ignore[no-untyped-def]
    mbu, mfu, by_memory, by_compute, gap, windows, gpm, one_graph, clock
) -> None:
    """Else a constant load would make two classes take turns."""
    found = figures(mbu=mbu, mfu=mfu, gap=gap)
    # Operators have roofs of their own: the larger part of the floor need not be the nearer roof's.
    floors = {
        "floor_memory": by_memory * found.span_seconds,
        "floor_compute": by_compute * found.span_seconds,
    }
    observation = seen(
        dataclasses.replace(found, components={**found.components, **floors}),
        kernels=windows,
        counters=gpm,
        one_graph=one_graph,
        clock=clock,
    )
    first = classify(observation, LIMITS)
    again = classify(observation, LIMITS, first.bottleneck)
    assert (again.bottleneck, again.cause) == (first.bottleneck, first.cause)


@settings(deadline=None)
@given(
    mbu=st.none() | ratios,
    mfu=st.none() | ratios,
    gap=st.floats(0, 20),
    sample_gap=st.floats(0, 8),
    steps=st.integers(0, 5000),
    windows=st.none() | st.tuples(ratios, ratios, ratios).map(lambda three: kernels(*three)),
    gpm=st.none() | st.builds(counters, ratios, ratios),
    clock=st.sampled_from(["cuda", "host"]),
    current=st.none() | st.sampled_from(BOTTLENECKS),
)
def test_every_verdict_is_whole(mbu, mfu, gap, sample_gap, steps, windows, gpm, clock, current) -> None:  # type: ignore[no-untyped-def]
    found = classify(
        seen(
            figures(mbu=mbu, mfu=mfu, gap=gap, sample_gap=sample_gap, steps=steps),
            kernels=windows,
            counters=gpm,
            clock=clock,
            attainable=ATTAINABLE,
            host=host(),
        ),
        LIMITS,
        current,
    )
    assert found.bottleneck in BOTTLENECKS
    assert 0 <= found.confidence <= 1
    assert found.reason
    assert (found.cause is not None) == (found.bottleneck in ("sync_bound", "unknown"))
    assert bool(found.missing) == (found.bottleneck == "unknown")
    assert found.bottleneck != "unknown" or found.confidence == 0
    assert found.headroom_seconds is None or found.headroom_seconds >= 0
    assert 0 <= found.share_ratio <= 1


@settings(deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_more_waiting_never_ends_a_wait(one: float, other: float) -> None:
    less, more = sorted((one, other))

    def bound(ratio: float) -> bool:
        found = seen(figures(span=10 * (1 - ratio), gap=10 * ratio, mbu=0.7), window_seconds=10.0)
        return classify(found, LIMITS).bottleneck == "sync_bound"

    assert bound(more) >= bound(less)


def test_a_gpu_that_communicates_is_active_and_that_is_no_objection() -> None:
    def sure(graphics: float | None) -> float:
        seen_now = seen(
            figures(mbu=0.4),
            kernels=kernels(0.02, 0.45),
            counters=counters(0.3, 0.1, graphics_active_ratio=graphics),
        )
        return classify(seen_now, LIMITS).confidence

    assert sure(0.98) == sure(None)


def test_a_gpu_that_was_active_objects_to_a_wait_for_the_host() -> None:
    waits = figures(mbu=0.6, span=5.0, gap=5.0)
    agrees = classify(seen(waits, counters=active(0.5)), LIMITS)
    objects = classify(seen(waits, counters=active(0.98)), LIMITS)
    assert agrees.bottleneck == objects.bottleneck == "sync_bound"
    assert objects.confidence < 0.5 < agrees.confidence


def test_a_phase_whose_work_is_not_modelled_is_not_told_to_measure_peaks() -> None:
    found = classify(seen(figures(mbu=None, mfu=None), phase="draft"), Thresholds())
    assert (found.bottleneck, found.cause) == ("unknown", "no_model")
    assert found.missing == ("the work of draft steps is not modelled",)


@pytest.mark.parametrize(("per_floor", "bound"), [(1.25, "sync_bound"), (2.4, "inefficient_kernels")])
def test_bubbles_are_of_the_steps_that_are_judged(per_floor: float, bound: str) -> None:
    """The windows saw none; kernels run for 1.25 or 2.4 times the floor, and steps take 2.5 times it."""
    slow = figures(mbu=0.4, mfu=0.01)
    work = {"busy_per_floor": per_floor, "floor_step_seconds": slow.floor_seconds, "step_tokens": 1.0}
    found = classify(seen(slow, kernels=kernels(0.0, **work)), Thresholds())
    assert found.bottleneck == bound
    if bound == "sync_bound":
        assert found.cause == "launch_bubbles"
