"""``llmprobe analyze``: what is in a profiler's file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from llmprobe.cli.console import fail
from llmprobe.cli.output import err, print_json

EPILOG = """Examples:

llmprobe analyze decode.sqlite

llmprobe analyze worker0.pt.trace.json.gz --json

llmprobe analyze --nsys /opt/nsight-systems/bin/nsys decode.nsys-rep"""


def analyze(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="nsys .sqlite or .nsys-rep, torch profiler trace (.json, .json.gz), kernels capture (.npz).",
        ),
    ],
    nsys: Annotated[
        Path | None, typer.Option(help="The nsys that reads .nsys-rep files; by default the one on PATH.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON: an object, or a list for several files.")
    ] = False,
) -> None:
    """Tell from a profiler's file how busy each GPU was, in which phase, with what, and what to do about it.

    Whether the file can be trusted comes first. Files are only read.
    """
    # The profiler files' readers need numpy, which --help does not.
    from llmprobe.analysis import AnalysisError, Report
    from llmprobe.analysis import analyze as analyzed
    from llmprobe.analysis.events import printable

    reports: list[Report] = []
    problems: list[str] = []
    for path in paths:
        try:
            if err.is_terminal:
                with err.status(escape(f"Reading {printable(path.name)} …")):
                    reports.append(analyzed(path, nsys=nsys))
            else:
                reports.append(analyzed(path, nsys=nsys))
        except AnalysisError as error:
            problems.append(str(error))
    if as_json and reports:
        found = [report.to_json() for report in reports]
        print_json(found[0] if len(paths) == 1 else found)
    elif reports:
        typer.echo("\n\n".join(report.to_text() for report in reports))
    for problem in problems[:-1]:
        typer.echo(f"llmprobe: {problem}", err=True)
    if problems:
        fail(problems[-1])
