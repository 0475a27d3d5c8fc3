"""Families of what users see of a server, and of llmprobe itself."""

from __future__ import annotations

from llmprobe.export import buckets
from llmprobe.export.catalogue.family import ENGINE, RANK, SERVER, Family, Section

SECTIONS = (
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
            Family(
                "llmprobe_output_lag_seconds",
                "histogram",
                "seconds",
                ENGINE,
                ("measured",),
                "From when the engine core had made an iteration's outputs until the front end had "
                "detokenized them and handed them to their streams. Empty for engines on other machines.",
                buckets.LAG_SECONDS,
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
                "Records that detail is missing from: queue (the process was too busy to write them, or a "
                "step could not be timed) or overwritten (the agent did not read them in time).",
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
                "Host time that llmprobe took inside an engine process: step (of the worker's steps) or "
                "frontend (of its event loop); thread and frontend_thread are processor time of llmprobe's "
                "own thread beside them.",
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
