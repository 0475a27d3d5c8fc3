"""The last 30 s of cumulative histograms and counters, from differences between snapshots."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llmprobe.collect.views import HistogramView
from llmprobe.compute import histogram
from llmprobe.record import layout

_BOUNDS = layout.bucket_bounds_seconds()
#: Counters of a front end that `Recent.counts` follows.
COUNTS = ("requests", "preemptions", "prompt_tokens", "generated_tokens")
_QUEUED, _QUEUE_NS = "first_tokens_queued", "sum_ns_first_token_queue"
_FOLLOWED = (*COUNTS, _QUEUED, _QUEUE_NS)
#: For how long one look at what waits speaks at most: looks are a second apart, unless the agent was held up.
_LOOK_NS = 5 * 10**9
#: A cache that fills is emptied by whoever it makes wait, so the last look alone would miss it.
_CACHE_NS = 10 * 10**9


class _Totals(NamedTuple):
    """Of one look."""

    time_ns: int
    counts: dict[str, int]
    latency: dict[str, HistogramView]
    waited_ns: int


class Recent:
    """What happened in the last ``window_ns``.

    Attributes:
        latency: name → p50, p99, mean (seconds) and count.
        counts: by `COUNTS`, and ``seconds``: how long the time is that they are of.
        queue_seconds: how long requests were queued that had their first token, mean; None if none told.
        starved_seconds: for how long requests that had no token yet have been waiting at each look, and none
            had its first one.
        backlog_seconds: how long a request waits for its first token by Little's law (J. D. C. Little, 1961):
            the mean number of those that wait ÷ the rate of first tokens. It counts those that still wait,
            which ``queue_seconds`` does only once they no longer do. None if there was no first token.
        kv_peak: highest use of the KV cache at looks of the last 10 s at which requests waited; None if
            none did.
    """

    def __init__(self, window_ns: int = 30 * 10**9) -> None:
        self._window_ns = window_ns
        self._snapshots: deque[_Totals] = deque()
        self.latency: dict[str, dict[str, float]] = {}
        self.counts: dict[str, float] = {}
        self.queue_seconds: float | None = None
        self.starved_seconds = 0.0
        self._starved_ns: int | None = None
        self._first_tokens = 0
        self.backlog_seconds: float | None = None
        self.kv_peak: float | None = None
        self._looked_ns: int | None = None
        self._waited_ns = 0  # requests that waited × time
        self._caches: deque[tuple[int, float]] = deque()  # (look, use of the cache while requests waited)

    def update(
        self,
        now_ns: int,
        counters: Mapping[str, int],
        latency: Mapping[str, HistogramView],
        began_now: bool = False,
        waiting: int = 0,
        kv_waited_for: float | None = None,
    ) -> None:
        """Take in the totals as they are now, and how many requests are ``waiting`` that had no token yet.

        ``kv_waited_for`` is the use of the KV cache while any request waits; None where none does.
        The first totals are the past of a process found late, and not recent, unless it ``began_now``.
        """
        counts = {name: int(counters.get(name, 0)) for name in _FOLLOWED}
        if not self._snapshots and began_now:
            nothing = {name: HistogramView(np.zeros_like(view.counts), 0.0) for name, view in latency.items()}
            self._snapshots.append(_Totals(now_ns, dict.fromkeys(_FOLLOWED, 0), nothing, 0))
        if self._looked_ns is not None:
            self._waited_ns += waiting * min(now_ns - self._looked_ns, _LOOK_NS)
        self._looked_ns = now_ns
        self._snapshots.append(_Totals(now_ns, counts, dict(latency), self._waited_ns))
        while len(self._snapshots) > 2 and self._snapshots[1].time_ns <= now_ns - self._window_ns:
            self._snapshots.popleft()
        base = self._snapshots[0]
        lately = {name: max(value - base.counts[name], 0) for name, value in counts.items()}
        self.counts = {name: lately[name] for name in COUNTS}
        self.counts["seconds"] = (now_ns - base.time_ns) / 1e9
        self.queue_seconds = lately[_QUEUE_NS] / 1e9 / lately[_QUEUED] if lately[_QUEUED] else None
        self.latency = {
            name: seen
            for name, view in latency.items()
            if (seen := _since(view, base.latency[name])) is not None
        }
        first = self.latency.get("time_to_first_token")
        self.backlog_seconds = (self._waited_ns - base.waited_ns) / 1e9 / first["count"] if first else None
        self._starve(now_ns, waiting, latency)
        if kv_waited_for is not None:
            self._caches.append((now_ns, kv_waited_for))
        while self._caches and self._caches[0][0] <= now_ns - _CACHE_NS:
            self._caches.popleft()
        self.kv_peak = max((usage for _, usage in self._caches), default=None)

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
