"""What of a PyTorch profiler trace may leave the machine, event by event."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmprobe.analysis.kineto import OWN_PREFIX, RECORDED_UNTIL, VLLM_STEP, trace_events
from llmprobe.capture.scrub_database import function_name, kernel_name

_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_CALLS = frozenset({"cuda_runtime", "cuda_driver"})
_ANNOTATIONS = frozenset({"user_annotation", "gpu_user_annotation"})
_OPERATOR = re.compile(r"[A-Za-z_][\w:.]{0,199}")
_OWN = re.compile(re.escape(OWN_PREFIX) + r"[a-z_]{1,40}")
#: Ids of kineto have 64 bits.
_LARGEST = 1 << 64
_STEP = re.compile(r"ProfilerStep#\d{1,9}")
_DEVICE_NAME = re.compile(r"[\w .()+-]{1,80}")
_VERSION = re.compile(r"[0-9][\w.+-]{0,39}")
_LABEL = re.compile(r"CPU|GPU \d{1,4}|stream \d{1,9} *")

#: Arguments of events that stay where they are numbers or lists of numbers.
_ARGUMENTS = frozenset(
    {
        "device", "context", "stream", "correlation", "bytes", "grid", "block", "queued", "cbid",
        "External id", "Ev Idx", "Record function id", "Sequence number", "Fwd thread id", "Input Dims",
        "registers per thread", "shared memory", "blocks per SM", "warps per SM", "graph node id", "graph id",
        "est. achieved occupancy %", "memory bandwidth (GB/s)", "sort_index", "tokens",
    }
)  # fmt: skip
_TOP_LEVEL_NUMBERS = frozenset(
    {
        "schemaVersion", "baseTimeNanoseconds", "with_stack", "with_flops", "with_modules", "record_shapes",
        "profile_memory", "cuda_runtime_version", "cuda_driver_version", "cupti_version",
    }
)  # fmt: skip


def allowed_top_level(key: str, value: Any) -> Any:
    """What stays of a value beside the events; `KeyError` if nothing does."""
    if key in _TOP_LEVEL_NUMBERS and _is_number(value):
        return value
    if key in ("torch_version", "pytorch_version") and isinstance(value, str) and _VERSION.fullmatch(value):
        return value
    if key == "displayTimeUnit" and value in ("ms", "ns"):
        return value
    if key == "distributedInfo" and isinstance(value, dict):
        return {name: value[name] for name in ("rank", "world_size") if _is_number(value.get(name))}
    if key == "deviceProperties" and isinstance(value, list):
        return [_device(one) for one in value[:1024] if isinstance(one, dict)]
    raise KeyError(key)


def allowed_events(path: Path, top_level: Callable[[str, Any], None]) -> Iterator[dict[str, Any]]:
    """The events that stay, each as much as stays of it; values beside them go to ``top_level``.

    Raises:
        AnalysisError: the file is no trace, or damaged.
    """
    for event in trace_events(path, top_level):
        kept = _event(event) if isinstance(event, dict) else None
        if kept is not None:
            yield kept


def _event(event: dict[str, Any]) -> dict[str, Any] | None:
    name, phase, category = event.get("name"), event.get("ph"), event.get("cat")
    if phase == "M":
        return _metadata(event)
    if phase in ("s", "f") and category == "ac2g":
        kept = {"ph": phase, "cat": "ac2g", "name": "ac2g", **_numbers(event, ("id", "pid", "tid", "ts"))}
        return {**kept, "bp": "e"} if phase == "f" else kept
    if phase == "i" and name == RECORDED_UNTIL:
        return {"ph": phase, "s": "g", "name": name, **_numbers(event, ("pid", "tid", "ts"))}
    if phase != "X" or not isinstance(name, str) or not isinstance(category, str):
        return None
    shown = _shown(category, name)
    if shown is None:
        return None
    return {
        "ph": "X",
        "cat": category,
        "name": shown,
        **_numbers(event, ("pid", "tid", "ts", "dur")),
        "args": _arguments(event.get("args")),
    }


def _shown(category: str, name: str) -> str | None:
    if category in _ON_DEVICE:
        return kernel_name(name)
    if category in _CALLS:
        return function_name(name)
    if category == "cpu_op":
        return name if _OPERATOR.fullmatch(name) else "operator"
    if category in _ANNOTATIONS:
        step = VLLM_STEP.match(name[:300])
        if step is not None:
            # Built anew: what follows the numbers is not looked at.
            prompts, prompt_tokens, decodes, tokens = step.groups()
            return f"execute_context_{prompts}({prompt_tokens})_generation_{decodes}({tokens})"
        if _OWN.fullmatch(name) or _STEP.fullmatch(name):
            return name
    return None


def _metadata(event: dict[str, Any]) -> dict[str, Any] | None:
    """Names of streams and the order of rows; processes and threads are named after what runs in them."""
    name, args = event.get("name"), event.get("args")
    if not isinstance(args, dict):
        return None
    place = {"ph": "M", "name": name, **_numbers(event, ("pid", "tid", "ts"))}
    if name in ("process_sort_index", "thread_sort_index"):
        return {**place, "args": _arguments(args)}
    key = {"process_labels": "labels", "thread_name": "name"}.get(str(name))
    label = args.get(key) if key else None
    if isinstance(label, str) and _LABEL.fullmatch(label):
        return {**place, "args": {key: label}}
    return None


def _device(properties: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        name: value for name, value in properties.items() if _OPERATOR.fullmatch(name) and _is_number(value)
    }
    name = properties.get("name")
    if isinstance(name, str) and _DEVICE_NAME.fullmatch(name):
        kept["name"] = name
    return kept


def _arguments(args: Any) -> dict[str, Any]:
    if not isinstance(args, dict):
        return {}
    return {name: value for name, value in args.items() if name in _ARGUMENTS and _all_numbers(value)}


def _numbers(event: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: event[name] for name in names if _is_number(event.get(name))}


def _is_number(value: Any) -> bool:
    # Whoever reads the copy may make floats of its integers.
    if isinstance(value, int):
        return abs(value) <= _LARGEST
    return isinstance(value, float) and math.isfinite(value)


def _all_numbers(value: Any, depth: int = 4) -> bool:
    if isinstance(value, list):
        return depth > 0 and all(_all_numbers(one, depth - 1) for one in value)
    return _is_number(value)
