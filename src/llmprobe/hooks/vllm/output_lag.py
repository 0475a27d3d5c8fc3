"""How long the engine's outputs wait in a front end: from the engine core to their streams.

The engine core stamps the outputs of an iteration when it has made them with CLOCK_MONOTONIC, which processes
of one machine share. A front end that has no time left takes them late, and clients see tokens in bunches.
"""

from __future__ import annotations

#: An engine on another machine has a clock of its own: what is further off is no lag.
_MOST_NS = 600 * 10**9


def output_lag(made_seconds: float | None, now_ns: int) -> int | None:
    """Nanoseconds that outputs have waited which were detokenized and handed to their streams just now.

    Args:
        made_seconds: CLOCK_MONOTONIC when the engine core had them; 0 or None where it does not say.
        now_ns: the same clock now.

    Returns:
        None if it is not known.
    """
    if not made_seconds:
        return None
    lag = now_ns - round(made_seconds * 1e9)
    return lag if 0 <= lag <= _MOST_NS else None
