"""Hand-made views with known figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llmprobe.collect.host import MOST_LABELS, HostTotals
from llmprobe.collect.nvml import THROTTLE_REASONS
from llmprobe.collect.views import EngineView, GpuView, HistogramView, RankView, ServerView
from llmprobe.collect.windows import KernelTotals
from llmprobe.compute.accounting import COMPONENTS
from llmprobe.compute.advice import Advice
from llmprobe.compute.evidence import Evidence
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.kernel_classes import OTHER, PATTERNS
from llmprobe.compute.pressure import KINDS, Pressure
from llmprobe.compute.verdict import Verdict
from llmprobe.export.catalogue import LATENCIES
from llmprobe.record import layout

PHASES = ("prefill", "decode", "mixed")


def histogram(*seconds: float) -> HistogramView:
    counts = np.zeros(layout.BUCKETS, dtype=np.uint64)
    for value in seconds:
        counts[layout.bucket_of(round(value * 1e9))] += 1
    return HistogramView(counts, sum(seconds))


def figures(**changes: Any) -> PhaseFigures:
    values: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(PhaseFigures)), 1.0)
    values.update(
        steps=100, mbu_step=0.4, mbu_busy=0.5, mfu_step=0.1, mfu_busy=0.2, sync_gap_ratio=0.25, intensity=8.0
    )
    values.update(components={"host_gap": 1.0}, sync_gap_is_lower_bound=True, floor_seconds=0.004)
    return PhaseFigures(**{**values, **changes})


def gpu(**changes: Any) -> GpuView:
    view = GpuView(
        uuid="GPU-1",
        name="NVIDIA H100 80GB HBM3",
        driver_version="580.159",
        mig=False,
        bandwidth_bytes_per_second=3352e9,
        dram_active_ratio=0.6,
        tensor_active_ratio=0.1,
        sm_active_ratio=0.7,
        sm_occupancy_ratio=0.3,
        graphics_active_ratio=0.99,
        active_seconds={"dram_active": 6.0},
        counted_seconds=10.0,
        power_watts=400.0,
        power_limit_watts=700.0,
        sm_clock_hertz=1980e6,
        sm_clock_max_hertz=1980e6,
        memory_clock_hertz=2619e6,
        memory_clock_max_hertz=2619e6,
        memory_used_bytes=70_000_000_000,
        memory_capacity_bytes=85_520_809_984,
        temperature_celsius=45.0,
        throttle_reasons=dict.fromkeys(THROTTLE_REASONS, False),
        throttled_ratio=0.0,
        power_capped_ratio=0.0,
        shared=False,
    )
    return dataclasses.replace(view, **changes)


def rank(**changes: Any) -> RankView:
    view = RankView(
        engine=0,
        rank=0,
        facts={"role": "worker"},
        clock="cuda",
        runner="v1",
        armed=True,
        inert=False,
        device_time={
            **{phase: dict.fromkeys(COMPONENTS, 0.5) for phase in PHASES},
            "none": {"no_work": 3.0, "blocked": 0.0},
        },
        bytes={phase: {"weights": 1e9, "kv_read": 2e8, "kv_write": 1e6} for phase in PHASES},
        flops=dict.fromkeys(PHASES, 1e12),
        work_seconds=dict.fromkeys(PHASES, (4.5, 3.0)),
        steps=dict.fromkeys(PHASES, 100),
        figures={phase: figures() for phase in PHASES},
        step_duration={phase: histogram(0.004, 0.005, 0.02) for phase in PHASES},
        peaks=Peaks(3352e9, 989.4e12, "bfloat16", "nominal", "a data sheet"),
        weights_bytes=2_000_000_000,
        kv_capacity_bytes=8_000_000_000,
        step_running_seconds=None,
        own_seconds=0.125,
        own_thread_seconds=0.0625,
        errors=1,
        dropped=2,
        lost=3,
        gpu=gpu(),
        kernel_totals=KernelTotals(
            {phase: dict.fromkeys((*(label for label, _ in PATTERNS), OTHER), 0.25) for phase in PHASES},
            8.0,
            7.5,
            10,
        ),
        host_totals=HostTotals(
            {"main": 9.0, **{f"name{number}": 1.5 for number in range(MOST_LABELS - 2)}, "other": 0.5},
            {"minor": 100, "major": 0},
            {"voluntary": 50, "involuntary": 5},
            0.25,
        ),
    )
    return dataclasses.replace(view, **changes)


def engine(**changes: Any) -> EngineView:
    view = EngineView(
        engine=0,
        requests_running=4,
        requests_waiting=2,
        kv_usage=0.25,
        kv_used_bytes=2_000_000_000,
        prompt_tokens=1000,
        generated_tokens=200,
        cached_tokens=64,
        preemptions=0,
        requests=20,
        requests_aborted=1,
        latency={name: histogram(0.01, 0.02, 0.5) for name in LATENCIES},
        recent_latency={"time_to_first_token": {"p50": 0.02, "p99": 0.5, "count": 3}},
        own_seconds=0.25,
        own_thread_seconds=0.5,
        errors=0,
    )
    return dataclasses.replace(view, **changes)


def verdict(**changes: Any) -> Verdict:
    found = Verdict(
        phase="decode",
        bottleneck="memory_bound",
        cause=None,
        confidence=0.72,
        reason="MBU 0.50 of busy time",
        bound_by_operator="linear",
        headroom_seconds=0.002,
        evidence=(Evidence("mbu_busy", 0.5, 0.5, "modelled"),),
        steps_per_second=100.0,
        share_ratio=0.6,
        clock="cuda",
        held_seconds=12.0,
    )
    return dataclasses.replace(found, **changes)


def pressure(**changes: Any) -> Pressure:
    found = Pressure("queue", 0, True, False, 0.4, 0.2, "queueing is 40% of TTFT", "queue_share_ratio")
    return dataclasses.replace(found, **changes)


ADVICE = Advice(
    finding="memory_bound.batch",
    reason="Weights are read once a step for however many requests.",
    flag="max_num_seqs",
    current=16,
    proposed=32,
    change="--max-num-seqs 32 (now: 16)",
    gain="at most 1.60 times the tokens per second, for twice the batch",
    gain_seconds=None,
    gain_throughput=1.6,
    risk="TPOT of single requests rises.",
    look="llmprobe status",
)


def server(name: str = "vllm-8000", **changes: Any) -> ServerView:
    view = ServerView(
        server=name,
        model_name="a/model",
        group=f"group-of-{name}",
        framework="vllm",
        framework_version="0.32.0",
        started=1_800_000_000.0,
        armed=True,
        inert=False,
        flags={"max_num_seqs": 16},
        engines=[engine()],
        ranks=[rank()],
        headline="Decode memory-bound, confidence 0.72: MBU 0.50 of busy time.",
        verdicts={phase: verdict(phase=phase) for phase in PHASES},
        pressure={kind: pressure(kind=kind) for kind in KINDS},
        advice={"decode": (ADVICE,)},
        bottleneck_seconds={
            phase: {"memory_bound": {"": 60.0}, "unknown": {"changing": 3.0}} for phase in PHASES
        },
        host_cpu_seconds={"frontend": 12.5, "engine_core": 20.0},
        missing={"launch_gap": "gaps inside a step need kernel windows; they are off"},
        notes=[],
    )
    return dataclasses.replace(view, **changes)
