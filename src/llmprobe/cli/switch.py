"""``llmprobe off`` and ``llmprobe on``: switch the probe of running servers, without a restart."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from llmprobe.agent.client import AgentError, request
from llmprobe.cli.console import fail, settings_or_fail

#: An engine follows within a second, unless its machine is starved of processor time.
_WAIT_SECONDS = 15.0

_Servers = Annotated[list[str] | None, typer.Argument(help="`server` labels. Default: all.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


def off(servers: _Servers = None, as_json: _Json = False) -> None:
    """Switch the probe off: the engine's own methods are restored; `llmprobe on` brings it back."""
    _switch(False, servers, as_json)


def on(servers: _Servers = None, as_json: _Json = False) -> None:
    """Switch the probe of running servers on again."""
    _switch(True, servers, as_json)


def _switch(armed: bool, servers: list[str] | None, as_json: bool) -> None:
    directory = settings_or_fail().directory
    try:
        known = {server["server"] for server in _status(directory)}
        if unknown := sorted(set(servers or ()) - known):
            fail(f"no server {unknown[0]!r}; running: {', '.join(sorted(known)) or 'none'}")
        if not known:
            fail("no server is running with LLMPROBE=1")
        code, answer = request(directory, "POST", "/api/probe", {"armed": armed, "servers": servers})
        if code >= 400:
            fail(answer.get("detail") or answer.get("title") or f"the agent answered {code}")
        states = _wait(directory, armed, set(servers or known))
    except AgentError as error:
        fail(str(error))
    late = sorted(name for name, state in states.items() if state != armed)
    if as_json:
        typer.echo(json.dumps({"armed": armed, "servers": states}))
    else:
        for name, state in sorted(states.items()):
            typer.echo(f"{name}: {'on' if state else 'off'}")
    if late:
        fail(f"{', '.join(late)} did not follow within {_WAIT_SECONDS:.0f} s; is the server alive?")


def _status(directory: Any) -> list[dict[str, Any]]:
    code, answer = request(directory, "GET", "/api/status")
    if code >= 400:
        fail(f"the agent answered {code}: {answer}")
    servers: list[dict[str, Any]] = answer["servers"]
    return servers


def _wait(directory: Any, armed: bool, names: set[str]) -> dict[str, bool]:
    """The state of each server once all follow, or when time is up."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        states = {
            server["server"]: _state(server, armed)
            for server in _status(directory)
            if server["server"] in names
        }
        if all(state == armed for state in states.values()) or time.monotonic() > deadline:
            return states
        time.sleep(0.2)


def _state(server: dict[str, Any], wanted: bool) -> bool:
    """Whether the server is on; it follows only when all of its processes do."""
    ranks = [bool(rank["armed"]) for rank in server["ranks"]]
    everything = [bool(server["armed"]), *ranks]
    return all(everything) if wanted else any(ranks or everything)
