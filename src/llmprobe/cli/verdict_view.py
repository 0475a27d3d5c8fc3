"""A server's verdict in the terminal: the headline, a line a phase, what presses, what to do."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmprobe.cli.evidence_view import deciding, evidence_table
from llmprobe.export.report import advice_lines

_STYLES = {
    "idle": "dim",
    "unknown": "yellow",
    "sync_bound": "red",
    "inefficient_kernels": "red",
    "memory_bound": "cyan",
    "compute_bound": "cyan",
    "balanced": "green",
}


def verdict_view(
    server: dict[str, Any], most_advice: int = 1, *, named: bool = False, evidence: bool = False
) -> RenderableType:
    """One entry of ``/api/status``, headline first.

    Args:
        server: the entry.
        most_advice: findings shown for each phase or kind of pressure.
        named: with the server's name before the headline, where there are others.
        evidence: all of it, instead of what decided.
    """
    name = f"{server['server']}: " if named else ""
    parts: list[RenderableType] = [Text(name + (server["headline"] or "No verdict yet."), style="bold")]
    if server["verdicts"]:
        parts.append(Padding(_table(server["verdicts"]), (0, 0, 0, 2)))
    parts += [
        Text(f"  {phase}: {verdict['reason']}")
        for phase, verdict in server["verdicts"].items()
        if verdict["bottleneck"] != "idle" and verdict["reason"] not in server["headline"]
    ]
    for phase, verdict in server["verdicts"].items():
        if evidence and verdict["evidence"]:
            parts.append(Text(f"  evidence on {phase}:"))
            parts.append(Padding(evidence_table(verdict), (0, 0, 0, 4)))
        elif decided := deciding(verdict):
            parts.append(Text(f"  {phase}, decided by: {decided}"))
    pressing = [item["text"] for item in server["pressure"].values() if item["active"]]
    if pressing:
        parts.append(Text(f"  under pressure: {'; '.join(pressing)}", style="yellow"))
    busy = {about: found for about, found in server["advice"].items() if not _idle(server, about)}
    parts += [Text(f"  {line}") for line in advice_lines(busy, most_advice)]
    return Group(*parts)


def _idle(server: dict[str, Any], about: str) -> bool:
    verdict = server["verdicts"].get(about)
    return verdict is not None and verdict["bottleneck"] == "idle"


def _table(verdicts: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("phase", "bound by", "sure", "for", "load", "headroom", "through"):
        table.add_column(name, justify="left" if name in ("phase", "bound by", "through") else "right")
    for phase, verdict in verdicts.items():
        bottleneck, cause = verdict["bottleneck"], verdict["cause"]
        headroom = verdict["headroom_seconds"]
        table.add_row(
            phase,
            Text(bottleneck + (f": {cause}" if cause else ""), style=_STYLES.get(bottleneck, "")),
            f"{verdict['confidence']:.2f}" if bottleneck not in ("idle", "unknown") else "–",
            f"{verdict['held_seconds']:.0f} s",
            f"{verdict['share_ratio']:.0%}",
            "–" if headroom is None else f"{headroom * 1e3:.2f} ms",
            Text(verdict["bound_by_operator"] or "–"),
        )
    return table
