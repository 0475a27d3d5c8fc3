"""Labels of the scenarios on a CPU: what a busy machine makes true as well, and when a run is over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from support import labels
from support.labels import Client, Facts, Label, Machine
from support.outcomes import Outcome
from support.waited import Waited
from support.watching import Said, Trace, score

QUIET = Facts(
    machine=Machine(1, 1e10, 1e11),
    client=Client(5, 0.1, 0.1),
    alone=None,
    weights_bytes=600_000_000,
    prompt_tokens=32,
    chunk_tokens=256,
    engine={},
    tokens=100.0,
)


def test_on_a_busy_machine_that_the_device_waits_is_true_too() -> None:
    assert labels.reads_weights(QUIET).classes == ("memory_bound",)
    label = labels.reads_weights(replace(QUIET, waited_ratio=0.3))
    assert label.classes == ("memory_bound", "sync_bound", "unknown")
    assert label.holds
    assert "0.30 of the time" in label.rule


def test_weights_that_are_read_faster_than_the_peak_tell_nothing() -> None:
    """Seen where others computed while the peaks were measured: 1.66 of the time per token."""
    assert labels.reads_weights(QUIET).holds
    faster = replace(QUIET, client=Client(5, 0.1, 0.035))
    assert not labels.reads_weights(faster).holds


def test_no_peaks_are_known_or_it_waits() -> None:
    label = labels.knows_no_peaks(QUIET)
    assert (label.classes, label.cause, label.headline) == (("unknown",), "no_peaks", "calibrate")
    label = labels.knows_no_peaks(replace(QUIET, waited_ratio=0.3))
    assert (label.classes, label.cause, label.headline) == (("unknown", "sync_bound"), None, None)


@pytest.mark.parametrize(
    ("holds", "said", "settled"),
    [
        (False, "idle", True),
        (True, "memory_bound", True),
        (True, "idle", False),
    ],
)
def test_a_run_may_end_where_nothing_is_left_to_see(holds: bool, said: str, settled: bool) -> None:
    verdict = {"bottleneck": said, "cause": None, "confidence": 0.8, "evidence": []}
    trace = Trace([Said(1.0, {"decode": {**verdict, "bottleneck": "memory_bound"}}, "", {})])
    trace.said.append(Said(2.0, {"decode": verdict}, "", {}))
    label = Label(("memory_bound",), "a rule", holds)
    found = Outcome("decode", QUIET, label, score(trace, label, "decode", {}), trace)
    assert found.settled is settled


def test_a_thread_that_has_to_share_its_core_waits_and_one_that_sleeps_does_not() -> None:
    core = str(min(os.sched_getaffinity(0)))
    spin = "import os; os.sched_setaffinity(0, {" + core + "}); print(flush=True)\nwhile True: pass"
    spinning = [
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    sleeping = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for process in (*spinning, sleeping):
            assert process.stdout is not None
            process.stdout.readline()
        shares, rests = Waited(spinning[0].pid), Waited(sleeping.pid)
        while (share := shares.ratio()) < 0.1:  # two that want all of one core
            time.sleep(0.05)
        assert rests.ratio() < share
    finally:
        for process in (*spinning, sleeping):
            process.kill()
            process.communicate()
    assert shares.ratio() == 0.0  # it is gone
