"""CPU time of a server's processes that are no rank's: front ends, and engine cores without their workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FRONT_END, ENGINE_CORE = "frontend", "engine_core"
_MOST_PROCESSES = 32  # of one server; of more, those that ended first are one


class Used(NamedTuple):
    """What one process used so far."""

    kind: str  # `FRONT_END` or `ENGINE_CORE`
    seconds: float


class HostCpu:
    """Sums that do not fall when one of the processes ends, or the agent starts anew. Not thread-safe."""

    def __init__(self) -> None:
        self._used: dict[str, dict[str, Used]] = {}  # view → process → what it used, by when it was seen last
        self._ended: dict[str, dict[str, float]] = {}  # view → kind → seconds of those that were one too many

    def update(self, key: str, used: Mapping[str, Used], ranks: Iterable[str]) -> dict[str, float]:
        """The sums of one view, by kind; empty where nothing was ever known.

        Args:
            key: of the view.
            used: by process, as `llmprobe.collect.host.HostWatch.identity` names it.
            ranks: processes that are a rank's too, whose CPU time is told there.
        """
        of = self._used.setdefault(key, {})
        for process, now in used.items():
            before = of.pop(process, now)
            of[process] = Used(now.kind, max(now.seconds, before.seconds))
        for process in ranks:
            of.pop(process, None)
        sums = self._ended.setdefault(key, {})
        # Never one that was just seen: it would be counted anew, and be one too many again.
        while len(of) > max(_MOST_PROCESSES, len(used)):
            left = of.pop(next(iter(of)))
            sums[left.kind] = sums.get(left.kind, 0.0) + left.seconds
        totals = dict(sums)
        for kind, seconds in of.values():
            totals[kind] = totals.get(kind, 0.0) + seconds
        return totals

    def keep(self, living: set[str]) -> None:
        """Forget the views that are gone."""
        self._used = {key: used for key, used in self._used.items() if key in living}
        self._ended = {key: ended for key, ended in self._ended.items() if key in living}

    def save(self) -> dict[str, Any]:
        """As JSON."""
        return {"used": self._used, "ended": self._ended}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """From `save`."""
        self._used = {
            key: {process: Used(str(kind), float(seconds)) for process, (kind, seconds) in of.items()}
            for key, of in saved.get("used", {}).items()
        }
        self._ended = {key: dict(ended) for key, ended in saved.get("ended", {}).items()}
