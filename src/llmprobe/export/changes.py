"""What changed between two looks at the servers: the events that people and programs are told of.

A look is cheap and comes about once a second. What stands between two looks is plain JSON, so that an agent
that starts anew neither repeats what was told before it nor misses what happened while there was none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmprobe.collect.views import RankView, ServerView
from llmprobe.compute.headline import stalled
from llmprobe.compute.verdict import IDLE, UNKNOWN
from llmprobe.export.summary import plain

#: Every kind of event that a look can find.
KINDS = (
    "engine_came",
    "engine_went",
    "verdict",
    "pressure_begun",
    "pressure_ended",
    "stall_begun",
    "stall_ended",
)
#: ``idle`` and ``unknown`` come and go around every change of load: told once they have stood this long.
SETTLED_SECONDS = 10.0
#: Pressure that comes and goes is one pressure: it has ended once it was not seen for this long.
QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class Change:
    """One thing that changed. ``data`` is JSON-ready."""

    kind: str
    server: str
    data: dict[str, Any]


class Changes:
    """Compares the servers with what was told of them last. Not thread-safe."""

    def __init__(self) -> None:
        self._standing: dict[str, dict[str, Any]] = {}  # server → what was told of it

    def look(self, views: Iterable[ServerView], now: float) -> list[Change]:
        """What changed since the last look.

        Args:
            views: every server that lives.
            now: Unix seconds.
        """
        found: list[Change] = []
        current = {view.server: view for view in views}
        for server, standing in list(self._standing.items()):
            if server not in current:
                found += _all_ended(server, standing, now)
                del self._standing[server]
        for server, view in current.items():
            standing = self._standing.setdefault(server, {part: {} for part in _SOUND})
            found += _engines(view, standing, now)
            if view.armed and not view.inert:
                found += _verdicts(view, standing["verdicts"])
                found += _pressure(view, standing["pressure"], now)
            found += _stalls(view, standing["stalls"], now)
        return found

    def save(self) -> dict[str, Any]:
        """What stands, as JSON; good until the next look."""
        return self._standing

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from `save`; a part that is missing is empty.

        Raises:
            ValueError: it is of another shape. Then nothing stands.
        """
        self._standing = {}
        if not isinstance(saved, Mapping):
            raise ValueError("what stood is no object")
        standing: dict[str, dict[str, Any]] = {}
        for server, parts in saved.items():
            if not isinstance(parts, Mapping):
                raise ValueError(f"what stood of {server!r} is no object")
            standing[server] = {}
            for part, is_sound in _SOUND.items():
                known = parts.get(part, {})
                if not isinstance(known, Mapping) or not all(is_sound(*item) for item in known.items()):
                    raise ValueError(f"{part} of {server!r} are of another shape")
                standing[server][part] = dict(known)
        self._standing = standing


def _is_engine(name: str, journals: Any) -> bool:
    return (
        name.isascii()
        and name.isdigit()
        and isinstance(journals, list)
        and all(isinstance(journal, str) for journal in journals)
    )


def _is_verdict(phase: str, told: Any) -> bool:
    return (
        isinstance(told, list)
        and len(told) == 2
        and all(word is None or isinstance(word, str) for word in told)
    )


def _is_pressure(kind: str, known: Any) -> bool:
    return isinstance(known, dict) and _whole(known, "engine") and _times(known, "since", "seen")


def _is_stall(at: str, known: Any) -> bool:
    return (
        isinstance(known, dict)
        and _whole(known, "engine", "rank", "step")
        and _times(known, "since")
        and isinstance(known.get("journal", ""), str)  # an agent before this one may not have kept it
    )


def _whole(known: dict[str, Any], *names: str) -> bool:
    return all(type(known.get(name)) is int for name in names)


def _times(known: dict[str, Any], *names: str) -> bool:
    """Unix seconds; not infinity, and nothing that a float cannot hold."""
    return all(type(known.get(name)) in (int, float) and abs(known[name]) < 2**53 for name in names)


#: What each part of a server holds, for telling whether it was saved by such as we are.
_SOUND: dict[str, Callable[[str, Any], bool]] = {
    "engines": _is_engine,
    "verdicts": _is_verdict,
    "pressure": _is_pressure,
    "stalls": _is_stall,
}


def _all_ended(server: str, standing: dict[str, Any], now: float) -> Iterator[Change]:
    """A server is gone, and with it all that stood."""
    yield from _ended_with(None, server, standing, now)
    for engine in standing["engines"]:
        yield Change("engine_went", server, {"engine": int(engine)})


def _ended_with(engine: int | None, server: str, standing: dict[str, Any], now: float) -> Iterator[Change]:
    """An engine (None: each) is gone, and with it what stood of it."""
    for at, stall in list(standing["stalls"].items()):
        if engine in (None, stall["engine"]):
            del standing["stalls"][at]
            yield Change("stall_ended", server, _stall_end(stall, now, "gone"))
    for kind, known in list(standing["pressure"].items()):
        if engine in (None, known["engine"]):
            del standing["pressure"][kind]
            yield Change("pressure_ended", server, _pressure_end(kind, known, now, "gone"))


