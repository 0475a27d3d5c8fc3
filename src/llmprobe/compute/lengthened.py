"""By how much looking at steps made them longer: those that were looked at, beside the ones right before."""

from __future__ import annotations

import numpy as np

from llmprobe.compute.steps import PHASES, RESTARTED

#: So many steps at least say how long steps are ...
LEAST_STEPS = 8
#: ... and those of two stretches are alike where their median numbers of tokens are, to within this ratio.
_SAME_TOKENS = 1.1


def alike(inside: np.ndarray, before: np.ndarray, least_inside: int = LEAST_STEPS) -> bool:
    """Whether steps of one phase may be held against earlier ones: enough of both, with as many tokens."""
    if len(before) < LEAST_STEPS or len(inside) < least_inside:
        return False
    tokens = [
        float(np.median(rows["prompt_tokens"].astype(np.int64) + rows["decode_tokens"]))
        for rows in (inside, before)
    ]
    return max(tokens) <= min(tokens) * _SAME_TOKENS


def lengthened_ratios(inside: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """The share of the time of steps by which they are longer than like ones before them.

    A step's time is that from the end of the step before to its own end, so waits between steps are in
    it. But steps that waited for longer than they took are left out: most likely there was nothing to do.

    Args:
        inside: step records of one process, in the journal's order.
        before: those of the time right before.

    Returns:
        By phase label, 0 where they are no longer; phases that cannot be compared are absent.
    """
    found = {}
    for index, label in enumerate(PHASES):
        mine, earlier = inside[inside["phase"] == index], before[before["phase"] == index]
        if not alike(mine, earlier):
            continue
        now, then = _median_time(inside, index), _median_time(before, index)
        if now and then:
            found[label] = max(1 - then / now, 0.0)
    return found


def _median_time(steps: np.ndarray, phase: int) -> float | None:
    """Nanoseconds; of steps whose predecessor is known, and that followed it."""
    number, begin, end = (steps[name].astype(np.int64) for name in ("step", "e0", "e3"))
    known = (np.diff(number) == 1) & (steps["flags"][1:] & RESTARTED == 0) & (steps["phase"][1:] == phase)
    known &= begin[1:] - end[:-1] <= (end - begin)[1:]
    return float(np.median(np.diff(end)[known])) if int(known.sum()) >= LEAST_STEPS else None
