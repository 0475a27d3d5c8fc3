"""Hand-made windows of one phase on a GPU like an H100, with known truth."""

from __future__ import annotations

from typing import Any

from llmprobe.compute.evidence import CounterEvidence, KernelEvidence
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.host import HostSignals, ThreadLoad
from llmprobe.compute.verdict import Observation, Verdict

PEAKS = Peaks(3352e9, 989.4e12, "bfloat16", "nominal", "made for these tests")
ATTAINABLE = Peaks(3020e9, 790e12, "bfloat16", "attainable", "made for these tests")


def figures(
    *,
    steps: int = 1000,
    span: float = 9.0,
    gap: float = 0.1,
    sample_gap: float = 0.0,
    mbu: float | None = 0.7,
    mfu: float | None = 0.05,
    **changes: Any,
) -> PhaseFigures:
    """``mbu`` and ``mfu`` are of busy time; the larger one makes the floor."""
    seconds, busy = span + gap, span - sample_gap
    memory, compute = (mbu or 0) * busy, (mfu or 0) * busy
    by_memory = memory >= compute
    floor = {"floor_memory": memory if by_memory else 0.0, "floor_compute": 0.0 if by_memory else compute}
    waits = {"host_gap": gap, "sample_gap": sample_gap}
    known = mbu is not None and mfu is not None
    values: dict[str, Any] = {
        "steps": steps,
        "seconds": seconds,
        "span_seconds": span,
        "gap_seconds": gap,
        "prompt_tokens": 0,
        "decode_tokens": steps,
        "steps_per_second": steps / 10,
        "step_seconds_p50": span / max(steps, 1),
        "step_seconds_p99": span / max(steps, 1),
        "floor_seconds": sum(floor.values()) / max(steps, 1) if known else None,
        "mbu_busy": mbu,
        "mfu_busy": mfu,
        "mbu_step": mbu * busy / seconds if mbu is not None else None,
        "mfu_step": mfu * busy / seconds if mfu is not None else None,
        "sync_gap_ratio": (gap + sample_gap) / seconds,
        "sync_gap_is_lower_bound": True,
        "intensity": (mfu / mbu * PEAKS.ridge_flops_per_byte) if mbu and mfu else None,
        "components": {**floor, **waits, "unattributed": busy - sum(floor.values())},
        "operator_floors": {"linear": (floor["floor_memory"], floor["floor_compute"])} if known else {},
    }
    return PhaseFigures(**{**values, **changes})


def seen(found: PhaseFigures | None = None, **changes: Any) -> Observation:
    values: dict[str, Any] = {
        "phase": "decode",
        "window_seconds": 10.0,
        "figures": figures() if found is None else found,
        "clock": "cuda",
        "peaks": PEAKS,
    }
    return Observation(**{**values, **changes})


def kernels(
    launch: float = 0.01, communication: float = 0.0, transfer: float = 0.0, **changes: Any
) -> KernelEvidence:
    values: dict[str, Any] = {"steps": 20, "age_seconds": 5.0, **changes}
    return KernelEvidence(
        launch_gap_ratio=launch, communication_ratio=communication, transfer_ratio=transfer, **values
    )


def counters(dram: float, tensor: float, **changes: Any) -> CounterEvidence:
    values: dict[str, Any] = {"sm_active_ratio": None, "age_seconds": 1.0, "shared": False, **changes}
    return CounterEvidence(dram, tensor, **values)


def host(**changes: Any) -> HostSignals:
    values: dict[str, Any] = {
        "window_seconds": 10.0,
        "cpus_allowed": 16,
        "threads": (ThreadLoad("python", 0.4, 0.0),),
        "cpu_ratio": 0.5,
        "run_queue_ratio": 0.0,
        "voluntary_switches_per_second": 100.0,
        "involuntary_switches_per_second": 1.0,
        "minor_faults_per_second": 10.0,
        "major_faults_per_second": 0.0,
        "throttled_ratio": 0.0,
        "cpu_pressure_ratio": 0.0,
        "memory_pressure_ratio": 0.0,
        "numa_nodes_allowed": 1,
    }
    return HostSignals(**{**values, **changes})


def verdict(bottleneck: str, cause: str | None = None, **changes: Any) -> Verdict:
    values: dict[str, Any] = {"phase": "decode", "confidence": 0.8, "reason": bottleneck, **changes}
    return Verdict(bottleneck=bottleneck, cause=cause, **values)
