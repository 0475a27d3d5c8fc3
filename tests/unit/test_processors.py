"""Our own processes and threads: reached by no signal that is not for them, and where the program may run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprobe.processors import own_group

# A worker that is pinned to one processor, and what the thread which it makes starts.
_WORKER = """
import os, subprocess, sys, threading
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import _Housekeeping
from llmprobe.settings import Settings

probe = Probe(Settings.from_env({"LLMPROBE": "1", "LLMPROBE_DIR": sys.argv[1], "LLMPROBE_AGENT": "off"}))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
seen = threading.Event()

def look():
    if not seen.is_set():
        print("thread", *os.sched_getaffinity(0), flush=True)
        subprocess.run([sys.executable, "-c", sys.argv[2]], check=True)
        seen.set()

probe.writers.append(look)
probe.on_armed.append(lambda recorder: _Housekeeping(probe, recorder).start())
probe.arm("worker", lambda: {"role": "worker"})
seen.wait()
probe.disarm()
print("worker", *os.sched_getaffinity(0))
"""
_AGENT = "import os; print('agent', *os.sched_getaffinity(0))"


def ran_on(folder: Path, *fence: str, **environment: str) -> dict[str, list[int]]:
    done = subprocess.run(
        [*fence, sys.executable, "-c", _WORKER, str(folder), _AGENT],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return {name: sorted(map(int, rest)) for name, *rest in map(str.split, done.stdout.splitlines())}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor alone leaves nothing to take")
def test_what_a_pinned_worker_starts_runs_where_the_worker_might(tmp_path: Path) -> None:
    everywhere = sorted(os.sched_getaffinity(0))
    assert ran_on(tmp_path) == {"thread": everywhere, "agent": everywhere, "worker": everywhere[:1]}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor alone leaves nothing to take")
def test_a_worker_that_openmp_pinned_before_it_began_is_known_by_its_parent(tmp_path: Path) -> None:
    pinned = ("taskset", "-c", str(max(os.sched_getaffinity(0))))  # as vLLM has OpenMP do
    everywhere = sorted(os.sched_getaffinity(0))
    found = ran_on(tmp_path, *pinned, LLMPROBE_GROUP="of-the-parent", GOMP_CPU_AFFINITY=pinned[-1])
    assert (found["thread"], found["agent"], found["worker"]) == (everywhere, everywhere, everywhere[-1:])


def test_nothing_leaves_the_processors_that_the_operator_gave(tmp_path: Path) -> None:
    last = max(os.sched_getaffinity(0))
    found = ran_on(tmp_path, "taskset", "-c", str(last))
    assert found == {"thread": [last], "agent": [last], "worker": [last]}


def test_a_child_of_its_own_group_is_not_reached_by_signals_to_ours() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **own_group())
    try:
        assert os.getpgid(child.pid) == child.pid
        assert os.getsid(child.pid) == os.getsid(0)
    finally:
        child.kill()
        child.wait()
