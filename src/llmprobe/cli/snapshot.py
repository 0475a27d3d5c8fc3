"""``llmprobe snapshot``: everything that is known right now in one file, and reading it back."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from llmprobe.agent import snapshot as snapshots
from llmprobe.agent.client import AgentError, request
from llmprobe.agent.snapshot import SnapshotError
from llmprobe.cli.console import fail, settings_or_fail
from llmprobe.cli.evidence_view import host_line
from llmprobe.cli.output import err, out, print_json
from llmprobe.compute.steps import PHASES

EPILOG = """Examples:

llmprobe snapshot

llmprobe snapshot --seconds 60 --output slow.json.gz

llmprobe snapshot --show slow.json.gz

The file is gzipped JSON: the status, and of each process its facts and flags, counters, steps, requests and
host signals. It holds no environment, no command line, nothing that looks like a secret; names of models are
in it."""


def snapshot(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to make. Default: llmprobe-TIME.json.gz."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=86400, help="How far back to go; a journal may hold less.")
    ] = snapshots.DEFAULT_SECONDS,
    show: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read a snapshot back instead of making one.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was saved, or with --show all of it, as JSON.")
    ] = False,
) -> None:
    """Save the last ten minutes of every server of this node: steps, status, flags, host signals.

    It works without an agent too, and on what engines left that died less than half a minute ago.
    """
    if show is not None:
        if output is not None:
            fail("--show reads a file, --output makes one: give one of them", code=2)
        _show(show, json)
        return
    directory = settings_or_fail().directory
    target = output or Path(snapshots.default_name(time.time()))
    if os.path.lexists(target):  # Path's own raises where a folder must not be searched
        fail(f"{target} exists; name another file with --output", code=2)
    status, no_status = _status(directory)
    try:
        with _progress() as progress:
            document = snapshots.build(
                directory, seconds=seconds, status=status, no_status=no_status, progress=progress
            )
            size = snapshots.save(document, target)
    except SnapshotError as error:
        fail(str(error))
    steps = sum(len(process["steps"]["step"]) for process in document["processes"])
    if json:
        print_json(
            {
                "schema_version": snapshots.SCHEMA_VERSION,
                "path": str(target),
                "bytes": size,
                "processes": len(document["processes"]),
                "steps": steps,
                "agent": status is not None,
            }
        )
        return
    if no_status:
        err.print(f"note: without the agent's figures: {no_status}", soft_wrap=True)
    processes = len(document["processes"])
    out.print(f"saved {target}: {processes} processes, {steps} steps, {size / 1024:.0f} KiB", soft_wrap=True)


def _status(directory: Path) -> tuple[dict[str, Any] | None, str]:
    """What the agent says, or why it does not."""
    try:
        code, answer = request(directory, "GET", "/api/status")
    except AgentError as error:
        return None, str(error)
    if code != 200 or not isinstance(answer, dict):
        return None, f"the agent answered {code}"
    return answer, ""


@contextlib.contextmanager
def _progress() -> Iterator[snapshots.Progress]:
    """Shows what is being done; in a log, nothing: it takes seconds."""
    with err.status("asking the agent") as shown:

        def progress(what: str, number: int, total: int) -> None:
            shown.update(f"{what} ({min(number + 1, total)} of {total})")

        yield progress


def _show(path: Path, as_json: bool) -> None:
    try:
        document = snapshots.load(path)
    except SnapshotError as error:
        fail(str(error))
    if as_json:
        print_json(document)
        return
    try:
        _print(document)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        fail(f"{path} is damaged: {error!r}")


def _print(document: dict[str, Any]) -> None:
    from llmprobe.cli.live import server_panel
    from llmprobe.cli.verdict_view import verdict_view

    made = document["provenance"]
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(made["made"]))
    out.print(
        f"made {when} by llmprobe {made['llmprobe_version']}, Linux {made['kernel']} {made['machine']}, "
        f"{made['cpus']} CPUs",
        soft_wrap=True,
    )
    if document["status"] is None:
        out.print(f"without the agent's figures: {document['no_status']}", soft_wrap=True)
    else:
        servers = document["status"]["servers"]
        for server in servers:
            out.print(verdict_view(server, most_advice=2, named=len(servers) > 1, evidence=True))
            out.print(server_panel(server))
            _print_flags(server["flags"])
    for process in document["processes"]:
        _print_process(process, document["clock"]["monotonic_ns"])
        if document["status"] is None:
            _print_flags(process["facts"].get("flags") or {})
    for journal, why in document["unread"].items():
        out.print(f"{journal} could not be read: {why}", soft_wrap=True)


def _print_flags(flags: dict[str, Any]) -> None:
    if flags:
        out.print(f"  flags: {', '.join(f'{name} {value}' for name, value in sorted(flags.items()))}")


def _phase(index: int) -> str:
    return PHASES[index] if index < len(PHASES) else "phase not known"


def _print_process(process: dict[str, Any], now_ns: int) -> None:
    facts = process["facts"]
    state = "" if process["alive"] else ", dead"
    rank = f" rank {facts['rank']}" if "rank" in facts else ""
    out.print(
        f"\n{facts.get('server', '')} {facts.get('role', '')}{rank}, engine {facts.get('engine', 0)}, "
        f"pid {facts.get('pid', 'unknown')}{state}",
        style="bold",
        soft_wrap=True,
    )
    if process["records_from_ns"] is not None:
        older = f", {process['records_lost']} older ones are overwritten" if process["records_lost"] else ""
        out.print(f"  records of the last {(now_ns - process['records_from_ns']) / 1e9:.0f} s{older}")
    progress = process["progress"]
    if progress is not None and progress["begun"] > progress["ended"]:
        step = f"step {progress['begun']} ({_phase(progress['phase'])}, {progress['tokens']} tokens)"
        seconds = (now_ns - progress["time"]) / 1e9
        out.print(
            f"  {step} has been running for {seconds:.1f} s"
            if process["alive"]
            else f"  it died in {step}, which began {seconds:.1f} s before the snapshot"
        )
    if process["steps"]["step"]:
        out.print(_steps(process["steps"]))
    if process["requests"]["time"]:
        out.print(f"  {len(process['requests']['time'])} requests finished")
    if process["host"]:
        out.print(f"  host: {host_line(process['host'])}", soft_wrap=True)


def _steps(steps: dict[str, list[Any]]) -> Table:
    phase = np.array(steps["phase"])
    spans = (np.array(steps["e3"]) - np.array(steps["e0"])) / 1e6
    tokens = np.array(steps["prompt_tokens"]) + np.array(steps["decode_tokens"])
    table = Table(box=None, pad_edge=True)
    for name in ("phase", "steps", "p50 ms", "p99 ms", "tokens a step"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for index, label in enumerate(PHASES):
        of = phase == index
        if of.any():
            p50, p99 = np.quantile(spans[of], (0.5, 0.99))
            table.add_row(label, str(of.sum()), f"{p50:.2f}", f"{p99:.2f}", f"{tokens[of].mean():.1f}")
    return table
