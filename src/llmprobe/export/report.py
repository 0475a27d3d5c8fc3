"""The report of a finished run: what each server did, where its time went, what was not measured and why.

Kept as plain JSON (``run.json``, ``schema_version`` 1), so that runs can be compared later; `text` shows it.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import llmprobe
from llmprobe.collect.views import EngineView, HistogramView, RankView, ServerView
from llmprobe.compute import histogram
from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS
from llmprobe.compute.figures import STALLS
from llmprobe.compute.verdict import IDLE
from llmprobe.export.run_seen import RunLooks, ServerSeen, rank_key
from llmprobe.export.run_verdict import run_verdict, work_seconds
from llmprobe.record.layout import bucket_bounds_seconds

SCHEMA_VERSION = 1
_BOUNDS = bucket_bounds_seconds()
_LATENCIES = {
    "time_to_first_token": "ttft_seconds",
    "time_per_output_token": "tpot_seconds",
    "inter_token_latency": "inter_token_seconds",
    "request_duration": "duration_seconds",
    "request_queue": "queue_seconds",
    "output_lag": "output_lag_seconds",
}
#: Columns that a narrow terminal does without, in this order.
_LEAST_TELLING = ("p99 ms", "at floor", "MFU", "floor ms")


def report(
    views: Sequence[ServerView], since: Sequence[ServerView] = (), looks: RunLooks | None = None
) -> dict[str, Any]:
    """What happened to every server between ``since`` (default: its start) and ``views``, JSON-ready.

    Args:
        views: the servers at the end.
        since: at the beginning.
        looks: what was seen in between; without, only what can still be seen at the end is known.
    """
    before = {(view.group, view.server): view for view in since}
    looks = looks or RunLooks(since)
    looks.look(views)
    return {
        "schema_version": SCHEMA_VERSION,
        "llmprobe_version": llmprobe.__version__,
        "servers": [_server(view, before.get((view.group, view.server)), looks.seen(view)) for view in views],
    }


def _server(view: ServerView, before: ServerView | None, seen: ServerSeen) -> dict[str, Any]:
    engines = {engine.engine: engine for engine in before.engines} if before else {}
    ranks = {rank_key(rank): rank for rank in before.ranks} if before else {}
    told_engines = [_engine(engine, engines.get(engine.engine)) for engine in view.engines]
    told_ranks = [
        _rank(
            rank, ranks.get(rank_key(rank)), bool(view.engines), frozenset(seen.ranks[rank_key(rank)].kernels)
        )
        for rank in view.ranks
    ]
    return {
        "server": view.server,
        "model_name": view.model_name,
        "framework": view.framework,
        "framework_version": view.framework_version,
        "flags": view.flags,
        **run_verdict(view, told_ranks, told_engines, before, seen),
        "engines": told_engines,
        "ranks": told_ranks,
        "not_measured": view.missing,
        "notes": view.notes,
    }


def _engine(engine: EngineView, before: EngineView | None) -> dict[str, Any]:
    counts = {
        name: getattr(engine, name) - (getattr(before, name) if before else 0)
        for name in (
            "requests",
            "requests_aborted",
            "prompt_tokens",
            "generated_tokens",
            "cached_tokens",
            "preemptions",
        )
    }
    latency = {
        key: quantiles
        for name, key in _LATENCIES.items()
        if name in engine.latency
        and (quantiles := _quantiles(engine.latency[name], before.latency.get(name) if before else None))
    }
    return {"engine": engine.engine, **counts, **latency}


def _rank(
    rank: RankView, before: RankView | None, gaps_known: bool, sampled: frozenset[str]
) -> dict[str, Any]:
    """``sampled``: phases whose bubbles kernel windows told for most of the run."""
    device = rank.facts.get("device") or {}
    phases = {
        phase: _phase(phase, rank, before, gaps_known, phase in sampled)
        for phase, steps in rank.steps.items()
        if steps > (before.steps.get(phase, 0) if before else 0)
    }
    idle = _minus(rank.device_time.get("none", {}), before.device_time.get("none", {}) if before else {})
    peaks = None
    if rank.peaks is not None:
        peaks = {
            "bandwidth_bytes_per_second": rank.peaks.bandwidth_bytes_per_second,
            "flops_per_second": rank.peaks.flops_per_second,
            "dtype": rank.peaks.dtype,
            "source": rank.peaks.source,
        }
    return {
        "engine": rank.engine,
        "rank": rank.rank,
        "device": device,
        "clock": rank.clock,
        "runner": rank.runner,
        "peaks": peaks,
        "weights_bytes": rank.weights_bytes,
        "kv_capacity_bytes": rank.kv_capacity_bytes,
        "phases": phases,
        "idle_seconds": {name: idle.get(name, 0.0) for name in IDLE_COMPONENTS},
        "own_seconds": rank.own_seconds - (before.own_seconds if before else 0.0),
        "own_thread_seconds": rank.own_thread_seconds - (before.own_thread_seconds if before else 0.0),
        "errors": rank.errors,
        "records_lost": rank.lost,
    }


def _phase(
    phase: str, rank: RankView, before: RankView | None, gaps_known: bool, sampled: bool
) -> dict[str, Any]:
    steps = rank.steps[phase] - (before.steps.get(phase, 0) if before else 0)
    components = _minus(rank.device_time.get(phase, {}), before.device_time.get(phase, {}) if before else {})
    components = {name: components.get(name, 0.0) for name in COMPONENTS if name not in IDLE_COMPONENTS}
    seconds = sum(components.values())
    stall = sum(components[name] for name in STALLS)
    traffic = sum(_minus(rank.bytes.get(phase, {}), before.bytes.get(phase, {}) if before else {}).values())
    flops = rank.flops.get(phase, 0.0) - (before.flops.get(phase, 0.0) if before else 0.0)
    if not gaps_known:
        del components["host_gap"]
    found: dict[str, Any] = {
        "steps": steps,
        "seconds": seconds,
        "components_seconds": components,
        "sync_gap_ratio": stall / seconds if seconds > 0 and gaps_known else None,
        "sync_gap_is_lower_bound": not sampled,
    }
    if phase in rank.step_duration:
        earlier = before.step_duration.get(phase) if before else None
        found["step_seconds"] = _quantiles(rank.step_duration[phase], earlier)
    if traffic > 0:
        found["traffic_bytes"], found["flops"] = traffic, flops
        found["intensity_flops_per_byte"] = flops / traffic
    step, busy = work_seconds(phase, rank, before)
    if traffic > 0 and rank.peaks is not None and step > 0 and busy > 0:
        bandwidth, rate = rank.peaks.bandwidth_bytes_per_second, rank.peaks.flops_per_second
        found["floor_step_seconds"] = (components["floor_memory"] + components["floor_compute"]) / steps
        found["mbu_step"], found["mbu_busy"] = traffic / step / bandwidth, traffic / busy / bandwidth
        found["mfu_step"], found["mfu_busy"] = flops / step / rate, flops / busy / rate
    return found


def _minus(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


def _quantiles(now: HistogramView, before: HistogramView | None) -> dict[str, float]:
    counts = now.counts.astype(np.int64)
    total = now.sum
    if before is not None:
        counts = counts - before.counts.astype(np.int64)
        total -= before.sum
    count = int(counts.sum())
    p50, p99 = (histogram.quantile(counts, _BOUNDS, q) for q in (0.5, 0.99))
    if not count or p50 is None or p99 is None:
        return {}
    return {"count": count, "mean": total / count, "p50": p50, "p99": p99}


def text(document: Mapping[str, Any], width: int | None = None) -> str:
    """A report as people read it: a few lines and one table a server.

    Args:
        width: columns; those of the terminal if None, 100 without one.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    lines: list[str] = []
    for server in document["servers"]:
        lines += _server_lines(server, width)
    return (
        "\n".join(lines)
        or "llmprobe: nothing was measured: the program ran no vLLM engine and no generate()."
    )


