"""``llmprobe run``: run a command with the probe on, and say at its end what it was bound by."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprobe.cli.console import fail
from llmprobe.collect.collector import Collector
from llmprobe.collect.peaks import peaks_for
from llmprobe.export.report import report, text
from llmprobe.settings import Settings, SettingsError

_POLL_SECONDS = 0.25
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)

EPILOG = """Examples:

llmprobe run -- python generate.py

llmprobe run --output base.json -- python generate.py

llmprobe run -- vllm serve MODEL --port 8000"""


def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, behind `--`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to save the report. [default: run.json]")
    ] = None,
    server: Annotated[str | None, typer.Option(help="The `server` label, as LLMPROBE_SERVER.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    summary: Annotated[
        bool | None,
        typer.Option(help="Whether to report at the end. [default: yes, but not for `vllm serve`]"),
    ] = None,
) -> None:
    """Run a command with LLMPROBE=1; for a script, print a summary and save run.json at its end.

    The exit status is the command's.
    """
    environment = dict(os.environ, LLMPROBE="1", LLMPROBE_GROUP=secrets.token_hex(6))
    if server is not None:
        environment["LLMPROBE_SERVER"] = server
    try:
        settings = Settings.from_env(environment)
    except SettingsError as error:
        fail(str(error), code=2)
    if summary is False or (summary is None and _is_server(command)):
        _replace(command, environment)
    code, document = _watch(command, environment, settings)
    if document is not None:
        _show(document, output or Path("run.json"), as_json)
    raise typer.Exit(code)


def _is_server(command: list[str]) -> bool:
    return "serve" in command[1:3] or any(part.endswith("api_server") for part in command)


def _replace(command: list[str], environment: dict[str, str]) -> None:
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        fail(f"cannot run {command[0]!r}: {os.strerror(error.errno or 0)}", code=127)


def _watch(
    command: list[str], environment: dict[str, str], settings: Settings
) -> tuple[int, dict[str, Any] | None]:
    """Run the command to its end, reading its journals; returns its exit status and the report."""
    collector = Collector(
        settings.directory, peaks=peaks_for, only_group=environment["LLMPROBE_GROUP"], keep_dead=True
    )
    started = time.time()
    try:
        child = subprocess.Popen(command, env=environment)
    except OSError as error:
        fail(f"cannot run {command[0]!r}: {os.strerror(error.errno or 0)}", code=127)
    _forward_signals(child)
    while True:
        try:
            code = child.wait(_POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            collector.tick()
    collector.tick(final=True)
    document = report(collector.views())
    collector.close()
    document.update(command=command, started=started, seconds=time.time() - started, exit_code=_status(code))
    return _status(code), document


def _forward_signals(child: subprocess.Popen[bytes]) -> None:
    for number in _FORWARDED:
        signal.signal(number, lambda received, frame: child.send_signal(received))
    # Ctrl-C reaches the child from the terminal; this process stays to report.
    signal.signal(signal.SIGINT, lambda received, frame: None)


def _status(code: int) -> int:
    """As a shell tells it: 128 + N for a command that signal N ended."""
    return 128 - code if code < 0 else code


def _show(document: dict[str, Any], output: Path, as_json: bool) -> None:
    try:
        output.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        fail(f"cannot save {output}: {os.strerror(error.errno or 0)}; name another file with --output")
    if as_json:
        typer.echo(json.dumps(document))
        return
    typer.echo(text(document), err=True)
    typer.echo(f"saved {output}", err=True)
