"""Switching the probe of a running process as ``llmprobe off`` and ``on`` do: through its agent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmprobe.agent.client import AgentError, request

_MOST_SECONDS = 60.0


class NotSwitched(Exception):
    """The agent refused, or the process did not follow."""


def switch(directory: Path, on: bool) -> None:
    """Switch every probe of ``directory``; returns once all its processes follow. Raises NotSwitched."""
    code, answer = request(
        directory, "POST", "/api/probe", {"armed": on, "servers": None}, timeout=_MOST_SECONDS
    )
    if code >= 400:
        raise NotSwitched(f"the agent answered {code}: {answer}")
    if not until(lambda: _follows(directory, on), _MOST_SECONDS):
        raise NotSwitched(f"a process is not {'on' if on else 'off'} after {_MOST_SECONDS:.0f} s")


def wait_known(directory: Path) -> None:
    """Return once the agent knows a server that is on. Raises NotSwitched."""
    if not until(lambda: _follows(directory, True), _MOST_SECONDS):
        raise NotSwitched(f"no agent of {directory} knows an armed process after {_MOST_SECONDS:.0f} s")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether ``condition`` came true within that long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _follows(directory: Path, on: bool) -> bool:
    try:
        code, answer = request(directory, "GET", "/api/status")
    except AgentError:
        return False
    if code != 200 or not answer["servers"]:
        return False
    states = [state for server in answer["servers"] for state in _states(server)]
    return all(states) if on else not any(states)


def _states(server: dict[str, Any]) -> list[bool]:
    return [bool(server["armed"]), *(bool(rank["armed"]) for rank in server["ranks"])]
