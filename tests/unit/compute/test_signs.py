"""Signs of the host: what stands out, and what a healthy server shows too and is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmprobe.compute.classify import classify
from llmprobe.compute.host import ThreadLoad, together
from llmprobe.compute.signs import SIGNS, signs
from llmprobe.compute.thresholds import Thresholds

from .verdicts import figures, host, kernels, seen

LIMITS = Thresholds()


def names(**changes: object) -> list[str]:
    return [sign.name for sign in signs(host(**changes), LIMITS)]


#: As vLLM 0.32 on two cores of a CPU was seen under the demo's load: the most of each over 5 s.
HEALTHY = {
    "threads": (ThreadLoad("VLLM::Worker", 0.88, 0.04), ThreadLoad("VLLM::EngineCor", 0.11, 0.02)),
    "run_queue_ratio": 0.04,
    "minor_faults_per_second": 10_272.0,
    "cpu_pressure_ratio": 0.95,
    "numa_nodes_allowed": 1,
}


def test_a_healthy_server_under_load_shows_none() -> None:
    assert names(**HEALTHY) == []


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({"throttled_ratio": 0.1}, "throttled", "the container's CPU quota stopped it 10% of the time"),
        (
            {"involuntary_switches_per_second": 300.0, "run_queue_ratio": None, "threads": ()},
            "involuntary_switches",
            "300 times a second",
        ),
        ({"major_faults_per_second": 9.0}, "major_faults", "9 page faults a second read from disk"),
        ({"memory_pressure_ratio": 0.2}, "memory_pressure", "tasks waited for memory 20% of the time"),
        ({"minor_faults_per_second": 2e6}, "minor_faults", "2000000 page faults a second mapped memory anew"),
        (
            {"cpu_pressure_ratio": 0.8, "run_queue_ratio": None, "threads": ()},
            "cpu_pressure",
            "tasks waited for a core 80% of the time",
        ),
        ({"numa_nodes_allowed": 2}, "numa_spread", "its threads may run on 2 NUMA nodes"),
        ({"threads": (ThreadLoad("python", 0.95, 0.0),)}, "thread_busy", "thread python used 95% of a core"),
    ],
)
def test_what_stands_out_is_said(changes: dict[str, object], name: str, text: str) -> None:
    (found,) = signs(host(**changes), LIMITS)
    assert found.name == name
    assert found.text.endswith(text)
    assert found.value >= found.threshold
    assert found.name in SIGNS


def test_a_starved_thread_is_found_beside_one_that_uses_more() -> None:
    """With one core the thread that spins is the busiest; the one that schedules waits for it."""
    starved = host(threads=(ThreadLoad("spin", 0.5, 0.0), ThreadLoad("VLLM::EngineCor", 0.12, 0.88)))
    (found,) = signs(starved, LIMITS)
    assert (found.name, found.value) == ("run_queue", 0.88)
    assert found.text == "thread VLLM::EngineCor waited for a core 88% of the time"


@pytest.mark.parametrize("core", [0.3, 0.99])
def test_where_both_poll_a_full_core_says_nothing_of_the_time_between_steps(core: float) -> None:
    """The worker polls for its next step, the core for the step's end: each uses one whatever it does."""
    polls = host(threads=(ThreadLoad("VLLM::Worker", 0.99, 0.0),))
    both = together(polls, host(threads=(ThreadLoad("VLLM::EngineCor", core, 0.0),)))
    assert both is not None
    gap, none = figures(span=6.0, gap=3.0), figures(span=9.0, gap=0.1)
    waits, inefficient = (
        classify(seen(of, host=both, clock="host"), LIMITS) for of in (gap, replace(none, mbu_busy=0.1))
    )
    assert (waits.cause, waits.signs) == ("host_between_steps", ())
    assert waits.confidence == classify(seen(gap, host=host(), clock="host"), LIMITS).confidence
    assert inefficient.bottleneck == "inefficient_kernels"
    assert [name for name in ("VLLM::EngineCor", "VLLM::Worker") if name in inefficient.reason] == [
        "VLLM::Worker"
    ]
    alone = classify(seen(gap, host=polls, clock="host"), LIMITS)
    assert alone.signs == ("thread_busy",)  # it schedules itself what it runs


