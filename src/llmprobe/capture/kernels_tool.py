"""Captures of every kernel, copy and set, in each process that drives a GPU: the lightest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llmprobe.capture.asking import AskingTool
from llmprobe.capture.session import Request
from llmprobe.capture.tool import Worker


def kernels_tool(
    request: Request,
    capture_id: str,
    folder: Path,
    directory: Path,
    workers: Callable[[], Sequence[Worker]],
    seconds: float,
    interrupted: Callable[[], bool],
) -> AskingTool:
    """The tool for one capture."""
    return AskingTool(
        "kernels",
        capture_id,
        folder,
        workers,
        seconds=seconds,
        steps=request.steps,
        interrupted=interrupted,
        directory=directory,
    )
