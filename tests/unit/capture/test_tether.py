"""A command that must not outlive who asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmprobe.processors import own_group

SECONDS = 60.0  # for a test that hangs


def tethered(*command: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "llmprobe.capture.tether", *command]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, **pipes, **own_group())  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -15 $$", -15)]
)
def test_it_ends_as_the_command_does(script: str, code: int) -> None:
    child = tethered("/bin/sh", "-c", f"echo said; {script}")
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.wait(SECONDS) == code
    assert child.stdout.read() == b"said\n"
    child.stdin.close()
    child.stdout.close()


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    child = tethered(str(tmp_path / "missing"))
    said, _ = child.communicate(timeout=SECONDS)
    assert (child.returncode, said.decode()) == (
        127,
        f"{tmp_path}/missing cannot be started: {os.strerror(2)}\n",
    )


def test_all_of_it_ends_once_its_input_closes() -> None:
    """As it does where the agent is killed. The pipe of its output is at its end once nothing holds it."""
    child = tethered("/bin/sh", "-c", "echo ready; sleep 600 & sleep 600; echo survived")
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.stdin.close()
    assert child.stdout.read() == b""
    assert child.wait(SECONDS) == -signal.SIGKILL
    child.stdout.close()
