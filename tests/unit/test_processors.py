"""Our own processes and threads: reached by no signal that is not for them, and where the program may run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprobe.processors import own_group

# A program, a worker of it that is pinned to one processor, and the daemon and the thread which that starts.
_PROGRAM = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]], check=True)
"""
_WORKER = """
import os, subprocess, sys, threading
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import _Housekeeping
from llmprobe.settings import Settings
all_of_them = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(all_of_them)})
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)

probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": sys.argv[2], "LLMPROBE_AGENT": "off"}))
seen = threading.Event()

def look():
    if not seen.is_set():
        print("thread", *os.sched_getaffinity(0), flush=True)
        seen.set()

probe.writers.append(look)
probe.on_armed.append(lambda recorder: _Housekeeping(probe, recorder).start())
probe.arm("worker", lambda: {"role": "worker"})
seen.wait()
probe.disarm()
print("worker", *os.sched_getaffinity(0))
"""
_DAEMON = """
import os
from llmprobe.processors import take_programs_cpus
before = os.sched_getaffinity(0)
take_programs_cpus(os.getppid())
print("daemon", len(before), *os.sched_getaffinity(0), flush=True)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor alone leaves nothing to take")
def test_what_a_pinned_worker_starts_runs_where_the_program_may(tmp_path: Path) -> None:
    program = subprocess.run(
        [sys.executable, "-c", _PROGRAM, _WORKER, _DAEMON, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
        **own_group(),
    )
    said = {name: list(map(int, rest)) for name, *rest in map(str.split, program.stdout.splitlines())}
    everywhere = sorted(os.sched_getaffinity(0))
    assert said["daemon"][0] == 1
    assert sorted(said["daemon"][1:]) == everywhere
    assert sorted(said["thread"]) == everywhere
    assert said["worker"] == everywhere[:1], "the engine's own threads stay where it put them"


def test_a_child_of_its_own_group_is_not_reached_by_signals_to_ours() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **own_group())
    try:
        assert os.getpgid(child.pid) == child.pid
        assert os.getsid(child.pid) == os.getsid(0)
    finally:
        child.kill()
        child.wait()
