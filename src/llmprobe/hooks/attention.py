"""What causal attention over a cache sees: shared by the hooks of every framework."""

from __future__ import annotations


def visible_attention(before: int, query: int, window: int | None) -> tuple[int, int]:
    """Keys that ``query`` tokens see behind ``before`` cached ones, and their causal (query, key) pairs.

    Args:
        window: how many keys one query sees at most, itself included; None for all.
    """
    if window is None or before + query <= window:
        return before + query, query * before + query * (query + 1) // 2
    growing = max(min(window - before, query), 0)  # queries that still see everything before them
    pairs = growing * before + growing * (growing + 1) // 2 + (query - growing) * window
    return min(before + query, window + query - 1), pairs
