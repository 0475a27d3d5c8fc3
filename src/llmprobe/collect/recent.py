"""The last 30 s of cumulative histograms and counters, from differences between snapshots."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from llmprobe.collect.views import HistogramView
from llmprobe.compute import histogram
from llmprobe.record import layout

_BOUNDS = layout.bucket_bounds_seconds()
#: Counters of a front end that `Recent.counts` follows.
COUNTS = ("requests", "preemptions", "prompt_tokens", "generated_tokens")
_QUEUED, _QUEUE_NS = "first_tokens_queued", "sum_ns_first_token_queue"
_FOLLOWED = (*COUNTS, _QUEUED, _QUEUE_NS)


class Recent:
    """What happened in the last ``window_ns``.

    Attributes:
        latency: name → p50, p99, mean (seconds) and count.
        counts: by `COUNTS`, and ``seconds``: how long the time is that they are of.
        queue_seconds: how long requests were queued that had their first token, mean; None if none told.
        starved_seconds: for how long requests that had no token yet have been waiting at each look, and none
            had its first one.
    """

    def __init__(self, window_ns: int = 30 * 10**9) -> None:
        self._window_ns = window_ns
        self._snapshots: deque[tuple[int, dict[str, int], dict[str, HistogramView]]] = deque()
        self.latency: dict[str, dict[str, float]] = {}
        self.counts: dict[str, float] = {}
        self.queue_seconds: float | None = None
        self.starved_seconds = 0.0
        self._starved_ns: int | None = None
        self._first_tokens = 0

    def update(
        self,
        now_ns: int,
        counters: Mapping[str, int],
        latency: Mapping[str, HistogramView],
        began_now: bool = False,
        waiting: int = 0,
    ) -> None:
        """Take in the totals as they are now, and how many requests are ``waiting`` that had no token yet.

        The first totals are the past of a process found late, and not recent, unless it ``began_now``.
        """
        counts = {name: int(counters.get(name, 0)) for name in _FOLLOWED}
        if not self._snapshots and began_now:
            nothing = {name: HistogramView(np.zeros_like(view.counts), 0.0) for name, view in latency.items()}
            self._snapshots.append((now_ns, dict.fromkeys(_FOLLOWED, 0), nothing))
        self._snapshots.append((now_ns, counts, dict(latency)))
        while len(self._snapshots) > 2 and self._snapshots[1][0] <= now_ns - self._window_ns:
            self._snapshots.popleft()
        since, base_counts, base = self._snapshots[0]
        lately = {name: max(value - base_counts[name], 0) for name, value in counts.items()}
        self.counts = {name: lately[name] for name in COUNTS}
        self.counts["seconds"] = (now_ns - since) / 1e9
        self.queue_seconds = lately[_QUEUE_NS] / 1e9 / lately[_QUEUED] if lately[_QUEUED] else None
        self.latency = {
            name: seen for name, view in latency.items() if (seen := _since(view, base[name])) is not None
        }
        self._starve(now_ns, waiting, latency)

    def _starve(self, now_ns: int, waiting: int, latency: Mapping[str, HistogramView]) -> None:
        told = latency.get("time_to_first_token")
        first_tokens = told.count if told is not None else 0
        if not waiting:
            self._starved_ns = None
        elif self._starved_ns is None or first_tokens != self._first_tokens:
            self._starved_ns = now_ns
        self._first_tokens = first_tokens
        self.starved_seconds = (now_ns - self._starved_ns) / 1e9 if self._starved_ns is not None else 0.0


def _since(view: HistogramView, base: HistogramView) -> dict[str, float] | None:
    delta = np.where(view.counts > base.counts, view.counts - base.counts, 0)
    total = int(delta.sum())
    p50, p99 = (histogram.quantile(delta, _BOUNDS, q) for q in (0.5, 0.99))
    if not total or p50 is None or p99 is None:
        return None
    return {"p50": p50, "p99": p99, "mean": max(view.sum - base.sum, 0.0) / total, "count": total}
