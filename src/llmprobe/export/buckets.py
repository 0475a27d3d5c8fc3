"""The latency buckets that Prometheus gets: preferred numbers, ten a decade where decode lives.

A step of 1.25 keeps an interpolated quantile within about a tenth of the truth. The journal's own
buckets are 1 % apart; quantiles in ``/api/status`` come from those.
"""

from __future__ import annotations

# Renard's preferred numbers: ten steps of about 1.25 to a decade, and the usual 1-2-5.
_TEN = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
_FIVE = (1.0, 1.6, 2.5, 4.0, 6.3)
_THREE = (1.0, 2.0, 5.0)


def _decades(series: tuple[float, ...], first: float, last: float) -> tuple[float, ...]:
    """The numbers of ``series`` in every decade from ``first`` to ``last`` (both included), in seconds."""
    numbers = (float(f"{number}e{exponent}") for exponent in range(-4, 5) for number in series)
    return tuple(number for number in numbers if first <= number <= last)


#: Steps and the time between tokens: milliseconds to a quarter second matter most.
TOKEN_SECONDS = _decades(_TEN, 0.001, 0.25) + _decades(_THREE, 0.5, 50)
#: Time to first token.
FIRST_TOKEN_SECONDS = _decades(_THREE, 0.001, 0.005) + _decades(_TEN, 0.01, 10) + _decades(_THREE, 20, 1000)
#: What outputs wait in a front end: next to nothing, or too long.
LAG_SECONDS = _decades((1.0, 3.0), 0.001, 10)
#: Whole requests and their time in the queue.
REQUEST_SECONDS = _decades(_FIVE, 0.001, 1000)
