"""Scenarios that ran: saved one a line as they end, and their table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprobe.export.summary import plain
from support.labels import Label
from support.watching import RIGHT_SECONDS, SURE, Score, Trace, as_json

HEADER = (
    "scenario",
    "label",
    "its rule",
    "holds",
    "verdict",
    "confidence",
    "headline",
    "right after",
    "flips",
    "",
)

#: What fits a terminal.
BRIEF = tuple(name for name in HEADER if name not in ("its rule", "headline"))

#: All that is known of a scenario that ran, or failed (``error``), JSON-ready.
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One scenario that ran. ``facts`` are what its label was told from, a dataclass."""

    name: str
    facts: Any
    label: Label
    score: Score
    trace: Trace

    @property
    def settled(self) -> bool:
        """Whether to go on would change nothing: the label does not hold, or the verdict is right."""
        return not self.label.holds or (self.score.right_after is not None and self.score.right_at_end)

    def as_run(self, machine: str) -> Run:
        """Every figure."""
        return {
            "name": self.name,
            "machine": machine,
            "facts": plain(asdict(self.facts)),
            "label": asdict(self.label),
            "score": plain(asdict(self.score)),
            "trace": plain(as_json(self.trace)),
        }


def append(path: Path | None, run: Run) -> None:
    """Add a line to a file of runs, so that what comes after cannot lose it."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(run) + "\n")


def read(paths: Iterable[Path]) -> list[Run]:
    """Runs that were saved; of those with one name the last. A last line that was cut off is left out."""
    found: dict[str, Run] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                run = json.loads(line)
            except ValueError:
                continue
            found.pop(run["name"], None)
            found[run["name"]] = run
    return list(found.values())


def table_rows(runs: Sequence[Run]) -> list[list[str]]:
    """By `HEADER`."""
    return [_row(run) for run in runs]


def brief(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """The same without what makes a row wider than a terminal: `BRIEF`."""
    return [[cell for name, cell in zip(HEADER, row, strict=True) if name in BRIEF] for row in rows]


def line(run: Run) -> str:
    """One run in a line, for whoever waits for the others."""
    name, truth, _, holds, verdict, confidence, _, after, flips, result = _row(run)
    if "error" in run:
        return f"{name}: {result}"
    return (
        f"{name}: label {truth} ({'holds' if holds == 'yes' else 'does not hold'}), verdict {verdict}, "
        f"confidence {confidence}, right after {after}, flips {flips}: {result}"
    )


def bars(seconds: float, steady: float | None = None) -> str:
    """What a scenario that ran for so long, or until it was steady for so long, has to hold."""
    each = f"{seconds:.0f} s that each ran"
    if steady is not None:
        each += f", or sooner if a verdict had not changed for {steady:.0f} s"
    return (
        f"Bars: right within {RIGHT_SECONDS:.0f} s of a steady load, no flip until the end of the {each}, no "
        f"third class, and after {RIGHT_SECONDS:.0f} s none that is wrong above confidence {SURE:g}."
    )


def status(runs: Sequence[Run]) -> int:
    """An exit status: 1 if a verdict is wrong, late or wavers, or a run failed; 2 if a label did not hold."""
    if any("error" in run or (run["label"]["holds"] and run["score"]["faults"]) for run in runs):
        return 1
    return 0 if all(run["label"]["holds"] for run in runs) else 2


def _row(run: Run) -> list[str]:
    if "error" in run:
        first = run["error"].partition("\n")[0]
        return [run["name"], *[""] * (len(HEADER) - 2), f"failed: {first}"]
    label, found = run["label"], run["score"]
    truth = " or ".join(label["classes"]) + (f": {label['cause']}" if label["cause"] else "")
    truth = truth or f"“{label['headline']} …”"
    truth += f", showing {' or '.join(label['evidence'])}" if label["evidence"] else ""
    truth += f", advice {label['advice']}" if label["advice"] else ""
    said = str(found["last"].get("bottleneck", "none"))
    cause = found["last"].get("cause")
    result = "; ".join(found["faults"]) if found["faults"] else "right"
    after = "never" if found["right_after"] is None else f"{found['right_after']:.0f} s"
    return [
        run["name"],
        truth,
        label["rule"],
        "yes" if label["holds"] else "no",
        f"{said}: {cause}" if cause else said,
        f"{found['last'].get('confidence') or 0:.2f}",
        found["headline"],
        after,
        f"{found['flips']} in {found['steady_seconds']:.0f} s",
        result if label["holds"] else "not scored",
    ]
