"""Step records and models for the tests of compute, small enough to check by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmprobe.compute.hardware import Peaks
from llmprobe.record.layout import KV_GROUPS, STEP, Phase

SECOND = 1_000_000_000
#: 1 kB/s and 4 kFLOP/s: a ridge of 4 FLOP/byte.
PEAKS = Peaks(1e3, 4e3, "bfloat16", "nominal", "made up")


def steps(*rows: dict[str, Any]) -> np.ndarray:
    """Step records; each row needs what differs from zeros. ``times`` gives e0 to e3, numbers count up."""
    records = np.zeros(len(rows), dtype=STEP)
    for index, row in enumerate(rows):
        fields = {"step": index + 1, "phase": Phase.DECODE, **row}
        for name, time in zip(("e0", "e1", "e2", "e3"), fields.pop("times", ()), strict=False):
            fields[name] = time
        for name, value in fields.items():
            if name.startswith(("context", "pairs")):
                value = [*value, *([0] * (KV_GROUPS - len(value)))]
            records[name][index] = value
    return records


def group(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "full",
        "window": None,
        "layers": 2,
        "bytes_per_token": 0,
        "flops_per_pair": 0,
        "bytes_per_request": 0,
        **changes,
    }


def facts(*groups: dict[str, Any], **operators: dict[str, Any]) -> dict[str, Any]:
    """Facts as a journal holds them."""
    return {
        "weights_bytes": 1000,
        "compute_dtype": "bfloat16",
        "operators": {
            "linear": {"bytes": 200, "params": 100},
            "head": {"bytes": 40, "params": 20},
            **operators,
        },
        "embedding_bytes": 40,
        "tied": False,
        "kv": {"capacity_bytes": 4096, "groups": list(groups)},
        "unmodelled": [],
    }