def _engines(view: ServerView, standing: dict[str, Any], now: float) -> Iterator[Change]:
    """An engine is there while one of its workers is; it is known by their journals."""
    journals: dict[str, list[str]] = {}
    for rank in view.ranks:
        journals.setdefault(str(rank.engine), []).append(_journal(rank))
    known: dict[str, list[str]] = standing["engines"]
    gone = [engine for engine, old in known.items() if not set(old) & set(journals.get(engine, ()))]
    for engine in gone:
        del known[engine]
        yield from _ended_with(int(engine), view.server, standing, now)
        yield Change("engine_went", view.server, {"engine": int(engine)})
    if not known:
        standing["verdicts"].clear()  # they are the whole server's, of which nothing is left
    for engine in journals.keys() - known.keys():
        yield Change(
            "engine_came",
            view.server,
            {
                "engine": int(engine),
                "model_name": view.model_name,
                "framework": view.framework,
                "framework_version": view.framework_version,
            },
        )
    known.update(journals)


def _journal(rank: RankView) -> str:
    return rank.journal.name if rank.journal else ""


def _verdicts(view: ServerView, standing: dict[str, list[str | None]]) -> Iterator[Change]:
    for phase, verdict in view.verdicts.items():
        told, found = standing.get(phase), [verdict.bottleneck, verdict.cause]
        if found == told:
            continue
        if verdict.bottleneck in (IDLE, UNKNOWN) and verdict.held_seconds < SETTLED_SECONDS:
            continue
        standing[phase] = found
        yield Change(
            "verdict",
            view.server,
            {
                "phase": phase,
                "bottleneck": verdict.bottleneck,
                "cause": verdict.cause,
                "was": None if told is None else {"bottleneck": told[0], "cause": told[1]},
                "confidence": plain(verdict.confidence),
                "reason": verdict.reason,
                "headline": view.headline,
            },
        )


def _pressure(view: ServerView, standing: dict[str, dict[str, Any]], now: float) -> Iterator[Change]:
    for kind, pressure in view.pressure.items():
        if not pressure.active:
            continue
        if kind in standing:
            standing[kind]["seen"] = now
            continue
        standing[kind] = {"engine": pressure.engine, "since": now, "seen": now}
        yield Change(
            "pressure_begun",
            view.server,
            {
                "pressure": kind,
                "engine": pressure.engine,
                "quantity": pressure.quantity,
                "value": plain(pressure.value),
                "threshold": plain(pressure.threshold),
                "text": pressure.text,
            },
        )
    for kind in [kind for kind, known in standing.items() if now - known["seen"] >= QUIET_SECONDS]:
        yield Change("pressure_ended", view.server, _pressure_end(kind, standing.pop(kind), now, "eased"))


def _pressure_end(kind: str, known: dict[str, Any], now: float, outcome: str) -> dict[str, Any]:
    seconds = max((known["seen"] if outcome == "eased" else now) - known["since"], 0.0)
    return {"pressure": kind, "engine": known["engine"], "seconds": round(seconds, 3), "outcome": outcome}


def _stalls(view: ServerView, standing: dict[str, dict[str, Any]], now: float) -> Iterator[Change]:
    ranks = {f"{rank.engine}/{rank.rank}": rank for rank in view.ranks}
    for at, known in list(standing.items()):
        rank = ranks.get(at)
        if rank is not None and known.get("journal", _journal(rank)) != _journal(rank):
            rank = None  # another process has taken its place
        if rank is not None and rank.stall is not None and _of(rank)["step"] == known["step"]:
            continue
        outcome = "gone" if rank is None else "recovered" if rank.armed and not rank.inert else "not_watched"
        del standing[at]
        yield Change("stall_ended", view.server, _stall_end(known, now, outcome))
    for at, rank in ranks.items():
        if rank.stall is None or at in standing:
            continue
        standing[at] = {**_of(rank), "journal": _journal(rank), "since": now - rank.stall.seconds}
        yield Change("stall_begun", view.server, _stall_begin(view, rank))


def _of(rank: RankView) -> dict[str, Any]:
    """Which stall it is: of the same step it is the same one."""
    assert rank.stall is not None
    return {"engine": rank.engine, "rank": rank.rank, "step": rank.stall.step}


def _stall_begin(view: ServerView, rank: RankView) -> dict[str, Any]:
    stall = rank.stall
    assert stall is not None
    load = next((engine for engine in view.engines if engine.engine == rank.engine), None)
    return {
        **_of(rank),
        "where": stall.where,
        "phase": stall.phase,
        "tokens": stall.tokens,
        "seconds": plain(round(stall.seconds, 3)),
        "bound_seconds": plain(stall.bound.seconds),
        "bound_reason": stall.bound.reason,
        "last_steps": plain(stall.last_steps),
        "requests_running": None if load is None else load.requests_running,
        "requests_waiting": None if load is None else load.requests_waiting,
        "text": stalled(rank.rank, stall),
    }


def _stall_end(known: dict[str, Any], now: float, outcome: str) -> dict[str, Any]:
    seconds = round(max(now - known["since"], 0.0), 3)
    place = {name: known[name] for name in ("engine", "rank", "step")}
    return {**place, "seconds": seconds, "outcome": outcome}
