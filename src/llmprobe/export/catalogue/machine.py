"""Families of what the steps run on: the GPU, the host, memory."""

from __future__ import annotations

from llmprobe.export.catalogue.family import RANK, SERVER, Family, Section

SECTIONS = (
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
                "llmprobe_gpu_graphics_active_ratio",
                "gauge",
                "ratio",
                RANK,
                ("counter",),
                "Share of time in which the GPU had anything to compute, copies not counted. Stays up "
                "between small kernels.",
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
        "Of each worker's process, and of a server's other processes, read from /proc and cgroups once a "
        "second, at no cost to the engine. Absent where this kernel or container does not tell, or shows "
        "another namespace.",
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
                "llmprobe_host_cpu_seconds_total",
                "counter",
                "seconds",
                (*SERVER, "process"),
                ("measured",),
                "CPU time of a server's processes that are no worker's: frontend (its API servers together, "
                "or the program that uses vLLM) and engine_core (where cores have processes of their own).",
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
)
