"""One server as a panel in the terminal; shared by ``status`` and the live view of ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmprobe.cli.evidence_view import host_line

#: What is no floor of a step, in the order in which it is told.
_PARTS = {
    "inefficiency": "slow kernels",
    "launch": "launch bubbles",
    "host": "host between steps",
    "sample": "host before sampling",
    "communication": "communication",
    "transfer": "copies",
    "remainder": "not told apart",
}
_LEAST_SHARE = 0.005  # of a step; what is less would read 0 %


def server_panel(server: dict[str, Any]) -> RenderableType:
    """A panel over one entry of ``/api/status``."""
    parts: list[RenderableType] = [_engine_line(engine) for engine in server["engines"]]
    for rank in server["ranks"]:
        parts.append(
            _phases(rank) if rank["figures"] else Text(f"rank {rank['rank']}: no steps in the last 30 s")
        )
        parts += [Text(line) for line in step_parts(rank.get("attribution") or {})]
        if gpu := rank.get("gpu"):
            parts.append(Text(f"GPU of rank {rank['rank']}: {_gpu(gpu)}", style="dim"))
        if host := rank.get("host"):
            parts.append(Text(f"host of rank {rank['rank']}: {host_line(host)}", style="dim"))
    parts += [
        Text(f"not measured: {figures}: {why}", style="dim")
        for why, figures in _by_reason(server["missing"]).items()
    ]
    parts += [Text(f"note: {note}", style="dim") for note in server["notes"]]
    title = f"{server['server']}  {server['model_name']}  {server['framework']} {server['framework_version']}"
    return Panel(Group(*parts), title=Text(title + _state(server)), title_align="left")


def _state(server: dict[str, Any]) -> str:
    if server["inert"]:
        return "  (the probe gave up after internal errors)"
    return "" if server["armed"] else "  (off)"


def _engine_line(engine: dict[str, Any]) -> Text:
    recent = engine["recent_latency"]
    used, usage = engine["kv_used_bytes"], engine["kv_usage"]
    kv = "–" if used is None else _bytes(used)
    if usage is not None:
        kv += f" ({usage:.1%})"
    parts = [
        f"running {_count(engine['requests_running'])}  waiting {_count(engine['requests_waiting'])}",
        f"TTFT {_ms(recent, 'time_to_first_token')}",
        f"TPOT {_ms(recent, 'time_per_output_token')}",
        f"KV {kv}",
        f"{engine['requests']} requests, {engine['generated_tokens']} tokens",
    ]
    return Text("   ".join(parts))


def _phases(rank: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("phase", "steps/s", "step p50", "p99", "floor", "MBU", "MFU", "sync gap"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, found in rank["figures"].items():
        bound = "≥" if found["sync_gap_is_lower_bound"] else ""
        gap = found["sync_gap_ratio"]
        table.add_row(
            phase,
            f"{found['steps_per_second']:.1f}",
            _seconds(found["step_seconds_p50"]),
            _seconds(found["step_seconds_p99"]),
            _seconds(found["floor_seconds"]),
            _ratio(found["mbu_step"]),
            _ratio(found["mfu_step"]),
            "–" if gap is None else f"{bound}{gap:.1%}",
        )
    return table


def step_parts(attribution: Mapping[str, Any]) -> list[str]:
    """Where the time of a mean step went, a line for each phase. The shares are of its time with the gap."""
    lines = []
    for phase, found in attribution.items():
        total, seconds = found["total_seconds"], found["seconds"]
        if total <= 0 or found["steps"] <= 0:
            continue
        shares = {name: value / total for name, value in seconds.items()}
        told = [_floor(roof, shares) for roof in ("memory", "compute")]
        told += [f"{words} {shares[part]:.0%}" for part, words in _PARTS.items() if _worth(shares.get(part))]
        lines.append(
            f"{phase} step of {_seconds(total / found['steps'])}: {', '.join(filter(None, told)) or '–'}"
        )
    return lines


def _floor(roof: str, shares: Mapping[str, float]) -> str:
    """``memory floor 30% (attention 21%, linear 9%)``; empty where there is none."""
    own = {name.partition(".")[2]: share for name, share in shares.items() if name.startswith(f"{roof}.")}
    if not _worth(total := sum(own.values())):
        return ""
    ranked = sorted(own.items(), key=lambda item: -item[1])
    operators = ", ".join(f"{name} {share:.0%}" for name, share in ranked if _worth(share))
    return f"{roof} floor {total:.0%}" + (f" ({operators})" if operators else "")


def _worth(share: float | None) -> bool:
    return share is not None and share >= _LEAST_SHARE


def _gpu(gpu: dict[str, Any]) -> str:
    """What NVML says, as far as it says it."""
    parts = [
        f"{name} {_ratio(gpu[key])}"
        for name, key in (
            ("DRAM", "dram_active_ratio"),
            ("tensor", "tensor_active_ratio"),
            ("SM", "sm_active_ratio"),
        )
        if gpu[key] is not None
    ]
    if gpu["power_watts"] is not None:
        parts.append(f"{gpu['power_watts']:.0f} W")
    if gpu["sm_clock_hertz"] is not None:
        parts.append(f"{gpu['sm_clock_hertz'] / 1e6:.0f} MHz")
    if gpu["temperature_celsius"] is not None:
        parts.append(f"{gpu['temperature_celsius']:.0f} °C")
    if gpu["memory_used_bytes"] is not None and gpu["memory_capacity_bytes"]:
        parts.append(f"memory {gpu['memory_used_bytes'] / gpu['memory_capacity_bytes']:.1%}")
    return "   ".join(parts)


def _by_reason(missing: dict[str, str]) -> dict[str, str]:
    """Reason → the figures that are missing for it."""
    found: dict[str, list[str]] = {}
    for figure, why in missing.items():
        found.setdefault(why, []).append(figure)
    return {why: ", ".join(figures) for why, figures in found.items()}


def _ms(recent: dict[str, dict[str, float]], name: str) -> str:
    return _seconds(recent[name]["p50"]) if name in recent else "–"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1e3:.2f} ms"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _count(value: int | None) -> str:
    return "–" if value is None else str(value)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
