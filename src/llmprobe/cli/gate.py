"""``llmprobe gate``: fail a build when a run is worse than another by more than is allowed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer
from rich.table import Table

from llmprobe.cli import gate_runs
from llmprobe.cli.console import fail
from llmprobe.cli.gate_runs import Run, RunError
from llmprobe.cli.output import err, out, print_json
from llmprobe.compute.regression import Comparison, Limit, Outcome, compare

SCHEMA_VERSION = 1
REGRESSED = 3

EPILOG = """Examples:

llmprobe run --output base.json -- python generate.py

llmprobe gate base.json new.json --max-regression decode.tpot=5%

llmprobe gate base/ new/ --max-regression ttft.p99=10% --max-regression decode.sync_gap=0.02 --junit gate.xml

Exit status: 0 within the limits, 1 the command of a new run failed, 2 wrong usage, 3 a regression."""

_LIMIT = re.compile(r"^(\d+(?:\.\d+)?)\s*(%|us|ms|s|)$")
_SCALES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


def gate(
    base: Annotated[
        str, typer.Argument(help="A run.json, a directory of them, or several separated by commas.")
    ],
    new: Annotated[str, typer.Argument(help="Likewise: what is compared with it.")],
    max_regression: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=LIMIT",
            help="How much worse a metric may be: 5%, or in its own unit: 2ms for a time, 0.02 for a ratio. "
            "Repeatable.",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="The server that is meant, where a run has several.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail too where noise could explain what exceeds a limit.")
    ] = False,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Compare new runs too whose command failed.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Save the outcome as JUnit XML.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Compare run.json files; exit with 3 if a metric is worse by more than its limit.

    A new run whose command failed does not pass: what it measured is of a part of its work.
    Give each side several runs and the noise between them is known: then what exceeds a limit counts only if
    noise does not explain it. With one run a side every difference counts, and the noise is unknown.
    """
    try:
        sides = [[gate_runs.load(path, server) for path in gate_runs.files(side)] for side in (base, new)]
        compared = _compare(sides[0], sides[1], _limits(max_regression or [], sides[0]))
    except RunError as error:
        fail(str(error), code=2)
    warnings = list(gate_runs.differences(*sides))
    failing = {Outcome.REGRESSION, Outcome.INCONCLUSIVE} if strict else {Outcome.REGRESSION}
    failed = [metric for metric, found in compared.items() if found.outcome in failing]
    broken = [] if allow_failed else [run for run in sides[1] if run.exit_code]
    if junit is not None:
        _save(junit, _junit(compared, failing, warnings, broken))
    if json:
        print_json(_document(compared, not failed and not broken, warnings, sides, broken))
    else:
        _print(compared, warnings)
    for run in broken:
        err.print(f"llmprobe: {_broken(run)}; --allow-failed compares it all the same", soft_wrap=True)
    if failed:
        err.print(f"llmprobe: worse than allowed: {', '.join(failed)}", soft_wrap=True)
        raise typer.Exit(REGRESSED)
    if broken:
        raise typer.Exit(1)


def _broken(run: Run) -> str:
    return f"the command of {run.path} failed with exit status {run.exit_code}"


def _limits(given: list[str], base: list[Run]) -> dict[str, Limit]:
    if not given:
        names = ", ".join(gate_runs.known(base[0]))
        raise RunError(f"nothing to check: give --max-regression METRIC=LIMIT; {base[0].path} has: {names}")
    limits: dict[str, Limit] = {}
    for text in given:
        metric, _, amount = text.partition("=")
        found = _LIMIT.match(amount.strip())
        if not metric.strip() or found is None:
            raise RunError(
                f"--max-regression {text!r} is not METRIC=LIMIT, such as decode.tpot=5% or decode.tpot=2ms"
            )
        number, suffix = float(found[1]), found[2]
        metric = metric.strip()
        if metric in limits:
            raise RunError(f"--max-regression names {metric} twice")
        if suffix == "%":
            limits[metric] = Limit(number / 100, relative=True)
        elif not suffix and gate_runs.unit(metric) == "s" and gate_runs.has(base[0], metric):
            amount = amount.strip()
            raise RunError(
                f"--max-regression {text!r}: {metric} is a time, and {amount} has no unit; "
                f"give {amount}%, {amount}ms, {amount}us or {amount}s"
            )
        elif not suffix and number >= 1 and not gate_runs.unit(metric):
            raise RunError(
                f"--max-regression {text!r}: {metric} is a ratio, and {number:g} would allow anything; "
                f"give {number:g}%, or a number below 1 such as 0.02"
            )
        elif suffix and gate_runs.unit(metric) != "s":
            raise RunError(f"--max-regression {text!r}: {metric} is not a time; give 5% or a plain number")
        else:
            limits[metric] = Limit(number * _SCALES[suffix], relative=False)
    return limits


