"""Signs of the host: what stands out, and what a healthy server shows too and is none."""

from __future__ import annotations

import pytest

from llmprobe.compute.classify import classify
from llmprobe.compute.host import ThreadLoad
from llmprobe.compute.signs import SIGNS, signs
from llmprobe.compute.thresholds import Thresholds

from .verdicts import figures, host, seen

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
        ({"involuntary_switches_per_second": 300.0}, "involuntary_switches", "300 times a second"),
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


def test_pressure_of_others_is_none_of_an_engine_whose_threads_do_not_wait() -> None:
    assert names(cpu_pressure_ratio=1.0) == []
    waiting = (ThreadLoad("python", 0.4, 0.3),)
    assert names(cpu_pressure_ratio=1.0, threads=waiting) == ["run_queue", "cpu_pressure"]


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
