"""The totals of front ends over agents that come and go."""

from __future__ import annotations

import json

import numpy as np

from llmprobe.collect.front_ends import LATENCIES, FrontTotals
from llmprobe.collect.views import HistogramView
from llmprobe.record import layout


def test_what_an_older_agent_did_not_count_begins_at_nothing() -> None:
    counts = np.zeros(layout.BUCKETS, dtype=np.uint64)
    counts[7] = 3
    saved = FrontTotals({"requests": 3}, {"request_queue": HistogramView(counts, 0.5)}).save()
    left = FrontTotals.restore(json.loads(json.dumps(saved)))
    known = FrontTotals.of([], left)
    assert (known.counters["requests"], known.counters["sum_ns_output_lag"]) == (3, 0)
    assert {name: view.count for name, view in known.latency.items()} == {
        **dict.fromkeys(LATENCIES, 0),
        "request_queue": 3,
    }
