"""``llmprobe run --nsys`` with the real nsys: what it does to the program that it runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from captured import Wrapped, capture_verb
from waiting import PATIENCE_SECONDS, until

from llmprobe.capture.nsys import Nsys, Session

pytestmark = pytest.mark.integration


def test_a_killed_wrapper_leaves_the_server_serving_and_capturable(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    one = wrapped()
    target = one.target
    session = one.session()
    one.process.kill()
    one.process.wait(PATIENCE_SECONDS)
    until(lambda: one.ask("GET", "/api/status")[1]["servers"], "server")
    shell = capture_verb(one, tmp_path, "--seconds", "0.5")
    assert shell.returncode == 0, shell.stderr
    assert json.loads(shell.stdout)[0]["capture"]["state"] == "done"
    assert target.is_running()
    assert one.nsys_processes()
    target.terminate()
    until(lambda: not [p for p in one.nsys_processes() if p.status() != psutil.STATUS_ZOMBIE], "end of nsys")
    assert Path(session["temporary"]).exists()
    shutil.rmtree(session["temporary"])


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 33), (signal.SIGUSR1, 34)])
def test_signals_reach_the_program_once_and_nothing_is_left(
    wrapped: Callable[..., Wrapped], number: signal.Signals, expected: int
) -> None:
    program = f"""
import os, signal, sys, time
seen = []
signal.signal({int(number)}, lambda *_: seen.append(1))
print("serving as", os.getpid(), flush=True)
while not seen:
    time.sleep(0.05)
time.sleep(0.5)
print("seen", len(seen), flush=True)
sys.exit({expected})
"""
    one = wrapped(sys.executable, "-c", program)
    target = one.target
    assert one.nsys_processes()  # now; afterwards none of these
    time.sleep(0.3)  # the wrapper looks for the program twenty times a second
    one.process.send_signal(number)
    assert one.process.wait(PATIENCE_SECONDS) == expected
    assert "seen 1" in one.said()
    assert not target.is_running()
    assert not [p for p in one.nsys_processes() if p.status() != psutil.STATUS_ZOMBIE]
    assert not list((one.directory / "nsys").iterdir())


def test_a_program_under_nsys_knows_that_cupti_is_held(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped(
        sys.executable,
        "-c",
        "from llmprobe.record import torch_trace; from llmprobe.record.cupti import injected\n"
        "print(torch_trace.unavailable(cuda=True))\n"
        "print(injected(), injected({}), sep=chr(10), flush=True)\n"
        # nsys ends with an error of its own if the program is gone before it waits for it.
        "import time; time.sleep(1)",
    )
    assert one.process.wait(PATIENCE_SECONDS) == 0
    lines = [line for line in one.said().splitlines() if not line.startswith("llmprobe:")]
    assert "a profiler was injected into this process (NSYS_PROFILING_SESSION_ID is set)" in lines[0]
    assert lines[1:] == ["NSYS_PROFILING_SESSION_ID is set", "libToolsInjection64.so is loaded"]


def test_what_the_program_prints_and_inherits_is_as_without_nsys(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    one = wrapped("/bin/sh", "-c", 'echo "$TMPDIR"; umask; echo last >&2; exit 5')
    assert one.process.wait(PATIENCE_SECONDS) == 5
    lines = [line for line in one.said().splitlines() if not line.startswith("llmprobe:")]
    assert lines == [str(tmp_path / "node0" / "tmp"), f"{umask:04o}", "last"]


def test_a_recording_that_no_agent_ends_is_ended_by_the_wrapper(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    one = wrapped(
        sys.executable, "-c", "import os, time; print('serving as', os.getpid(), flush=True); time.sleep(60)"
    )
    assert one.target.is_running()
    session = Session(**{**one.session(), "trace": ("nvtx",)})
    Nsys(session).start(tmp_path)
    assert Nsys(session).recording()
    session.dead_man(one.directory).write_text('{"until": 1}')
    until(lambda: Nsys(session).state() == "Launched", "end of the recording")
    assert one.target.is_running()
