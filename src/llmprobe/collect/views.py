"""What is known about each server right now: the one thing that exporters, pages and commands read.

Plain data. Cumulative values never run backwards within a server's life. What was not measured is
absent (None, or a missing key), never 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.collect.host import HostTotals
from llmprobe.collect.windows import KernelTotals
from llmprobe.compute.advice import Advice
from llmprobe.compute.attribution import Attribution
from llmprobe.compute.evidence import CounterEvidence, KernelEvidence
from llmprobe.compute.facts import Experts
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.host import HostSignals
from llmprobe.compute.kernel_windows import TopKernel
from llmprobe.compute.pressure import Pressure
from llmprobe.compute.stall import RunningStep, Stall
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import Verdict


@dataclass
class HistogramView:
    """A cumulative latency histogram.

    ``counts`` belong to the fine buckets of `llmprobe.record.layout.bucket_bounds_seconds` (upper bounds
    1 % apart); exporters merge them into the buckets they show. ``sum`` is in seconds.
    """

    counts: np.ndarray
    sum: float

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class GpuView:
    """The GPU that a rank uses, as NVML sees it: the whole GPU, whoever uses it.

    Ratios are means over the last 10 s. None where this GPU or driver does not tell.
    """

    uuid: str
    name: str
    driver_version: str
    mig: bool  # the rank uses a slice of it
    bandwidth_bytes_per_second: float | None  # nominal: bus width x highest memory clock x 2
    dram_active_ratio: float | None
    tensor_active_ratio: float | None
    sm_active_ratio: float | None
    sm_occupancy_ratio: float | None
    graphics_active_ratio: float | None
    #: Cumulative since the agent first saw it: counter → ratio x seconds; and the seconds that were counted.
    active_seconds: dict[str, float]
    counted_seconds: float
    power_watts: float | None
    power_limit_watts: float | None
    sm_clock_hertz: float | None
    sm_clock_max_hertz: float | None
    memory_clock_hertz: float | None
    memory_clock_max_hertz: float | None
    memory_used_bytes: int | None
    memory_capacity_bytes: int | None
    temperature_celsius: float | None
    throttle_reasons: dict[str, bool] | None  # `llmprobe.collect.nvml.THROTTLE_REASONS`, now
    #: Share of the last 10 s in which heat, the power supply or the hardware held the SM clock down; and in
    #: which the power limit did.
    throttled_ratio: float | None
    power_capped_ratio: float | None
    shared: bool | None  # another process uses it; None if that cannot be told
    notes: tuple[str, ...] = ()
    age_seconds: float = 0.0


@dataclass
class RankView:
    """One worker process: one rank of one engine of a server."""

    engine: int
    rank: int
    facts: dict[str, Any]
    clock: str  # "cuda": measured on the device; "host": a CPU device's own clock
    runner: str
    armed: bool
    inert: bool
    #: Cumulative seconds, phase → component (`llmprobe.compute.accounting.COMPONENTS`). Time in no phase
    #: (nothing to do) stands under the phase "none".
    device_time: dict[str, dict[str, float]]
    #: Cumulative model of the work: phase → kind ("weights", "kv_read", "kv_write") → bytes; phase → FLOPs.
    bytes: dict[str, dict[str, float]]
    flops: dict[str, float]
    #: Cumulative, from the engine process itself: phase → steps.
    steps: dict[str, int]
    #: Over the last 30 s; a phase without steps in that time is missing.
    figures: dict[str, PhaseFigures]
    step_duration: dict[str, HistogramView]
    peaks: Peaks | None
    weights_bytes: int | None
    kv_capacity_bytes: int | None
    #: Seconds for which the running step has been running, None between steps.
    step_running_seconds: float | None
    #: Cumulative: llmprobe's own host seconds inside steps, processor seconds of its own thread beside them,
    #: its errors, its lost records.
    own_seconds: float
    own_thread_seconds: float
    errors: int
    dropped: int
    lost: int
    #: Last steps, newest last, as JSON-ready dicts (see Collector.recent_steps).
    recent: list[dict[str, Any]] = field(default_factory=list)
    #: What the device was measured to attain; None where it was not.
    attainable: Peaks | None = None
    #: Why there is no model of the work, and why there are no peaks; empty where there are.
    no_model: str = ""
    no_peaks: str = ""
    #: Of its model; None if that has none, or is not known.
    experts: Experts | None = None
    #: Phases whose steps of the last 30 s were launched as one CUDA graph each (`llmprobe.compute.graphs`).
    one_graph: frozenset[str] = frozenset()
    #: Cumulative, as `device_time`: phase → operator → seconds of floor by memory, by compute.
    operator_floors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    #: Cumulative, of the steps that ``bytes`` and ``flops`` are of: phase → seconds with their gaps,
    #: and busy ones. ``device_time`` has more: that of steps that were lost, of an encoder.
    work_seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: Over the last 10 s, by phase; mixed steps are split between prefill and decode.
    attribution: dict[str, Attribution] = field(default_factory=dict)
    #: What kernel windows saw, by phase; empty while there are none. And the kernels that took most there.
    kernels: dict[str, KernelEvidence] = field(default_factory=dict)
    top_kernels: dict[str, tuple[TopKernel, ...]] = field(default_factory=dict)
    #: Cumulative over all windows; None before the first.
    kernel_totals: KernelTotals | None = None
    #: Hardware counters over the last 10 s; None where they are not read.
    counters: CounterEvidence | None = None
    counters_lately: CounterEvidence | None = None  # over the last 3 s
    #: None where it has none, or NVML does not answer.
    gpu: GpuView | None = None
    #: Of the worker's process; None while nobody watches it.
    host: HostSignals | None = None
    #: Cumulative, likewise.
    host_totals: HostTotals | None = None
    #: The step that it is in.
    running: RunningStep | None = None
    #: What it hangs in; None while it gets on, or has nothing to do.
    stall: Stall | None = None
    #: The file that its process writes.
    journal: Path | None = None

    @property
    def expert_parallel(self) -> bool:
        """Whether its engine spreads whole experts over ranks."""
        return bool((self.facts.get("flags") or {}).get("enable_expert_parallel"))

    @property
    def windows_on(self) -> bool:
        """Whether its process opens kernel windows now and then."""
        return bool((self.facts.get("kernel_windows") or {}).get("on"))


@dataclass
class EngineView:
    """One engine (data-parallel index) of a server, as its front ends see it."""

    engine: int
    requests_running: int | None
    requests_waiting: int | None
    kv_usage: float | None  # ratio of capacity
    kv_used_bytes: int | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    requests: int
    requests_aborted: int
    #: name (as in `llmprobe.record.layout.HISTOGRAMS`, not those of steps) → cumulative histogram
    latency: dict[str, HistogramView]
    #: over the last 30 s: name → {"p50": seconds, "p99": seconds, "mean": seconds, "count": n}
    recent_latency: dict[str, dict[str, float]]
    own_seconds: float
    own_thread_seconds: float
    errors: int
    #: over the same time: `llmprobe.collect.recent.COUNTS`, and "seconds", how long that is
    recent_counts: dict[str, float] = field(default_factory=dict)
    #: How many requests told at their first token how long they were queued, and the sum: cumulative. And the
    #: mean over the last 30 s, None if none did.
    first_tokens_queued: int = 0
    first_token_queue_seconds: float = 0.0
    recent_queue_seconds: float | None = None
    #: For how long requests without a token have been waiting while none had its first; 0 while none waits.
    starved_seconds: float | None = None
    #: How long a request waits for its first token by Little's law, and the highest use of the KV cache while
    #: requests waited: `llmprobe.collect.recent.Recent`.
    backlog_seconds: float | None = None
    kv_peak: float | None = None
    #: Of the front end's process that has least time left; None where nobody watches one of its own.
    front_end: HostSignals | None = None


@dataclass
class ServerView:
    """One server: one ``vllm serve``, one program. Its processes share a group id; others may have it too."""

    server: str
    model_name: str
    group: str
    framework: str
    framework_version: str
    started: float  # Unix seconds
    armed: bool
    inert: bool
    flags: dict[str, Any]
    engines: list[EngineView]
    ranks: list[RankView]
    #: figure → why it is not available, e.g. {"mbu_ratio": "no peak bandwidth: run `llmprobe calibrate`"}
    missing: dict[str, str]
    notes: list[str]
    #: Those that verdicts and pressure were judged by.
    thresholds: Thresholds = field(default_factory=Thresholds)
    #: Cumulative CPU time of its processes that are no rank's, by kind (`llmprobe.collect.host_cpu`).
    host_cpu_seconds: dict[str, float] = field(default_factory=dict)
    #: The label that the server gave itself; ``server`` has a number behind it if another had that one.
    own_label: str = ""
    #: The files that its living processes write.
    journals: tuple[Path, ...] = ()
    #: The one line to read first.
    headline: str = ""
    #: What each phase that was ever seen is bound by, over the last 10 s. Empty while the probe is off.
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    #: By kind (`llmprobe.compute.pressure.KINDS`), of the engine under most of it; unknown kinds are missing.
    pressure: dict[str, Pressure] = field(default_factory=dict)
    #: By phase, and by kind of pressure where that is active; likeliest first.
    advice: dict[str, tuple[Advice, ...]] = field(default_factory=dict)
    #: Cumulative seconds for which each verdict stood: phase → class → cause ("" if it has none) → seconds.
    bottleneck_seconds: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
