"""Every metric family: its name, type, unit, labels, help and where its values come from.

Exposition is made from this table; docs/metrics.md is printed from it; dashboards and rules are checked
against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmprobe.export import buckets

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["measured", "sampled", "counter", "modelled", "reported"]

SOURCES: dict[Source, str] = {
    "measured": "timed or counted where it happens",
    "sampled": "measured now and then, and applied until the next time",
    "counter": "read from a hardware counter",
    "modelled": "computed from a model of the work a step does",
    "reported": "stated by the engine, its configuration or the hardware's data",
}

SERVER = ("server", "model_name")
ENGINE = (*SERVER, "engine")
RANK = (*ENGINE, "rank")


@dataclass(frozen=True)
class Family:
    """One metric family. ``name`` is complete: prefix, unit and ``_total`` included."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    sources: tuple[Source, ...]
    help: str
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Section:
    """Families that belong together, under one heading of docs/metrics.md."""

    title: str
    text: str
    families: tuple[Family, ...]


SECTIONS = (
    Section(
        "Device time",
        "One series a rank (a worker process). Over any period the components of a rank add up to the wall "
        "time, so every share is a quotient of two `rate()`s.",
        (
            Family(
                "llmprobe_device_time_seconds_total",
                "counter",
                "seconds",
                (*RANK, "phase", "component"),
                ("measured", "modelled"),
                "Wall time of the rank, by the phase of the step and what the time went into. Steps and the "
                "gaps around them are measured; how a step splits into its floor (floor_memory, "
                "floor_compute) and the rest is modelled. Phase none: no step ran.",
            ),
            Family(
                "llmprobe_step_duration_seconds",
                "histogram",
                "seconds",
                (*RANK, "phase"),
                ("measured",),
                "Device time of a step, from the start of its forward pass to the end of sampling.",
                buckets.TOKEN_SECONDS,
            ),
            Family(
                "llmprobe_sync_gap_ratio",
                "gauge",
                "ratio",
                (*RANK, "phase"),
                ("measured",),
                "Share of the time with work pending in which the device waited, over the last 30 s. A lower "
                "bound where gaps inside a step are not known.",
            ),
        ),
    ),
    Section(
        "The verdict",
        "What each phase of a server is bound by over the last 10 s, and what presses on its requests; the "
        "classes, causes and thresholds stand in [verdicts.md](verdicts.md). Absent while the probe is off.",
        (
            Family(
                "llmprobe_bottleneck",
                "gauge",
                "bool",
                (*SERVER, "phase", "bottleneck"),
                ("measured", "sampled", "counter", "modelled"),
                "1 for the class that the phase is in, 0 for the others: idle, unknown, sync_bound, "
                "balanced, memory_bound, compute_bound, inefficient_kernels.",
            ),
            Family(
                "llmprobe_bottleneck_confidence_ratio",
                "gauge",
                "ratio",
                (*SERVER, "phase"),
                ("modelled",),
                "How sure the class is, from how much independent evidence agrees. 0 for unknown.",
            ),
            Family(
                "llmprobe_bottleneck_seconds_total",
                "counter",
                "seconds",
                (*SERVER, "phase", "bottleneck", "cause"),
                ("measured",),
                "Wall time for which this was the verdict. `cause` says what a sync_bound phase waits for, "
                "or why an unknown one is not known; empty for the others.",
            ),
            Family(
                "llmprobe_pressure",
                "gauge",
                "bool",
                (*SERVER, "kind"),
                ("reported", "measured"),
                "1 where an engine of the server is beyond the threshold: kv_cache, queue, preemption, "
                "token_budget, sequence_limit. Absent where it is not known.",
            ),
        ),
    ),
    Section(
        "Kernels",
        "Of the steps that kernel windows saw (`LLMPROBE_KERNEL_WINDOWS`), a sample of all steps. Absent "
        "before the first window.",
        (
            Family(
                "llmprobe_kernel_seconds_total",
                "counter",
                "seconds",
                (*RANK, "phase", "class"),
                ("sampled",),
                "Device time of kernels, by the phase of the step they ran in and the kind of work they do "
                "(told by their names). Kernels that overlap each count in full.",
            ),
            Family(
                "llmprobe_kernel_window_span_seconds_total",
                "counter",
                "seconds",
                RANK,
                ("sampled",),
                "Device time of the steps that windows saw, from the start of the forward pass to the end of "
                "sampling.",
            ),
            Family(
                "llmprobe_kernel_window_busy_seconds_total",
                "counter",
                "seconds",
                RANK,
                ("sampled",),
                "Of it, time in which any kernel, copy or set ran.",
            ),
        ),
    ),
    Section(
        "Distance from the hardware's limits",
        "Over the last 30 s, one series a rank and phase. Absent while the phase had no steps and where no "
        "peak is known. Basis `step` counts the gaps before a step, basis `busy` does not.",
        (
            Family(
                "llmprobe_mbu_ratio",
                "gauge",
                "ratio",
                (*RANK, "phase", "basis"),
                ("modelled",),
                "Memory bandwidth utilisation: least bytes the steps must move ÷ time ÷ peak bandwidth.",
            ),
            Family(
                "llmprobe_mfu_ratio",
                "gauge",
                "ratio",
                (*RANK, "phase", "basis"),
                ("modelled",),
                "Model FLOPs utilisation: FLOPs the steps must do ÷ time ÷ peak FLOP rate.",
            ),
            Family(
                "llmprobe_arithmetic_intensity_flops_per_byte",
                "gauge",
                "FLOP/byte",
                (*RANK, "phase"),
                ("modelled",),
                "FLOPs per byte of traffic. Below the ridge memory is the nearer limit, above it compute.",
            ),
            Family(
                "llmprobe_estimated_bytes_total",
                "counter",
                "bytes",
                (*RANK, "phase", "kind"),
                ("modelled",),
                "Least bytes the steps so far had to move through device memory, by kind.",
            ),
            Family(
                "llmprobe_estimated_flops_total",
                "counter",
                "FLOP",
                (*RANK, "phase"),
                ("modelled",),
                "FLOPs the steps so far had to do.",
            ),
            Family(
                "llmprobe_peak_bandwidth_bytes_per_second",
                "gauge",
                "bytes/second",
                RANK,
                ("reported",),
                "Peak memory bandwidth that MBU is measured against; /api/status says where it comes from.",
            ),
            Family(
                "llmprobe_peak_flops_per_second",
                "gauge",
                "FLOP/second",
                (*RANK, "dtype"),
                ("reported",),
                "Peak dense FLOP rate that MFU is measured against, for the dtype of the matrix products.",
            ),
            Family(
                "llmprobe_ridge_flops_per_byte",
                "gauge",
                "FLOP/byte",
                RANK,
                ("reported",),
                "Intensity at which memory and compute limit alike: peak FLOP rate ÷ peak bandwidth.",
            ),
        ),
    ),
    Section(
        "GPU",
        "Of the GPU that a rank uses, as NVML sees it: the whole GPU, whoever uses it. Read once a second by "
        "the agent; ratios are means over the last 10 s. Absent on a CPU, and where this GPU or its driver "
        "does not tell: counters need Hopper or newer, and a GPU that is not split by MIG.",
        (
            Family(
                "llmprobe_gpu_info",
                "gauge",
                "info",
                (*RANK, "gpu_uuid", "gpu_name", "driver_version"),
                ("reported",),
                "Always 1. The GPU that the rank uses.",
            ),
            Family(
                "llmprobe_gpu_dram_active_ratio",
                "gauge",
                "ratio",
                RANK,
                ("counter",),
                "Share of the memory's bandwidth that was in use, reads and writes.",
            ),
            Family(
                "llmprobe_gpu_sm_active_ratio",
                "gauge",
                "ratio",
                RANK,
                ("counter",),
                "Share of time, over all SMs, in which an SM had work. Narrow kernels leave SMs idle, so it "
                "may be far below the share of time in which the GPU was busy.",
            ),
            Family(
                "llmprobe_gpu_tensor_active_ratio",
                "gauge",
                "ratio",
                RANK,
                ("counter",),
                "Share of time, over all SMs, in which tensor cores worked.",
            ),
            Family(
                "llmprobe_gpu_power_watts", "gauge", "watts", RANK, ("measured",), "Power that the GPU draws."
            ),
            Family(
                "llmprobe_gpu_sm_clock_hertz", "gauge", "hertz", RANK, ("measured",), "Clock of the SMs now."
            ),
            Family(
                "llmprobe_gpu_memory_clock_hertz",
                "gauge",
                "hertz",
                RANK,
                ("measured",),
                "Clock of the memory now. The nominal bandwidth is that of its highest one.",
            ),
            Family(
                "llmprobe_gpu_throttle_reason",
                "gauge",
                "bool",
                (*RANK, "reason"),
                ("measured",),
                "1 while the clocks are held down for this reason: software_power_cap (the power limit; "
                "usual under heavy matrix products), hardware_thermal, software_thermal, hardware_slowdown "
                "or power_brake. /api/status has the rarer ones too.",
            ),
            Family(
                "llmprobe_gpu_temperature_celsius",
                "gauge",
                "celsius",
                RANK,
                ("measured",),
                "Temperature of the GPU.",
            ),
            Family(
                "llmprobe_gpu_memory_used_bytes",
                "gauge",
                "bytes",
                RANK,
                ("measured",),
                "Device memory in use by all processes.",
            ),
            Family(
                "llmprobe_gpu_memory_capacity_bytes",
                "gauge",
                "bytes",
                RANK,
                ("reported",),
                "Device memory that there is.",
            ),
        ),
    ),
    Section(
        "Host of the engine",
        "Of each worker's process, read from /proc and cgroups once a second, at no cost to the engine. "
        "Absent where this kernel or container does not tell, or shows another namespace.",
        (
            Family(
                "llmprobe_step_stalled",
                "gauge",
                "bool",
                RANK,
                ("measured",),
                "1 while the rank has been in one step, or without one, for longer than its own recent steps "
                "explain, with work pending; /api/status says in which.",
            ),
            Family(
                "llmprobe_engine_cpu_seconds_total",
                "counter",
                "seconds",
                (*RANK, "thread"),
                ("measured",),
                "CPU time by thread: main, at most two names, and other for all the rest.",
            ),
            Family(
                "llmprobe_engine_run_queue_seconds_total",
                "counter",
                "seconds",
                RANK,
                ("measured",),
                "Time in which a thread could have run but waited for a core, all threads together.",
            ),
            Family(
                "llmprobe_engine_context_switches_total",
                "counter",
                "switches",
                (*RANK, "kind"),
                ("measured",),
                "Context switches: voluntary (it waited for something) or involuntary (its core was taken).",
            ),
            Family(
                "llmprobe_engine_page_faults_total",
                "counter",
                "faults",
                (*RANK, "kind"),
                ("measured",),
                "Page faults: minor (mapped from memory) or major (read from disk).",
            ),
        ),
    ),
    Section(
        "Memory",
        "Bytes on one device.",
        (
            Family(
                "llmprobe_weights_bytes",
                "gauge",
                "bytes",
                RANK,
                ("reported",),
                "Size of the model's weights on this rank, as stored.",
            ),
            Family(
                "llmprobe_kv_cache_capacity_bytes",
                "gauge",
                "bytes",
                RANK,
                ("reported",),
                "Size of the KV cache on this rank.",
            ),
            Family(
                "llmprobe_kv_cache_used_bytes",
                "gauge",
                "bytes",
                RANK,
                ("reported",),
                "KV cache in use on this rank.",
            ),
        ),
    ),
    Section(
        "Requests",
        "One series an engine (its data-parallel index), counted where answers leave for the client.",
        (
            Family(
                "llmprobe_requests_running",
                "gauge",
                "requests",
                ENGINE,
                ("reported",),
                "Requests that the engine works on now.",
            ),
            Family(
                "llmprobe_requests_waiting",
                "gauge",
                "requests",
                ENGINE,
                ("reported",),
                "Requests that wait to be scheduled.",
            ),
            Family(
                "llmprobe_tokens_total",
                "counter",
                "tokens",
                (*ENGINE, "kind"),
                ("measured",),
                "Tokens, by kind: prompt (taken in) and generated.",
            ),
            Family(
                "llmprobe_preemptions_total",
                "counter",
                "preemptions",
                ENGINE,
                ("measured",),
                "Times a running request lost its KV cache to others and had to start over.",
            ),
            Family(
                "llmprobe_time_to_first_token_seconds",
                "histogram",
                "seconds",
                ENGINE,
                ("measured",),
                "From the arrival of a request's HTTP headers (of the call, without HTTP) to its first "
                "token: of a streaming response, handed to the connection; else detokenized and with its "
                "stream.",
                buckets.FIRST_TOKEN_SECONDS,
            ),
            Family(
                "llmprobe_time_per_output_token_seconds",
                "histogram",
                "seconds",
                ENGINE,
                ("measured",),
                "TPOT of a finished request: (last - first token) ÷ (tokens - 1).",
                buckets.TOKEN_SECONDS,
            ),
            Family(
                "llmprobe_inter_token_latency_seconds",
                "histogram",
                "seconds",
                ENGINE,
                ("measured",),
                "Between one token of a request and the next.",
                buckets.TOKEN_SECONDS,
            ),
            Family(
                "llmprobe_request_duration_seconds",
                "histogram",
                "seconds",
                ENGINE,
                ("measured",),
                "From a request's arrival at vLLM, its HTTP body read and checked, to its end.",
                buckets.REQUEST_SECONDS,
            ),
            Family(
                "llmprobe_request_queue_seconds",
                "histogram",
                "seconds",
                ENGINE,
                ("measured",),
                "From a request's arrival at vLLM until it was first scheduled.",
                buckets.REQUEST_SECONDS,
            ),
        ),
    ),
    Section(
        "Own health",
        "What llmprobe is attached to, what it cannot show, and what it costs. `rank` is empty where the "
        "process is a front end. The agent's own CPU time and memory are `process_cpu_seconds_total` and "
        "`process_resident_memory_bytes` of the same target.",
        (
            Family(
                "llmprobe_hook_armed",
                "gauge",
                "bool",
                RANK,
                ("measured",),
                "1 while the probe records in this worker, 0 when it was switched off or gave up.",
            ),
            Family(
                "llmprobe_hook_info",
                "gauge",
                "info",
                (*RANK, "framework", "framework_version", "runner", "clock"),
                ("measured",),
                "Always 1. What is being measured, and the clock: cuda (events on the device) or host (a CPU "
                "device's own clock).",
            ),
            Family(
                "llmprobe_figure_available",
                "gauge",
                "bool",
                (*SERVER, "figure"),
                ("measured",),
                "0 where a figure cannot be given for this server; /api/status says why.",
            ),
            Family(
                "llmprobe_records_dropped_total",
                "counter",
                "records",
                (*RANK, "reason"),
                ("measured",),
                "Records that detail is missing from: queue (the process was too busy to write them) or "
                "overwritten (the agent did not read them in time).",
            ),
            Family(
                "llmprobe_errors_total",
                "counter",
                "errors",
                (*RANK, "where"),
                ("measured",),
                "llmprobe's own errors inside an engine process; after 10 its probe makes itself inert.",
            ),
            Family(
                "llmprobe_self_seconds_total",
                "counter",
                "seconds",
                (*RANK, "where"),
                ("measured",),
                "Host time that llmprobe took inside an engine process: step (worker) or frontend.",
            ),
            Family(
                "llmprobe_captures_total",
                "counter",
                "captures",
                ("tool", "outcome"),
                ("measured",),
                "Captures of this agent that ended, by tool (nsys, torch, kernels): done, failed or "
                "cancelled. Since it started; only on the agent's own /metrics.",
            ),
            Family(
                "llmprobe_build_info",
                "gauge",
                "info",
                ("version",),
                ("measured",),
                "Always 1. Version of the agent; only on the agent's own /metrics.",
            ),
        ),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for section in SECTIONS for family in section.families}

#: Latency histograms of an engine: name in `EngineView.latency` → family.
LATENCIES = {
    name: FAMILIES[f"llmprobe_{name}_seconds"]
    for name in (
        "time_to_first_token",
        "time_per_output_token",
        "inter_token_latency",
        "request_duration",
        "request_queue",
    )
}
