"""Families of what a server's steps do: their time, the verdict on them, kernels, how far from the roofs."""

from __future__ import annotations

from llmprobe.export import buckets
from llmprobe.export.catalogue.family import RANK, SERVER, Family, Section

_TIME = (
    ("phase", "prefill", "the step worked on prompt tokens only"),
    ("phase", "decode", "on generated tokens only, those of drafts that it checked included"),
    ("phase", "mixed", "on both"),
    ("phase", "draft", "an assistant's step (assisted decoding of transformers)"),
    ("phase", "dummy", "a step without requests, which keeps data-parallel ranks together"),
    ("phase", "encode", "not used: an encoder is timed with the step behind it, as `unattributed`"),
    ("phase", "none", "no step ran"),
    ("component", "floor_memory", "the least time that memory traffic of the work takes at peak bandwidth"),
    ("component", "floor_compute", "the same of operators whose FLOPs take longer than their traffic"),
    ("component", "inefficiency", "kernels ran beyond the floor. Known from kernel windows only"),
    ("component", "launch_gap", "nothing ran inside a step. Known from kernel windows only"),
    ("component", "host_gap", "nothing ran between steps, with requests unfinished"),
    ("component", "sample_gap", "nothing ran between a step's forward pass and its sampling"),
    ("component", "communication", "only communication ran. Known from kernel windows only"),
    ("component", "transfer", "only copies and sets ran. Known from kernel windows only"),
    (
        "component",
        "unattributed",
        "measured, but not told apart: without kernel windows all of a step beyond its floor (inefficiency, "
        "launch_gap, communication and transfer together); time in which the probe was off; an encoder's",
    ),
    ("component", "blocked", "requests waited for what is no device work. Not measured yet, so absent"),
    ("component", "no_work", "no request was unfinished"),
)

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
        _TIME,
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
                "token_budget, sequence_limit, front_end. Absent where it is not known.",
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
                "Memory bandwidth utilisation: least bytes the steps must move ÷ time ÷ peak bandwidth. Of a "
                "mixture of experts as if its routing were even.",
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
                "Least bytes the steps so far had to move through device memory, by kind: weights, kv_read, "
                "kv_write.",
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
)
