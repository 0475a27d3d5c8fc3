"""Signs in the host's signals that explain why a device waits for its host."""

from __future__ import annotations

from dataclasses import dataclass

from llmprobe.compute.host import HostSignals
from llmprobe.compute.thresholds import Thresholds


@dataclass(frozen=True)
class Sign:
    """One signal beyond its threshold. ``text`` is for people."""

    name: str
    value: float
    threshold: float
    text: str


#: Every sign that `signs` may find.
SIGNS = (
    "throttled",
    "thread_busy",
    "run_queue",
    "involuntary_switches",
    "major_faults",
    "memory_pressure",
)


def signs(host: HostSignals | None, limits: Thresholds) -> tuple[Sign, ...]:
    """What stands out, gravest first; nothing where a signal is not known."""
    if host is None:
        return ()
    busiest = host.busiest
    thread = busiest.name if busiest else ""
    seen: tuple[tuple[str, float | None, float, str], ...] = (
        (
            "throttled",
            host.throttled_ratio,
            limits.throttled_ratio,
            "the container's CPU quota stopped it {value:.0%} of the time",
        ),
        (
            "run_queue",
            host.run_queue_ratio,
            limits.run_queue_ratio,
            f"thread {thread} waited for a core {{value:.0%}} of the time",
        ),
        (
            "involuntary_switches",
            host.involuntary_switches_per_second,
            limits.involuntary_switches_per_second,
            "others took its core {value:.0f} times a second",
        ),
        (
            "major_faults",
            host.major_faults_per_second,
            limits.major_faults_per_second,
            "{value:.0f} page faults a second read from disk",
        ),
        (
            "memory_pressure",
            host.memory_pressure_ratio,
            limits.memory_pressure_ratio,
            "tasks waited for memory {value:.0%} of the time",
        ),
        (
            "thread_busy",
            busiest.cpu_ratio if busiest else None,
            limits.thread_busy_ratio,
            f"thread {thread} used {{value:.0%}} of a core",
        ),
    )
    return tuple(
        Sign(name, value, limit, text.format(value=value))
        for name, value, limit, text in seen
        if value is not None and value >= limit
    )
