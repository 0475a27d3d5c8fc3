"""``llmprobe capture``: a deep look at a running server, from the shell."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from llmprobe.agent.client import Agent, AgentError, LocalAgent, RemoteAgent
from llmprobe.cli.capture_follow import Followed, follow
from llmprobe.cli.console import fail, settings_or_fail
from llmprobe.cli.output import err, print_json

_POST_SECONDS = 30.0
_FETCH_SECONDS = 300.0

EPILOG = """Examples:

llmprobe capture

llmprobe capture --seconds 2 --when "sync_gap_ratio > 0.3 for 10s"

llmprobe capture --tool torch --steps 50 --torch-cpu

llmprobe capture --target node1:9480 --target node2:9480 --token-file token"""


def capture(
    server: Annotated[str | None, typer.Argument(help="The `server` label. Default: the only one.")] = None,
    seconds: Annotated[float | None, typer.Option(help="How long to record. Default: 5.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to record, instead.")] = None,
    when: Annotated[
        str, typer.Option(help='now, next prefill, next decode, or as "sync_gap_ratio > 0.3 for 10s".')
    ] = "now",
    wait_seconds: Annotated[float, typer.Option(help="How long `--when` may take to come true.")] = 300.0,
    label: Annotated[str, typer.Option(help="For you to recognise it by.")] = "",
    tool: Annotated[str, typer.Option(help="auto, nsys, torch or kernels.")] = "auto",
    rank: Annotated[
        list[int] | None, typer.Option(help="torch, kernels: only this worker; more than once for several.")
    ] = None,
    torch_cpu: Annotated[
        bool, typer.Option("--torch-cpu", help="torch: operators on the host too, not the GPU alone.")
    ] = False,
    torch_stacks: Annotated[
        bool, typer.Option("--torch-stacks", help="torch: Python's calls too. Stops the engine for seconds.")
    ] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Wait for a capture that runs.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to make a folder for each capture's files.")
    ] = Path(),
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Fetch unscrubbed files too: the .nsys-rep holds the server's environment."
        ),
    ] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of an agent; more than once for many nodes.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="With --target: the file with the token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the captures as JSON.")] = False,
) -> None:
    """Capture what a running server does, wait for the result, and fetch it.

    With nsys if the server was started with `llmprobe run --nsys`; else with
    torch's own profiler, or, where ending that would stop the engine (as on
    CUDA devices), by recording kernels, copies and sets alone.
    """
    agents = _agents(target or [], token_file)
    wanted = {
        "tool": tool,
        "server": server,
        "when": when,
        "wait_seconds": wait_seconds,
        "label": label,
        "queue": queue,
        **({} if seconds is None else {"seconds": seconds}),
        **({} if steps is None else {"steps": steps}),
        **({"ranks": rank} if rank else {}),
        **({"torch_cpu": True} if torch_cpu else {}),
        **({"torch_stacks": True} if torch_stacks else {}),
    }
    followed = _begin(agents, wanted)
    try:
        follow(followed)
    except KeyboardInterrupt:
        _cancel(followed)
        fail("cancelled", code=130)
    for one in followed:
        if one.capture.get("state") == "done":
            _fetch(one, output, raw)
    _show(followed, as_json)
    if any(one.error for one in followed):
        raise typer.Exit(1)


def _agents(targets: Sequence[str], token_file: Path | None) -> list[Agent]:
    if not targets:
        if token_file is not None:
            fail("--token-file is for --target", code=2)
        return [LocalAgent(settings_or_fail().directory)]
    if token_file is None:
        fail("--target needs --token-file", code=2)
    try:
        token = token_file.read_text().strip()
    except (OSError, ValueError) as error:
        fail(f"cannot read {token_file}: {error}", code=2)
    agents: list[Agent] = []
    for target in targets:
        host, _, port = target.rpartition(":")
        if not host or not port.isdecimal():
            fail(f"--target {target}: HOST:PORT is wanted", code=2)
        agents.append(RemoteAgent(host.strip("[]"), int(port), token))
    return agents


def _begin(agents: list[Agent], wanted: dict[str, Any]) -> list[Followed]:
    """Ask all at the same moment."""

    def begin(agent: Agent) -> Followed:
        try:
            status, answer = agent.request("POST", "/api/captures", wanted, timeout=_POST_SECONDS)
        except AgentError as error:
            return Followed(agent, {}, str(error))
        if status != 202:
            return Followed(agent, {}, _said(agent, status, answer))
        return Followed(agent, answer)

    with ThreadPoolExecutor(len(agents)) as pool:
        return list(pool.map(begin, agents))


def _said(agent: Agent, status: int, answer: Any) -> str:
    if isinstance(answer, dict) and "detail" in answer:
        return f"{answer['detail']} {answer.get('next', '')}".strip()
    return f"{agent.name} answered {status}"


def _cancel(followed: list[Followed]) -> None:
    for one in followed:
        if one.live:
            with contextlib.suppress(AgentError):
                one.agent.request("DELETE", one.capture["url"], timeout=_POST_SECONDS)


def _fetch(one: Followed, output: Path, raw: bool) -> None:
    folder = output / one.capture["id"]
    try:
        folder.mkdir(parents=True, mode=0o700)
        for file in one.capture["files"]:
            if "warning" in file and not raw:
                continue
            one.agent.download(file["url"], folder / Path(file["name"]).name, timeout=_FETCH_SECONDS)
        status, report = one.agent.request("GET", one.capture["report"], timeout=_POST_SECONDS)
    except AgentError as error:
        one.error = str(error)
        return
    except OSError as error:
        one.error = f"cannot save in {folder}: {error.strerror}"
        return
    one.folder = folder
    one.report = report if status == 200 else None


def _show(followed: list[Followed], as_json: bool) -> None:
    if as_json:
        print_json([one.as_json() for one in followed])
    for one in followed:
        where = f"{one.agent.name}: " if len(followed) > 1 else ""
        if one.error:
            typer.echo(f"llmprobe: {where}{one.error}", err=True)
        elif not as_json and one.folder is not None:
            if where:
                typer.echo(where)
            typer.echo((one.folder / "report.txt").read_text())
        for note in one.capture.get("notes", []):
            typer.echo(f"note: {where}{note}", err=True)
        if one.folder is not None:
            err.print(f"{where}saved {one.folder}")