@pytest.mark.parametrize(
    ("polls", "schedules", "named"),
    [
        ((0.91, 0.09), (0.44, 0.56), ("EngineCor", 0.56)),
        ((0.36, 0.64), (0.60, 0.39), ("EngineCor", 0.39)),
        ((0.36, 0.64), (0.60, 0.02), ("Worker", 0.64)),
    ],
)
def test_the_core_that_waits_for_a_processor_is_named_rather_than_a_worker(
    polls: tuple[float, float], schedules: tuple[float, float], named: tuple[str, float]
) -> None:
    """As seen on two cores: the scheduler computes, the worker polls, and something else runs too."""
    worker = host(threads=(ThreadLoad("VLLM::Worker", *polls),), throttled_ratio=0.0)
    core = host(threads=(ThreadLoad("VLLM::EngineCor", *schedules),), throttled_ratio=None)
    both = together(worker, core)
    assert both is not None
    (found,) = signs(both, LIMITS, "host_between_steps")
    assert (found.text, found.value) == (
        f"thread VLLM::{named[0]} waited for a core {named[1]:.0%} of the time",
        named[1],
    )
    assert both.cpu_ratio == worker.cpu_ratio + core.cpu_ratio
    assert both.throttled_ratio == 0.0
    assert together(worker, None) == worker
    assert together(None, core) is None


def test_a_core_that_waits_for_a_processor_explains_nothing_inside_a_step() -> None:
    """The worker launches its kernels by itself; the core waits for the step's end."""
    core = host(threads=(ThreadLoad("VLLM::EngineCor", 0.3, 0.4),), run_queue_ratio=0.4)
    both = together(host(threads=(ThreadLoad("VLLM::Worker", 0.8, 0.01),)), core)
    assert both is not None
    bubbles = seen(figures(), kernels=kernels(0.5), host=replace(both, cpu_pressure_ratio=0.9))
    found = classify(bubbles, LIMITS)
    assert found.cause == "launch_bubbles"
    assert (found.signs, "EngineCor" in found.reason) == ((), False)
    asked = classify(seen(figures(sample_gap=4.0), host=both), LIMITS)
    assert asked.cause == "sampling"
    assert "thread VLLM::EngineCor waited for a core 40% of the time" in asked.reason  # it asks for sampling
    waiting = together(host(threads=(ThreadLoad("VLLM::Worker", 0.5, 0.3),), run_queue_ratio=0.3), core)
    assert (
        "thread VLLM::Worker waited for a core 30%" in classify(replace(bubbles, host=waiting), LIMITS).reason
    )


def test_pressure_of_others_is_none_of_an_engine_whose_threads_do_not_wait() -> None:
    assert names(cpu_pressure_ratio=1.0) == []
    waiting = (ThreadLoad("python", 0.4, 0.3),)
    assert names(cpu_pressure_ratio=1.0, threads=waiting) == ["run_queue", "cpu_pressure"]


def test_switches_that_make_no_thread_wait_explain_nothing() -> None:
    """A scheduler that slept for 30 ms before each step: worker and core polled, and gave their cores up."""
    polls = host(threads=(ThreadLoad("VLLM::Worker", 0.97, 0.02),), involuntary_switches_per_second=500.0)
    core = host(threads=(ThreadLoad("VLLM::EngineCor", 0.15, 0.04),), involuntary_switches_per_second=66.0)
    asleep = classify(seen(figures(span=2.0, gap=8.0), host=together(polls, core)), LIMITS)
    assert (asleep.cause, asleep.signs) == ("host_between_steps", ())
    assert "566 times" not in asleep.reason
    waiting = (ThreadLoad("python", 0.4, 0.3),)
    assert names(involuntary_switches_per_second=500.0, threads=waiting) == [
        "run_queue",
        "involuntary_switches",
    ]


def test_many_nodes_are_told_of_a_wait_for_the_host_and_explain_nothing() -> None:
    """Most machines with two sockets have them: on a healthy server that is no news, and nowhere evidence."""
    spread, one = host(numa_nodes_allowed=2), host()
    waits = figures(span=6.0, gap=3.0)
    plain, told = (classify(seen(waits, host=of), LIMITS) for of in (one, spread))
    assert told.signs == ("numa_spread",)
    assert "host_numa_spread" in {item.quantity for item in told.evidence}
    assert (told.confidence, told.reason) == (plain.confidence, plain.reason)
    healthy = classify(seen(figures(mbu=0.8), host=spread), LIMITS)
    assert healthy.signs == ()
    assert "host_numa_spread" not in {item.quantity for item in healthy.evidence}
