"""Iterations of an engine in which requests went on generating and nothing else: noted, counted together.

A front end's event loop comes by at each of them with cold caches; counted together and off that loop, they
take a small part of the time.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from llmprobe.record.recorder import Recorder

_now = time.monotonic_ns
_AT_MOST = 512  # only noted, should nobody come to count them


class PlainIterations:
    """Those of one front end. `note` is for its event loop, `write` for any thread."""

    def __init__(self) -> None:
        #: Recorder, tokens, the gaps before them, and what noting it took (ns).
        self._noted: deque[tuple[Recorder, int, list[float], int]] = deque()

    def note(self, recorder: Recorder, iteration: Any, entered: int) -> bool:
        """Whether it was a plain one (``IterationStats``); then it will be counted, its requests' ends apart.

        Args:
            entered: when llmprobe's hook was.
        """
        if (
            iteration.time_to_first_tokens_iter
            or iteration.finished_requests
            or iteration.num_prompt_tokens
            or iteration.num_preempted_reqs
            or len(self._noted) >= _AT_MOST
        ):
            return False
        gaps = token_gaps(iteration)
        if not gaps:
            return False
        # vLLM makes the list anew for each iteration.
        self._noted.append((recorder, iteration.num_generation_tokens, gaps, _now() - entered))
        return True

    def write(self) -> None:
        """Count what was noted."""
        sums: dict[Recorder, tuple[list[int], dict[int, int]]] = {}
        while self._noted:
            try:
                recorder, tokens, gaps, own_ns = self._noted.popleft()
            except IndexError:  # another thread took the last one
                break
            counts, gaps_ns = sums.setdefault(recorder, ([0, 0], {}))
            counts[0] += tokens
            counts[1] += own_ns
            add_gaps(gaps_ns, gaps)
        for recorder, ((tokens, own_ns), gaps_ns) in sums.items():
            recorder.tokens(0, tokens, inter_token_ns=gaps_ns, own_ns=own_ns, later=True)


def token_gaps(iteration: Any) -> list[float]:
    """Seconds before each token of an iteration that is not a first one."""
    try:
        gaps: list[float] = iteration.inter_token_latencies_iter
    except AttributeError:  # 0.11
        gaps = iteration.time_per_output_tokens_iter
    return gaps


def add_gaps(gaps_ns: dict[int, int], gaps: list[float]) -> None:
    """Count gaps, by nanoseconds. The tokens of a step share theirs: few values, however large the batch."""
    for seconds in gaps:
        gap = round(seconds * 1e9)
        gaps_ns[gap] = gaps_ns.get(gap, 0) + 1
