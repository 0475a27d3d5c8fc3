"""Peak rates of the device that a worker's facts name."""

from __future__ import annotations

from typing import Any

from llmprobe.compute.hardware import Peaks, lookup


def peaks_of(facts: dict[str, Any]) -> Peaks | None:
    """Published peaks for the worker's device and compute dtype; None if none are known."""
    name = (facts.get("device") or {}).get("name")
    dtype = (facts.get("model") or {}).get("compute_dtype")
    return lookup(name, dtype) if isinstance(name, str) and isinstance(dtype, str) else None