def _compare(base: list[Run], new: list[Run], limits: dict[str, Limit]) -> dict[str, Comparison]:
    compared = {}
    for metric, limit in limits.items():
        before, after = gate_runs.values(base, metric), gate_runs.values(new, metric)
        try:
            compared[metric] = compare(
                before, after, limit, lower_is_better=gate_runs.lower_is_better(metric)
            )
        except ValueError as error:
            raise RunError(
                f"{metric}: {error}; give a limit in its own unit, such as {metric}=0.02"
            ) from None
    return compared


def _print(compared: dict[str, Comparison], warnings: list[str]) -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("metric", "base", "new", "worse by", "90 % interval", "allowed", "outcome"):
        table.add_column(name, justify="left" if name in ("metric", "outcome") else "right", no_wrap=True)
    for metric, found in compared.items():
        table.add_row(
            metric,
            _value(metric, found.base),
            _value(metric, found.new),
            _change(metric, found, found.worse),
            "unknown" if found.interval is None else _range(metric, found),
            _change(metric, found, found.limit.amount, sign=""),
            found.outcome.value,
            style={Outcome.REGRESSION: "red", Outcome.INCONCLUSIVE: "yellow"}.get(found.outcome),
        )
    out.print(table)
    for note in [*_notes(compared), *warnings]:
        err.print(f"note: {note}", soft_wrap=True)


def _notes(compared: dict[str, Comparison]) -> list[str]:
    notes = []
    if any(found.interval is None for found in compared.values()):
        notes.append(
            "one run a side: the noise between runs is unknown; give each side several runs, or a directory"
        )
    for metric, found in compared.items():
        if found.outcome is Outcome.INCONCLUSIVE:
            notes.append(
                f"{metric}: noise could explain all of it; more runs would tell (--strict fails here)"
            )
        elif found.outcome is Outcome.OK and found.noise_hides_limit:
            notes.append(
                f"{metric}: the noise is wider than the limit; a regression of that size may hide in it"
            )
    return notes


def _value(metric: str, value: float) -> str:
    unit = gate_runs.unit(metric)
    if unit == "s":
        return f"{value * 1e3:.4g} ms"
    return f"{value:.4g}/s" if unit else f"{value:.4g}"


def _change(metric: str, found: Comparison, amount: float, sign: str = "+") -> str:
    if found.limit.relative:
        return f"{amount * 100:{sign}.2f} %"
    if gate_runs.unit(metric) == "s":
        return f"{amount * 1e3:{sign}.4g} ms"
    return f"{amount:{sign}.4g}"


def _range(metric: str, found: Comparison) -> str:
    low, high = found.interval or (0.0, 0.0)
    if found.limit.relative:
        return f"{low * 100:+.1f}…{high * 100:+.1f} %"
    return f"{_change(metric, found, low)}…{_change(metric, found, high)}"


def _document(
    compared: dict[str, Comparison],
    passed: bool,
    warnings: list[str],
    sides: list[list[Run]],
    broken: list[Run],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": passed,
        "base": [str(run.path) for run in sides[0]],
        "new": [str(run.path) for run in sides[1]],
        "metrics": {
            metric: {
                **dataclasses.asdict(found),
                "outcome": found.outcome.value,
                "unit": gate_runs.unit(metric),
            }
            for metric, found in compared.items()
        },
        "failed": [_broken(run) for run in broken],
        "notes": _notes(compared),
        "warnings": warnings,
    }


def _junit(
    compared: dict[str, Comparison], failing: set[Outcome], warnings: list[str], broken: list[Run]
) -> ElementTree.Element:
    failures = sum(found.outcome in failing for found in compared.values())
    skipped = sum(
        found.outcome is Outcome.INCONCLUSIVE for found in compared.values() if found.outcome not in failing
    )
    suite = ElementTree.Element(
        "testsuite",
        name="llmprobe gate",
        tests=str(len(compared) + len(broken)),
        failures=str(failures),
        errors=str(len(broken)),
        skipped=str(skipped),
    )
    for metric, found in compared.items():
        case = ElementTree.SubElement(suite, "testcase", classname="llmprobe.gate", name=metric)
        said = (
            f"{metric}: {_value(metric, found.base)} became {_value(metric, found.new)}, "
            f"worse by {_change(metric, found, found.worse)}; "
            f"allowed {_change(metric, found, found.limit.amount, sign='')}"
        )
        said += "; noise unknown" if found.interval is None else f"; 90 % interval {_range(metric, found)}"
        if found.outcome in failing:
            ElementTree.SubElement(case, "failure", type=found.outcome.value, message=said)
        elif found.outcome is Outcome.INCONCLUSIVE:
            ElementTree.SubElement(case, "skipped", message=f"{said}: noise could explain all of it")
        else:
            ElementTree.SubElement(case, "system-out").text = said
    for run in broken:
        case = ElementTree.SubElement(suite, "testcase", classname="llmprobe.gate", name=f"run {run.path}")
        ElementTree.SubElement(case, "error", type="failed", message=_broken(run))
    if lines := [*_notes(compared), *warnings]:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(lines)
    return suite


def _save(path: Path, suite: ElementTree.Element) -> None:
    ElementTree.indent(suite)
    try:
        ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        fail(f"cannot save {path}: {error.strerror}; name another file with --junit")
