"""One verdict for a server from those on its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmprobe.compute.verdict import IDLE, UNKNOWN, Verdict


def combine(verdicts: Sequence[tuple[float, Verdict]]) -> Verdict:
    """What most of the ranks' time says, surer the more of them agree.

    Ranks count by the time that the phase took on them; idle ones have no say unless all are idle. The class
    is the one that most time stands behind, its cause likewise among the ranks of that class; the verdict is
    that of the surest rank of both, its confidence multiplied by the share of time behind both.

    Args:
        verdicts: seconds of the phase on each rank, and the rank's verdict; at least one.
    """
    busy = [(seconds, verdict) for seconds, verdict in verdicts if verdict.bottleneck != IDLE]
    if not busy:
        return max(verdicts, key=lambda item: item[0])[1]
    behind: dict[str, float] = {}
    for seconds, verdict in busy:
        behind[verdict.bottleneck] = behind.get(verdict.bottleneck, 0.0) + seconds
    winner = max(behind, key=lambda name: behind[name])
    causes: dict[str | None, float] = {}
    for seconds, verdict in busy:
        if verdict.bottleneck == winner:
            causes[verdict.cause] = causes.get(verdict.cause, 0.0) + seconds
    cause = max(causes, key=lambda name: causes[name])
    total = sum(behind.values())
    share = causes[cause] / total if total > 0 else 1.0
    alike = [v for _, v in busy if (v.bottleneck, v.cause) == (winner, cause)]
    surest = max(alike, key=lambda verdict: verdict.confidence)
    if share >= 1 or winner == UNKNOWN:
        return surest
    rest = {_named(v) for seconds, v in busy if seconds > 0 and (v.bottleneck, v.cause) != (winner, cause)}
    others = ", ".join(sorted(rest))
    reason = f"{surest.reason}; {share:.0%} of the ranks' time agrees, the rest is {others}"
    return replace(surest, confidence=surest.confidence * share, reason=reason)


def _named(verdict: Verdict) -> str:
    return f"{verdict.bottleneck} ({verdict.cause})" if verdict.cause else verdict.bottleneck