def _server_lines(server: Mapping[str, Any], width: int) -> list[str]:
    framework = f"({server['framework']} {server['framework_version']})"
    lines = _wrapped(f"{server['server']}  {server['model_name']}  {framework}", width, indent=0)
    said = [server["headline"]]
    judged = {
        about: found
        for about, found in server["advice"].items()
        if server["verdicts"].get(about, {}).get("bottleneck") != IDLE
    }
    said += advice_lines(judged)
    said += [_engine_line(engine) for engine in server["engines"]]
    for line in said:
        # A command is copied: what breaks it breaks the copy.
        lines += [f"  {line}"] if line.lstrip().startswith("next look:") else _wrapped(line, width)
    for rank in server["ranks"]:
        lines += ["", *_rank_lines(rank, width)]
    said = [f"not measured: {figure} ({why})" for figure, why in server["not_measured"].items()]
    said += [f"note: {note}" for note in server["notes"]]
    return lines + [part for line in said for part in _wrapped(line, width)]


def _wrapped(line: str, width: int, indent: int = 2) -> list[str]:
    first = " " * (indent + len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line.lstrip(),
        width,
        initial_indent=first,
        subsequent_indent=first + "  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def advice_lines(advice: Mapping[str, Any], most: int = 2) -> list[str]:
    """What to do, a few lines a phase or kind of pressure: from the JSON of `run_verdict` or a status."""
    lines: list[str] = []
    said: set[str] = set()  # phases and kinds of pressure often call for the same change
    for about, found in advice.items():
        fresh = [item for item in found if item["finding"] not in said and item["change"] not in said]
        for item in fresh[:most]:
            said |= {item["finding"], item["change"]} - {""}
            risk = "" if item["risk"].startswith("None") else f" Risk: {item['risk']}"
            if item["change"]:
                does = f"try {item['change']}" + (f"; {item['gain']}" if item["gain"] else "")
            else:
                does = item["reason"] + (f" To gain: {item['gain']}." if item["gain"] else "") + risk
            lines.append(f"{about}: {does}")
            if item["change"]:
                lines.append(f"  {item['reason']}{risk}")
        if fresh and fresh[0]["look"] not in said:
            said.add(fresh[0]["look"])
            lines.append(f"  next look: {fresh[0]['look']}")
    return lines


def _engine_line(engine: Mapping[str, Any]) -> str:
    parts = [
        f"{engine['requests']} requests",
        f"{engine['prompt_tokens']} prompt + {engine['generated_tokens']} generated tokens",
    ]
    for key, name in (("ttft_seconds", "TTFT"), ("tpot_seconds", "TPOT")):
        if key in engine:
            parts.append(f"{name} p50 {_ms(engine[key]['p50'])} p99 {_ms(engine[key]['p99'])}")
    return "   ".join(parts)


def _rank_lines(rank: Mapping[str, Any], width: int) -> list[str]:
    clock = {"cuda": "measured on the device", "host": "measured by the host's clock"}.get(rank["clock"], "")
    name = rank["device"].get("name", "")
    lines = _wrapped(f"rank {rank['rank']}: {name}, times {clock}", width)
    lines += _phase_rows([_phase_cells(phase, found, rank) for phase, found in rank["phases"].items()], width)
    idle = rank["idle_seconds"]
    if idle["no_work"]:
        lines.append(f"  nothing to do for {idle['no_work']:.1f} s")
    each = 1e6 / max(sum(p["steps"] for p in rank["phases"].values()), 1)
    own, thread = each * rank["own_seconds"], each * rank["own_thread_seconds"]
    return [*lines, f"  llmprobe itself: {own:.0f} µs a step, its thread {thread:.0f} µs"]


def _phase_rows(cells: list[dict[str, str]], width: int) -> list[str]:
    """As a table. Where a terminal is too narrow for all columns, the least telling go."""
    if not cells:
        return []
    rows = [dict(zip(cells[0], cells[0], strict=True)), *cells]
    widths = {name: max(len(row[name]) for row in rows) for name in cells[0]}
    for name in _LEAST_TELLING:
        if sum(widths.values()) + 2 * len(widths) > width:
            del widths[name]
    return [
        "".join(
            f"  {row[name]:<{wide}}" if name == "phase" else f"  {row[name]:>{wide}}"
            for name, wide in widths.items()
        ).rstrip()
        for row in rows
    ]


def _phase_cells(phase: str, found: Mapping[str, Any], rank: Mapping[str, Any]) -> dict[str, str]:
    seconds = found["seconds"] or 1.0
    parts = found["components_seconds"]
    step = found.get("step_seconds") or {}
    floor = (parts["floor_memory"] + parts["floor_compute"]) / seconds if rank["peaks"] else None
    bound = "≥" if found["sync_gap_is_lower_bound"] and found["sync_gap_ratio"] is not None else ""
    return {
        "phase": phase,
        "steps": str(found["steps"]),
        "p50 ms": _milliseconds(step.get("p50")),
        "p99 ms": _milliseconds(step.get("p99")),
        "floor ms": _milliseconds(found.get("floor_step_seconds")),
        "at floor": _percent(floor),
        "sync gap": bound + _percent(found["sync_gap_ratio"]),
        "MBU": _percent(found.get("mbu_step")),
        "MFU": _percent(found.get("mfu_step")),
    }


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.2f}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio * 100:.1f} %"
