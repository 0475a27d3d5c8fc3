"""Signs in the host's signals that explain why a device waits for its host."""

from __future__ import annotations

from dataclasses import dataclass

from llmprobe.compute.host import HostSignals
from llmprobe.compute.thresholds import Thresholds


@dataclass(frozen=True)
class Sign:
    """One signal beyond its threshold. ``text`` is for people.

    ``explains``: whether it is a reason for a wait. What is not is a circumstance, of healthy servers too,
    that makes waits longer where there are any.
    """

    name: str
    value: float
    threshold: float
    text: str
    explains: bool = True


#: Every sign that `signs` may find.
SIGNS = (
    "throttled",
    "thread_busy",
    "run_queue",
    "involuntary_switches",
    "major_faults",
    "memory_pressure",
    "minor_faults",
    "cpu_pressure",
    "numa_spread",
)
_CIRCUMSTANCES = ("numa_spread",)


def signs(host: HostSignals | None, limits: Thresholds, cause: str | None = None) -> tuple[Sign, ...]:
    """What stands out, gravest first; nothing where a signal is not known.

    Args:
        cause: what the device waits for, if it does: between steps the engine's core has to be quick, inside
            a step its worker, and before sampling, which the core asks for, both.
    """
    if host is None:
        return ()
    between_steps = cause == "host_between_steps"
    inside = host.core_apart and cause not in ("host_between_steps", "sampling")
    # Apart, the worker polls for its next step and the core for the step's end (vLLM's `MessageQueue` spins
    # between frequent messages): that one uses a whole core then says nothing of the time between steps.
    busiest = None if between_steps and host.core_apart else host.busiest
    thread = busiest.name if busiest else ""
    starved = host.starved_of_worker if inside else host.starved
    waits = None if inside else host.run_queue_ratio
    if starved is not None and starved.run_queue_ratio is not None:
        waits = max(starved.run_queue_ratio, waits or 0.0)
    scheduler = host.starved_of_core if between_steps else None
    if scheduler is not None and (scheduler.run_queue_ratio or 0.0) >= limits.run_queue_ratio:
        # Its wait is the device's; a worker that polls may well wait longer.
        starved, waits = scheduler, scheduler.run_queue_ratio
    # PSI does not say whose tasks wait; where the engine's own are known not to, they are others'. And a
    # thread whose core is taken waits until it has one again: where none waits long, all switches together
    # cost little. Whoever polls gives its core up by itself (sched_yield), which counts as taken too.
    waiting = waits is None or waits >= limits.run_queue_ratio
    pressed = host.cpu_pressure_ratio if waiting else None
    taken = host.involuntary_switches_per_second if waiting else None
    seen: tuple[tuple[str, float | None, float, str], ...] = (
        (
            "throttled",
            host.throttled_ratio,
            limits.throttled_ratio,
            "the container's CPU quota stopped it {value:.0%} of the time",
        ),
        (
            "run_queue",
            waits,
            limits.run_queue_ratio,
            f"thread {starved.name if starved else ''} waited for a core {{value:.0%}} of the time",
        ),
        (
            "involuntary_switches",
            taken,
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
            "minor_faults",
            host.minor_faults_per_second,
            limits.minor_faults_per_second,
            "{value:.0f} page faults a second mapped memory anew",
        ),
        (
            "cpu_pressure",
            pressed,
            limits.cpu_pressure_ratio,
            "tasks waited for a core {value:.0%} of the time",
        ),
        (
            "thread_busy",
            busiest.cpu_ratio if busiest else None,
            limits.thread_busy_ratio,
            f"thread {thread} used {{value:.0%}} of a core",
        ),
        (
            "numa_spread",
            host.numa_nodes_allowed,
            limits.numa_nodes,
            "its threads may run on {value:.0f} NUMA nodes",
        ),
    )
    return tuple(
        Sign(name, value, limit, text.format(value=value), explains=name not in _CIRCUMSTANCES)
        for name, value, limit, text in seen
        if value is not None and value >= limit
    )
