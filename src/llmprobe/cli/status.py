"""``llmprobe status``: every server of this node and user on one screen."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any

import typer

from llmprobe.agent.client import AgentError, request
from llmprobe.cli.console import fail, settings_or_fail
from llmprobe.record.agent_launch import agent_info

EPILOG = """Examples:

llmprobe status

llmprobe status vllm-8000 --evidence

llmprobe status --json | jq '.servers[].verdicts.decode.bottleneck'"""


def status(
    servers: Annotated[
        list[str] | None,
        typer.Argument(metavar="[server]...", help="The `server` label of those to show. Default: all."),
    ] = None,
    evidence: Annotated[
        bool,
        typer.Option("--evidence", help="Show all evidence on each phase: value, threshold, source, age."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what /api/status says of them.")] = False,
) -> None:
    """Show what each server is bound by right now, headline first, and its figures.

    Columns: "sure" is the confidence, 0 to 1; "for", how long the verdict has stood; "load", the share of the
    last 10 s that the phase filled; "headroom", what a step takes beyond its floor, the least that it could
    take on this device; "through", the operator that takes most of the floor. A gap with a ≥ may be larger:
    bubbles inside a step are not in it.
    """
    directory = settings_or_fail().directory
    try:
        code, answer = request(directory, "GET", "/api/status")
    except AgentError as error:
        fail(str(error))
    if code >= 400:
        fail(f"the agent answered {code}: {answer}")
    if servers:
        known = sorted({server["server"] for server in answer["servers"]})
        if unknown := sorted({*servers} - {*known}):
            fail(f"no server {unknown[0]!r}; running: {', '.join(known) or 'none'}")
        answer["servers"] = [server for server in answer["servers"] if server["server"] in servers]
    if as_json:
        typer.echo(json.dumps(answer))
        return
    from llmprobe.cli.live import server_panel
    from llmprobe.cli.output import out
    from llmprobe.cli.verdict_view import verdict_view

    for server in answer["servers"]:
        out.print(verdict_view(server, named=len(answer["servers"]) > 1, evidence=evidence))
        out.print(server_panel(server))
    if not answer["servers"]:
        out.print("No server is running with LLMPROBE=1.")
    out.print(_agent_line(agent_info(directory)))
    for line in _capture_lines(answer["agent"].get("captures") or {}, servers):
        out.print(line)


def _agent_line(info: dict[str, Any] | None) -> str:
    if not info:
        return "The agent listens on its Unix socket only."
    return f"Metrics: http://{info['address']}:{info['port']}/metrics"


def _capture_lines(captures: dict[str, Any], only: Collection[str] | None = None) -> list[str]:
    """Which servers can be captured right now, and which cannot by the nsys that they run under.

    ``only``: of these; all where it names none.
    """
    lines = []
    for server, tools in sorted((captures.get("tools") or {}).items()):
        if only and server not in only:
            continue
        session = (captures.get("nsys") or {}).get(server)
        able = [_tool(tool, session) for tool, why_not in tools.items() if why_not is None]
        if able:
            lines.append(f"Captures of {server}: {', '.join(able)} (llmprobe capture --help)")
        if session is None:
            continue
        if why_not := tools.get("nsys"):
            lines.append(f"No nsys capture of {server}: {why_not}")
        lines.append(
            f"{server} runs under nsys: no kernel windows, no captures by torch or kernels; what nsys costs "
            "while it records nothing: docs/captures.md"
        )
    return lines


def _tool(tool: str, session: dict[str, Any] | None) -> str:
    """A tool, and how nsys records CUDA graphs, where it does."""
    graphs = session.get("cuda_graph_trace") if tool == "nsys" and session else None
    return f"{tool} (CUDA graphs {'by node' if graphs == 'node' else 'whole'})" if graphs else tool
