"""One step record as JSON, as ``/api/steps`` shows it."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmprobe.collect.process import Process, monotonic_to_unix
from llmprobe.record import layout


def step_json(process: Process, server: str, row: np.void) -> dict[str, Any]:
    """What a step was and how long its parts took; what its process does not record is left out."""
    times = [int(row[name]) for name in ("e0", "e1", "e2", "e3")]
    # A vLLM worker records neither; 0 would be a figure.
    unknown = {name for name in ("new_tokens", "kv_used_bytes") if process.role == "worker" and not row[name]}
    return {
        "server": server,
        "engine": process.engine,
        "rank": int(process.facts.get("rank", 0)),
        "step": int(row["step"]),
        "phase": layout.PHASES[int(row["phase"])],
        "clock": layout.Clock(int(row["clock"])).name.lower(),
        "begin_unix_seconds": monotonic_to_unix(times[0]),
        "span_seconds": (times[3] - times[0]) / 1e9,
        "forward_seconds": (times[1] - times[0]) / 1e9,
        "sample_gap_seconds": (times[2] - times[1]) / 1e9,
        "sample_seconds": (times[3] - times[2]) / 1e9,
        "own_seconds": int(row["own_ns"]) / 1e9,
        **{
            name: int(row[name])
            for name in (
                "requests",
                "prefill_requests",
                "prompt_tokens",
                "decode_tokens",
                "draft_tokens",
                "sampled",
                "new_tokens",
                "kv_used_bytes",
            )
            if name not in unknown
        },
        "context_tokens": int(row["context_prefill"][0]) + int(row["context_decode"][0]),
    }
