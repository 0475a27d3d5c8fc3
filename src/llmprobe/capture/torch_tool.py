"""Captures by torch's own profiler, in each process: any time, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llmprobe.capture.asking import AskingTool, Options
from llmprobe.capture.session import Request
from llmprobe.capture.tool import Worker


def torch_tool(
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
        "torch",
        capture_id,
        folder,
        workers,
        seconds=seconds,
        steps=request.steps,
        interrupted=interrupted,
        options=Options(request.torch_cpu, request.torch_stacks),
        directory=directory,
    )
