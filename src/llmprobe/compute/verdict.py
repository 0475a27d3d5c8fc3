"""What a phase is bound by: the words, and the verdict as everybody gets to see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmprobe.compute.evidence import CounterEvidence, Evidence, KernelEvidence, RoutingEvidence
from llmprobe.compute.facts import Experts
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.host import HostSignals
from llmprobe.compute.stall import RunningStep

IDLE = "idle"
UNKNOWN = "unknown"
SYNC = "sync_bound"
BALANCED = "balanced"
MEMORY = "memory_bound"
COMPUTE = "compute_bound"
INEFFICIENT = "inefficient_kernels"
#: In the order in which they are looked for.
BOTTLENECKS = (IDLE, UNKNOWN, SYNC, BALANCED, MEMORY, COMPUTE, INEFFICIENT)

#: Why a phase is `UNKNOWN`.
UNKNOWN_CAUSES = (
    "no_front_end",
    "no_model",
    "no_peaks",
    "no_kernel_windows",
    "contradiction",
    "shared_gpu",
    "changing",
    "step_running",
)
#: What a `SYNC` phase waits for → the component of `llmprobe.compute.accounting.COMPONENTS`.
CAUSES = {
    "host_between_steps": "host_gap",
    "launch_bubbles": "launch_gap",
    "sampling": "sample_gap",
    "communication": "communication",
    "transfers": "transfer",
}


@dataclass(frozen=True)
class Observation:
    """All that is known about one phase of one rank over one window.

    Attributes:
        figures: None if no step of it ended in the window.
        clock: ``cuda`` (events on the device) or ``host`` (a CPU: work is done when a call returns).
        peaks: roofs that MBU and MFU are ratios of; None where unknown.
        attainable: what the device reached when it was measured.
        kernels: None while windows are off, or have seen too few steps of it.
        windows_on: whether kernel windows are opened now and then.
        counters: None where the GPU has none.
        host: of the engine's process.
        one_graph: each step was launched as one CUDA graph, see `llmprobe.compute.graphs`.
        no_model: why MBU and MFU are not known, if that is a matter of the model.
        no_peaks: why there are no peaks, if more of it is known than that.
        experts: of the model, on this rank; None if it has none.
        expert_parallel: whole experts are spread over ranks.
        routing: None unless figures have had the bytes of experts put right by a counter, see
            `llmprobe.compute.routing`.
        running: a step of it that has not ended; None where there is none.
        problems: contradictions that were found elsewhere; any makes the verdict `UNKNOWN`.
    """

    phase: str
    window_seconds: float
    figures: PhaseFigures | None
    clock: str
    peaks: Peaks | None = None
    attainable: Peaks | None = None
    kernels: KernelEvidence | None = None
    windows_on: bool = False
    counters: CounterEvidence | None = None
    host: HostSignals | None = None
    one_graph: bool = False
    no_model: str = ""
    no_peaks: str = ""
    experts: Experts | None = None
    expert_parallel: bool = False
    routing: RoutingEvidence | None = None
    running: RunningStep | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What one phase is bound by.

    ``cause`` is one of `CAUSES` where it waits, of `UNKNOWN_CAUSES` where nothing can be said, else None.
    ``reason`` is one line for people; of an `UNKNOWN` phase it says what is missing. ``steps_per_second`` and
    ``share_ratio`` (of the window that the phase fills, gaps included) say under what load. ``near_roof`` is
    None where the device was not measured, ``bound_by_operator`` where no floor is known.
    ``headroom_seconds`` is what a step takes beyond its floor, by attainable roofs where they are known.
    ``clock`` is that of the steps. ``wait_seconds``: what a step of a `SYNC` phase waits, by cause.
    """

    phase: str
    bottleneck: str
    cause: str | None
    confidence: float
    reason: str
    missing: tuple[str, ...] = ()
    healthy: bool = False
    near_roof: bool | None = None
    attained_ratio: float | None = None  # of the attainable rate of the nearer roof
    bound_by_operator: str | None = None
    headroom_seconds: float | None = None
    signs: tuple[str, ...] = ()  # host signals beyond their threshold, by `llmprobe.compute.signs`
    evidence: tuple[Evidence, ...] = ()
    steps_per_second: float = 0.0
    share_ratio: float = 0.0
    clock: str = ""
    held_seconds: float = 0.0  # for how long this has been the verdict
    wait_seconds: dict[str, float] = field(default_factory=dict)
