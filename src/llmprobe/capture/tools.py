"""Which tools there are, what each server can be captured with, and the one for a capture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmprobe.capture.kernels_tool import kernels_tool
from llmprobe.capture.nsys import session_of
from llmprobe.capture.nsys_tool import NsysTool, why_not_nsys
from llmprobe.capture.session import Capture
from llmprobe.capture.session import Tool as ToolName
from llmprobe.capture.tool import Tool, Worker
from llmprobe.capture.torch_tool import torch_tool

#: The deepest first.
TOOLS: tuple[ToolName, ...] = ("nsys", "torch", "kernels")


def tools_of(directory: Path, group: str, workers: Sequence[Worker]) -> dict[str, str | None]:
    """What can capture a server: tool → None, or why it cannot."""
    found = {"nsys": why_not_nsys(directory, group)}
    for tool in ("torch", "kernels"):
        found[tool] = _refusal(tool, workers)
    return found


def nsys_session(directory: Path, group: str) -> dict[str, Any] | None:
    """What nsys traces in the session that a server runs under, JSON-ready; None if there is none."""
    session = session_of(directory, group)
    if session is None:
        return None
    return {"trace": list(session.trace), "cuda_graph_trace": session.cuda_graph_trace}


def _refusal(tool: str, workers: Sequence[Worker]) -> str | None:
    if not workers:
        return "the server has no process that could be captured"
    for worker in workers:
        reason = worker.refusals.get(tool, "its llmprobe has not said what can capture it")
        if reason is not None:
            return reason if len(workers) == 1 else f"{worker.name}: {reason}"
    return None


def make_tool(
    capture: Capture,
    folder: Path,
    directory: Path,
    workers: Callable[[], Sequence[Worker]],
    *,
    seconds: float,
    cancelled: Callable[[], bool],
    interrupted: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> Tool:
    """The tool of ``capture``; arguments as of `llmprobe.capture.run.Run` and the tools themselves."""
    request = capture.request
    if request.tool == "nsys":
        return NsysTool(
            folder, directory, capture.group, cancelled=cancelled, interrupted=interrupted, clock=clock
        )
    make = torch_tool if request.tool == "torch" else kernels_tool

    def chosen() -> list[Worker]:
        return [one for one in workers() if request.ranks is None or one.rank in request.ranks]

    return make(request, capture.id, folder, directory, chosen, seconds, interrupted)
