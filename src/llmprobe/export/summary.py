"""Views as JSON: what ``/api/status`` and ``llmprobe status --json`` show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from llmprobe.collect.views import EngineView, HistogramView, RankView, ServerView

SCHEMA_VERSION = 1

# Shown elsewhere: histograms on /metrics, single steps at /api/steps, what is missing of the server.
_LEFT_OUT = {
    "latency",
    "step_duration",
    "recent",
    "engines",
    "ranks",
    "thresholds",
    "journal",
    "journals",
    "one_graph",
    "no_model",
    "no_peaks",
    "work_seconds",
}


def summarize(views: Iterable[ServerView]) -> dict[str, Any]:
    """Every server's figures, JSON-ready. Keys are the fields of `llmprobe.collect.views`.

    A field that is null, or a missing key, is not known; ``missing`` says why. Units are in the names.
    """
    return {"schema_version": SCHEMA_VERSION, "servers": [_server(view) for view in views]}


def _server(view: ServerView) -> dict[str, Any]:
    return {
        **_fields(view),
        "engines": [_engine(engine) for engine in view.engines],
        "ranks": [_rank(rank) for rank in view.ranks],
    }


def _engine(engine: EngineView) -> dict[str, Any]:
    counts = {name: histogram.count for name, histogram in engine.latency.items()}
    return {**_fields(engine), "latency_counts": counts}


def _rank(rank: RankView) -> dict[str, Any]:
    fields = _fields(rank)
    if rank.peaks is not None:
        fields["peaks"]["ridge_flops_per_byte"] = plain(rank.peaks.ridge_flops_per_byte)
    return fields


def _fields(view: ServerView | EngineView | RankView) -> dict[str, Any]:
    return {
        field.name: plain(getattr(view, field.name))
        for field in dataclasses.fields(view)
        if field.name not in _LEFT_OUT
    }


def plain(value: Any) -> Any:
    """``value`` with nothing in it that JSON lacks: NaN and infinity become null, arrays lists."""
    if isinstance(value, HistogramView):
        return {"count": value.count, "sum_seconds": value.sum}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)
