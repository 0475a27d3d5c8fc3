"""Quantiles and coarser buckets of the fine latency histograms in a journal."""

from __future__ import annotations

import numpy as np

from llmprobe.compute.steps import Ints


def quantile(counts: np.ndarray, upper_bounds: np.ndarray, q: float) -> float | None:
    """The ``q``-quantile in the unit of ``upper_bounds``.

    Interpolated by logarithm within its bucket, in the first (which begins at 0) linearly. What lies in a
    last, unbounded bucket is known only to be above its lower bound, which is then returned.

    Args:
        counts: (B,) how many in each bucket.
        upper_bounds: (B,) ascending, above 0; the last may be infinite.
        q: 0 to 1.

    Returns:
        None for an empty histogram.

    Raises:
        ValueError: ``q`` is not in 0 to 1.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"quantile {q!r}: 0 to 1 is allowed")
    running = np.cumsum(counts, dtype=np.float64)
    total = running[-1] if len(running) else 0
    if total == 0:
        return None
    rank = max(q * float(total), 1e-300)  # never an empty bucket before the first value
    bucket = min(int(np.searchsorted(running, rank)), int(np.flatnonzero(counts)[-1]))
    inside = float(running[bucket] - counts[bucket])
    share = min((rank - inside) / float(counts[bucket]), 1.0)
    high = float(upper_bounds[bucket])
    if bucket == 0:
        return share * high if np.isfinite(high) else None
    low = float(upper_bounds[bucket - 1])
    if not np.isfinite(high):
        return low
    return float(low * (high / low) ** share)


def rebucket(counts: np.ndarray, fine_bounds: np.ndarray, coarse_bounds: np.ndarray) -> Ints:
    """Cumulative counts for coarser buckets, as Prometheus wants them.

    A fine bucket goes to the first coarse bound that is not below its upper bound, so no value is ever
    counted under a bound it exceeds.

    Args:
        counts: (B,) how many in each fine bucket.
        fine_bounds: (B,) their upper bounds.
        coarse_bounds: (C,) ascending; end it with infinity to count everything.

    Returns:
        (C,) how many at most each coarse bound.
    """
    running = np.concatenate(([0], np.cumsum(np.asarray(counts).astype(np.int64))))
    return np.asarray(running[np.searchsorted(fine_bounds, coarse_bounds, side="right")])
