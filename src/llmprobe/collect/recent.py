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


class Recent:
    """What happened in the last ``window_ns``.

    Attributes:
        latency: name → p50, p99, mean (seconds) and count.
        counts: by `COUNTS`, and ``seconds``: how long the time is that they are of.
    """

    def __init__(self, window_ns: int = 30 * 10**9) -> None:
        self._window_ns = window_ns
        self._snapshots: deque[tuple[int, dict[str, int], dict[str, HistogramView]]] = deque()
        self.latency: dict[str, dict[str, float]] = {}
        self.counts: dict[str, float] = {}

    def update(
        self,
        now_ns: int,
        counters: Mapping[str, int],
        latency: Mapping[str, HistogramView],
        began_now: bool = False,
    ) -> None:
        """Take in the totals as they are now.

        The first totals are the past of a process found late, and not recent, unless it ``began_now``.
        """
        counts = {name: int(counters.get(name, 0)) for name in COUNTS}
        if not self._snapshots and began_now:
            nothing = {name: HistogramView(np.zeros_like(view.counts), 0.0) for name, view in latency.items()}
            self._snapshots.append((now_ns, dict.fromkeys(COUNTS, 0), nothing))
        self._snapshots.append((now_ns, counts, dict(latency)))
        while len(self._snapshots) > 2 and self._snapshots[1][0] <= now_ns - self._window_ns:
            self._snapshots.popleft()
        since, base_counts, base = self._snapshots[0]
        self.counts = {name: max(value - base_counts[name], 0) for name, value in counts.items()}
        self.counts["seconds"] = (now_ns - since) / 1e9
        self.latency = {
            name: seen for name, view in latency.items() if (seen := _since(view, base[name])) is not None
        }


def _since(view: HistogramView, base: HistogramView) -> dict[str, float] | None:
    delta = np.where(view.counts > base.counts, view.counts - base.counts, 0)
    total = int(delta.sum())
    p50, p99 = (histogram.quantile(delta, _BOUNDS, q) for q in (0.5, 0.99))
    if not total or p50 is None or p99 is None:
        return None
    return {"p50": p50, "p99": p99, "mean": max(view.sum - base.sum, 0.0) / total, "count": total}
