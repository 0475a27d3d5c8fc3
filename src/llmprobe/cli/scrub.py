"""``llmprobe scrub``: a copy of a profiler's file that may leave the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from llmprobe.cli.console import fail
from llmprobe.cli.output import err, print_json

EPILOG = """Examples:

llmprobe scrub decode.sqlite

llmprobe scrub worker0.pt.trace.json.gz -o shared/worker0.json.gz"""


def scrub(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="nsys .sqlite or .nsys-rep, or a torch profiler trace (.json, .json.gz)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Where the copy goes; by default beside it, as NAME.scrubbed.sqlite or .json.gz.",
        ),
    ] = None,
    nsys: Annotated[
        Path | None, typer.Option(help="The nsys that reads .nsys-rep files; by default the one on PATH.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths and sizes as JSON.")] = False,
) -> None:
    """Copy a profiler's file without environment, command lines, names of hosts and users, paths and output.

    Kept are times, kernel names, calls into CUDA, llmprobe's own ranges and the GPU's model: what `llmprobe
    analyze` needs. The file itself is not changed.
    """
    from llmprobe.analysis.events import printable
    from llmprobe.capture.scrub import ScrubError, scrubbed_name
    from llmprobe.capture.scrub import scrub as scrubbed

    target = output or scrubbed_name(file)
    try:
        if err.is_terminal:
            with err.status(escape(f"Copying {printable(file.name)} …")):
                scrubbed(file, target, nsys=nsys)
        else:
            scrubbed(file, target, nsys=nsys)
    except ScrubError as error:
        fail(str(error))
    if as_json:
        sizes = {"source_bytes": file.stat().st_size, "target_bytes": target.stat().st_size}
        print_json({"source": printable(str(file)), "target": printable(str(target)), **sizes})
    else:
        typer.echo(printable(str(target)))
