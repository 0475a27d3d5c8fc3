"""Captures of the same moment on several nodes, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_PHASES = ("prefill", "decode", "mixed")


def summary(report: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """What of a capture is worth holding against others'.

    Args:
        report: its ``report.json``.
        live: its ``live.json``.

    Returns:
        ``trust``; ``gpus``: each with ``name`` (None: phases of no GPU), ``busy_ratio``, ``idle_ratio`` and
        ``sync_gap_ratio`` by phase; ``bound_by``: the live verdict of each phase at the end of the recording.

    Raises:
        ValueError: they are not what an agent writes.
    """
    try:
        gaps: dict[str | None, dict[str, float]] = {}
        for phase in report["phases"]:
            if phase.get("part") is None and phase.get("sync_gap_ratio") is not None:
                gaps.setdefault(phase.get("gpu"), {})[str(phase["name"])] = _finite(phase["sync_gap_ratio"])
        gpus = [
            {
                "name": str(gpu["name"]),
                "busy_ratio": _finite(gpu["busy_ratio"]),
                "idle_ratio": _finite(gpu["idle_ratio"]),
                "sync_gap_ratio": gaps.pop(gpu["name"], {}),
            }
            for gpu in report["gpus"]
        ]
        gpus += [
            {"name": name, "busy_ratio": None, "idle_ratio": None, "sync_gap_ratio": found}
            for name, found in gaps.items()
        ]
        server = (live.get("during") or {}).get("server") or {}
        verdicts = server.get("verdicts") or {}
        bound_by = {str(phase): str(found["bottleneck"]) for phase, found in verdicts.items()}
        return {"trust": str(report["trust"]["verdict"]), "gpus": gpus, "bound_by": bound_by}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"not what an agent writes ({type(error).__name__}: {error})") from None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no ratio")
    return number


def side_by_side(found: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Table:
    """One line for each GPU of each node.

    Args:
        found: node and `summary`, None where there is none.
    """
    names = {phase for _, one in found if one for gpu in one["gpus"] for phase in gpu["sync_gap_ratio"]}
    phases = [phase for phase in _PHASES if phase in names] + sorted(names - set(_PHASES))
    table = Table(box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)  # cut, it would be no node's name, or two's
    table.add_column("GPU")
    for column in ("busy", "idle", *(f"gap {phase}" for phase in phases)):
        table.add_column(column, justify="right")
    for column in ("capture", "live: bound by"):
        table.add_column(column)
    for node, one in found:
        if one is None:
            table.add_row(node, *["–"] * (3 + len(phases)), "none", "–")
            continue
        bound = ", ".join(f"{phase} {what}" for phase, what in one["bound_by"].items()) or "–"
        nothing: dict[str, Any] = {"name": None, "busy_ratio": None, "idle_ratio": None, "sync_gap_ratio": {}}
        for gpu in one["gpus"] or [nothing]:
            ratios = [gpu["busy_ratio"], gpu["idle_ratio"], *map(gpu["sync_gap_ratio"].get, phases)]
            table.add_row(node, gpu["name"] or "–", *map(_percent, ratios), one["trust"], bound)
    return table


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"
