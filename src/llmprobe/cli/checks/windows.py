"""Checks of kernel windows and captures of kernels: what they record through, and whether they are closed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from llmprobe.cli.checks import Check
from llmprobe.cli.checks.gpus import Gpus
from llmprobe.record.cupti import injected
from llmprobe.record.latch import deaths_in_windows
from llmprobe.record.window_file import FOLDER
from llmprobe.settings import Settings

_NAME = "kernel windows"
_WITHOUT = "launch bubbles, exposed communication and copies stay unknown, and `--tool kernels` is refused"
#: In a process of its own: CUPTI stays attached to one that it once recorded in.
_TRY = """
import sys
from llmprobe.record.cupti import CuptiError, of_process
try:
    import torch
    cupti = of_process()
    cupti.open()
    cupti.close()
    print("version", cupti.version)
except (ImportError, CuptiError) as error:
    print("error", error)
"""
_TRY_SECONDS = 60


def kernel_windows(
    settings: Settings, gpus: Gpus, environ: Mapping[str, str], run: Callable[[], str] | None = None
) -> Check:
    """Whether kernels can be seen: no death closed the windows, libcupti is there and does not refuse.

    Args:
        settings: those of the engine.
        gpus: without one there is nothing to see.
        environ: the environment that the engine will have.
        run: records for a moment, and says what came of it.
    """
    if deaths := deaths_in_windows(settings.directory / FOLDER):
        files = shlex.join(map(str, deaths))
        return Check(
            _NAME,
            "not ok",
            f"closed: an engine died while one was open, and left {files}",
            f"engines with this directory open none any more: {_WITHOUT}",
            f"rm {files}, then start the engine again; should it die there once more, leave them off",
        )
    if not gpus.found:
        return Check(_NAME, "absent", "no NVIDIA GPU here", "kernels are seen on CUDA devices only")
    if tool := injected(dict(environ), maps=Path(os.devnull)):
        fix = "start the engine without that profiler, or let it make the captures"
        return Check(_NAME, "not ok", f"a profiler holds CUPTI: {tool}", _WITHOUT, fix)
    word, _, rest = (run or _tried)().strip().rpartition("\n")[2].partition(" ")
    if word != "version":
        said = rest if word == "error" else f"{word} {rest}".strip() or "trying it ended without a word"
        fix = "see docs/operating.md"
        if "PRIVILEGES" in said:
            fix = "let this user profile (see counter permission), or run the engine as root"
        elif "no libcupti" in said or "torch" in said:
            fix = "run this in the environment of the engine; its torch must be built for CUDA"
        return Check(_NAME, "not ok", said, _WITHOUT, fix)
    asked = environ.get("LLMPROBE_KERNEL_WINDOWS", "off")
    return Check(_NAME, "ok", f"CUPTI (API version {rest}) records; LLMPROBE_KERNEL_WINDOWS is {asked}")


def _tried() -> str:
    environ = {**os.environ, "LLMPROBE": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY],
            env=environ,
            capture_output=True,
            text=True,
            timeout=_TRY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # whose own words are the whole program
        return f"error trying it did not end within {_TRY_SECONDS:g} s"
    except OSError as error:
        return f"error {error}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return f"error trying it ended with status {done.returncode}: {lines[-1]}"
    return done.stdout
