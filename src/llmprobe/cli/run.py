"""``llmprobe run``: run a command with the probe on, and say at its end what it was bound by."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol

import typer
from typer.core import TyperCommand

from llmprobe.cli.console import fail
from llmprobe.cli.output import err
from llmprobe.collect.collector import Collector
from llmprobe.collect.peaks import attainable_for, peaks_for
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.thresholds import load_thresholds
from llmprobe.export.report import report, text
from llmprobe.export.run_seen import RunLooks
from llmprobe.settings import Settings, SettingsError

_POLL_SECONDS = 0.25
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)

EPILOG = """Examples:

llmprobe run -- python generate.py

llmprobe run --output base.json -- python generate.py

llmprobe run -- vllm serve MODEL --port 8000

llmprobe run --nsys -- vllm serve MODEL (and then, in another terminal:) llmprobe capture"""


class COMMAND(TyperCommand):
    """Takes ``--nsys`` with or without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command; a bare ``--nsys`` before ``--`` gets an empty value."""
        end = args.index("--") if "--" in args else len(args)
        given = ["--nsys=" if word == "--nsys" else word for word in args[:end]]
        return super().parse_args(ctx, given + args[end:])


class Child(Protocol):
    """What is asked of a running command."""

    def wait(self, timeout: float) -> int:
        """Its exit status, or `subprocess.TimeoutExpired`."""

    def send_signal(self, number: int, /) -> None:
        """Pass a signal on."""


def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, behind `--`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to save the report. Default: run.json.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="The `server` label, as LLMPROBE_SERVER.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, below what the command prints.")
    ] = False,
    summary: Annotated[
        bool | None,
        typer.Option(help="Whether to report at the end. Default: yes, but not for `vllm serve`."),
    ] = None,
    nsys: Annotated[
        str | None,
        typer.Option(
            metavar="[=PATH]",
            help="Run under `nsys launch`, so that `llmprobe capture` can use it. Excludes kernel windows.",
        ),
    ] = None,
    trace: Annotated[str | None, typer.Option(help="With --nsys: what to trace. Default: cuda,nvtx.")] = None,
    cuda_graph_trace: Annotated[
        str | None,
        typer.Option(
            metavar="graph|node",
            help="With --nsys: CUDA graphs whole, or kernel by kernel, which slows their launches and can "
            "hang the server for good while it is captured. Default: graph.",
        ),
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
    quiet = summary is False or (summary is None and _is_server(command))
    report_to = None if quiet else (output or Path("run.json"))
    if report_to is not None and (why_not := _cannot_save(report_to)):
        fail(f"cannot save {report_to}: {why_not}; name another file with --output", code=2)
    if nsys is not None:
        _under_nsys(command, environment, nsys, trace, cuda_graph_trace, report_to, as_json)
    for option, given in (("--trace", trace), ("--cuda-graph-trace", cuda_graph_trace)):
        if given is not None:
            fail(f"{option} is for --nsys", code=2)
    if report_to is None:
        _replace(command, environment)
    code, document = _watch(lambda: _start(command, environment), command, environment, settings)
    if document is not None:
        _show(document, report_to, as_json)
    raise typer.Exit(code)


def _cannot_save(path: Path) -> str:
    """Why a file cannot be written, as far as that shows before; else empty. Nothing is changed."""
    folder = path.parent
    try:
        if path.is_dir():
            return "it is a directory"
        if path.exists():
            return "" if os.access(path, os.W_OK) else "it must not be written"
        if not folder.is_dir():
            return f"{folder} is no directory" if folder.exists() else f"there is no directory {folder}"
    except OSError as error:  # a folder that must not be searched, a name that is too long
        return os.strerror(error.errno or 0)
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"no file can be made in {folder}"


def _is_server(command: list[str]) -> bool:
    return "serve" in command[1:3] or any(part.endswith("api_server") for part in command)


def _replace(command: list[str], environment: dict[str, str]) -> NoReturn:
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        fail(f"cannot run {command[0]!r}: {os.strerror(error.errno or 0)}", code=127)


def _start(command: list[str], environment: dict[str, str]) -> Child:
    try:
        return subprocess.Popen(command, env=environment)
    except OSError as error:
        fail(f"cannot run {command[0]!r}: {os.strerror(error.errno or 0)}", code=127)


def _under_nsys(
    command: list[str],
    environment: dict[str, str],
    nsys: str,
    trace: str | None,
    graph_trace: str | None,
    output: Path | None,
    as_json: bool,
) -> NoReturn:
    """Run the command under nsys to its end; with ``output``, report as without nsys."""
    from llmprobe.cli import run_nsys

    # Both use CUPTI; under nsys it is taken.
    environment["LLMPROBE_KERNEL_WINDOWS"] = "off"
    settings = Settings.from_env(environment)
    try:
        program, traces = run_nsys.find_nsys(nsys), run_nsys.parse_trace(trace)
        graphs = run_nsys.parse_graphs(graph_trace, traces)
        run_nsys.warn_of_old_nsys(program)
        if graphs == "node":
            run_nsys.warn_of_hangs()
        child = run_nsys.NsysChild(command, environment, settings, program, traces, graphs)
    except run_nsys.NsysUsageError as error:
        fail(str(error), code=error.code)
    document = None
    try:
        if output is None:
            code = _wait(child)
        else:
            code, document = _watch(lambda: child, command, environment, settings)
    finally:
        child.close()
    if document is not None and output is not None:
        _show(document, output, as_json)
    raise typer.Exit(code)


def _wait(child: Child) -> int:
    _forward_signals(child)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return _status(child.wait(_POLL_SECONDS))


def _watch(
    start: Callable[[], Child], command: list[str], environment: dict[str, str], settings: Settings
) -> tuple[int, dict[str, Any] | None]:
    """Run the command to its end, reading its journals; returns its exit status and the report."""
    thresholds, problem = load_thresholds(settings.thresholds)
    if problem:
        typer.echo(f"llmprobe: {problem}", err=True)
    telemetry = Telemetry()
    collector = Collector(
        settings.directory,
        peaks=lambda facts: peaks_for(facts, gpu=telemetry.hardware(facts)),
        attainable=attainable_for,
        thresholds=thresholds,
        telemetry=telemetry,
        notes=[problem] if problem else (),
        only_group=environment["LLMPROBE_GROUP"],
        keep_dead=True,
    )
    looks = RunLooks()
    started = time.time()
    child = start()
    _forward_signals(child)
    while True:
        try:
            code = child.wait(_POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            collector.tick()
            looks.look(collector.views())
    collector.tick(final=True)
    document = report(collector.views(), looks=looks)
    collector.close()
    telemetry.close()
    document.update(command=command, started=started, seconds=time.time() - started, exit_code=_status(code))
    return _status(code), document


def _forward_signals(child: Child) -> None:
    for number in _FORWARDED:
        signal.signal(number, lambda received, frame: child.send_signal(received))
    if isinstance(child, subprocess.Popen):
        # Ctrl-C reaches the child from the terminal; this process stays to report.
        signal.signal(signal.SIGINT, lambda received, frame: None)
    else:
        signal.signal(signal.SIGINT, lambda received, frame: child.send_signal(received))


def _status(code: int) -> int:
    """As a shell tells it: 128 + N for a command that signal N ended."""
    return 128 - code if code < 0 else code


def _show(document: dict[str, Any], output: Path, as_json: bool) -> None:
    """Save and print the report. What cannot be saved is at least printed, and the command's status stays."""
    try:
        output.write_text(json.dumps(document, indent=1) + "\n")
        saved = f"saved {output}"
    except OSError as error:
        saved = f"llmprobe: cannot save {output}: {os.strerror(error.errno or 0)}"
    if as_json:
        typer.echo(json.dumps(document))
    else:
        typer.echo(text(document, err.width), err=True)
    if not as_json or not saved.startswith("saved"):
        typer.echo(saved, err=True)
