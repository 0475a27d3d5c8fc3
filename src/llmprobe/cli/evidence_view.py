"""What decided a verdict, and what the host did, in words: from the JSON of ``/api/status``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

#: Class → the quantities that decide it.
_DECIDING = {
    "unknown": ("sync_gap_ratio", "mbu_busy", "mfu_busy"),
    "sync_bound": ("sync_gap_ratio", "launch_gap_ratio", "graphics_active_ratio"),
    "balanced": ("mbu_busy", "mfu_busy", "intensity_flops_per_byte"),
    "memory_bound": ("mbu_busy", "dram_active_ratio", "experts_read_ratio"),
    "compute_bound": ("mfu_busy", "tensor_active_ratio"),
    "inefficient_kernels": ("mbu_busy", "mfu_busy", "experts_read_ratio"),
}
#: Classes that host signals explain: a wait, or a step that is slow for no reason of its own.
_EXPLAINED = ("sync_bound", "inefficient_kernels")
_WORDS = {
    "sync_gap_ratio": "sync gap",
    "mbu_busy": "MBU of busy time",
    "mfu_busy": "MFU of busy time",
    "intensity_flops_per_byte": "FLOPs per byte",
    "experts_read_ratio": "experts read",
    "launch_gap_ratio": "launch gaps",
    "dram_active_ratio": "DRAM active",
    "tensor_active_ratio": "tensor cores active",
    "graphics_active_ratio": "GPU active",
}


def deciding(verdict: Mapping[str, Any]) -> str:
    """The evidence that decided, in one line: value, threshold, source and age of each; maybe empty."""
    bottleneck = verdict["bottleneck"]
    names = _DECIDING.get(bottleneck, ())
    return "; ".join(
        _said(item)
        for item in verdict["evidence"]
        if item["quantity"] in names or (bottleneck in _EXPLAINED and item["quantity"].startswith("host_"))
    )


def evidence_table(verdict: Mapping[str, Any]) -> Table:
    """All evidence of one verdict, a row each."""
    table = Table(box=None, pad_edge=False)
    for name in ("quantity", "value", "threshold", "source", "seen"):
        table.add_column(name, justify="right" if name in ("value", "threshold") else "left")
    for item in verdict["evidence"]:
        cells = (_quantity(item), _number(item["value"]), _threshold(item), item["source"], _age(item))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def host_line(host: Mapping[str, Any]) -> str:
    """Host signals of one process in one line, as far as they are known."""
    parts = [f"{host['cpu_ratio']:.2f} cores"]
    if host["cpus_allowed"] is not None:
        parts[0] += f" of {host['cpus_allowed']}"
    if host["threads"]:
        busiest = host["threads"][0]
        parts.append(f"busiest thread {busiest['name']} {busiest['cpu_ratio']:.0%}")
    for name, words in (
        ("run_queue_ratio", "waiting for a core"),
        ("throttled_ratio", "throttled"),
        ("cpu_pressure_ratio", "CPU pressure"),
        ("memory_pressure_ratio", "memory pressure"),
    ):
        if host[name] is not None:
            parts.append(f"{words} {host[name]:.0%}")
    if (switches := host["involuntary_switches_per_second"]) is not None:
        parts.append(f"{switches:.0f} involuntary switches/s")
    parts.append(f"{host['major_faults_per_second']:.0f} major faults/s")
    return ", ".join(parts)


def _said(item: Mapping[str, Any]) -> str:
    against = ""
    if item["threshold"] is not None and item["value"] is not None:
        against = f" {'≥' if item['value'] >= item['threshold'] else '<'} {_number(item['threshold'])}"
    age = _age(item)
    return (
        f"{_quantity(item)} {_number(item['value'])}{against} ({item['source']}{f', {age}' if age else ''})"
    )


def _quantity(item: Mapping[str, Any]) -> str:
    name = str(item["quantity"])
    return _WORDS.get(name, name.replace("_", " "))


def _threshold(item: Mapping[str, Any]) -> str:
    return "" if item["threshold"] is None else _number(item["threshold"])


def _age(item: Mapping[str, Any]) -> str:
    return f"{item['age_seconds']:.0f} s ago" if item["age_seconds"] else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
