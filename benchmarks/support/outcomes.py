"""Scenarios that ran: their table, and all that was seen of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from support.labels import Label
from support.watching import RIGHT_SECONDS, SURE, Score, Trace, as_json

HEADER = ("scenario", "label", "its rule", "verdict", "confidence", "headline", "right after", "flips", "")


@dataclass(frozen=True)
class Outcome:
    """One scenario that ran. ``facts`` are what its label was told from, a dataclass."""

    name: str
    facts: Any
    label: Label
    score: Score
    trace: Trace


def table_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """By `HEADER`."""
    return [_row(outcome) for outcome in outcomes]


def bars(seconds: float) -> str:
    """What a scenario that ran for so long has to hold."""
    return (
        f"Bars: right within {RIGHT_SECONDS:.0f} s of the first request, no flip until the end of the "
        f"{seconds:.0f} s that each ran, no third class, and after {RIGHT_SECONDS:.0f} s none that is wrong "
        f"above confidence {SURE:g}."
    )


def json_of(outcomes: Sequence[Outcome], machine: str) -> dict[str, Any]:
    """Every figure, JSON-ready."""
    return {"machine": machine, "runs": [_json(outcome) for outcome in outcomes]}


def status(outcomes: Sequence[Outcome]) -> int:
    """An exit status: 1 if a verdict is wrong, late or wavers, 2 if a label did not hold, else 0."""
    if any(outcome.label.holds and outcome.score.faults for outcome in outcomes):
        return 1
    return 0 if all(outcome.label.holds for outcome in outcomes) else 2


def _row(outcome: Outcome) -> list[str]:
    label, found = outcome.label, outcome.score
    truth = " or ".join(label.classes) + (f": {label.cause}" if label.cause else "")
    truth = truth or f"“{label.headline} …”"
    said = str(found.last.get("bottleneck", "none"))
    cause = found.last.get("cause")
    result = "; ".join(found.faults) if found.faults else "right"
    after = "never" if found.right_after is None else f"{found.right_after:.0f} s"
    return [
        outcome.name,
        truth,
        label.rule,
        f"{said}: {cause}" if cause else said,
        f"{found.last.get('confidence') or 0:.2f}",
        found.headline,
        after,
        str(found.flips),
        result if label.holds else "label does not hold",
    ]


def _json(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "facts": asdict(outcome.facts),
        "label": asdict(outcome.label),
        "score": asdict(outcome.score),
        "trace": as_json(outcome.trace),
    }
