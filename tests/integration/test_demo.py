"""``llmprobe demo`` as a newcomer runs it: real server, real client, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from waiting import PATIENCE_SECONDS

from llmprobe.settings import default_directory

pytestmark = pytest.mark.integration

COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'llmprobe'; from llmprobe.cli.app import main; main()",
    "demo",
]


def folders() -> set[Path]:
    return set(default_directory().parent.glob("llmprobe-demo-*"))


def processes_in(environment: str) -> list[str]:
    """Command lines of live processes that carry a variable's value, such as the demo's children."""
    found = []
    for process in psutil.process_iter():
        try:
            if environment in process.environ().values() and process.pid != os.getpid():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_demo_measures_what_its_client_saw_and_leaves_nothing(tmp_path):
    before = folders()
    mark = f"demo-test-{os.getpid()}-{time.time_ns()}"
    done = subprocess.run(
        [*COMMAND, "--seconds", "8", "--json"],
        env={**os.environ, "MARK": mark},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [run["load"]["name"] for run in summary["runs"]] == ["chat", "documents"]
    for run in summary["runs"]:
        (engine,) = run["llmprobe"]["servers"][0]["engines"]
        client = run["client"]
        assert engine["requests"] == client["requests"]
        assert engine["prompt_tokens"] == client["prompt_tokens"]
        assert engine["generated_tokens"] == client["generated_tokens"]
        # The engine's clock begins later and ends earlier than the client's.
        assert 0 < engine["ttft_seconds"]["p50"] < client["ttft_median_seconds"] * 1.02
    (rank,) = summary["report"]["servers"][0]["ranks"]
    assert {"prefill", "decode"} <= set(rank["phases"])
    assert rank["phases"]["decode"]["mbu_step"] > 0
    assert folders() == before
    assert processes_in(mark) == []


def test_what_the_demos_program_writes_is_no_part_of_its_json(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--transformers", "--seconds", "4", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exit_code"] == 0
    assert found["servers"][0]["framework"] == "transformers"
    assert "answers of" in done.stderr
    assert "run.json is not kept" in done.stderr  # `run` says where it saved it


def test_demo_that_is_interrupted_while_it_starts_leaves_nothing(tmp_path):
    before = folders()
    mark = f"demo-test-{os.getpid()}-{time.time_ns()}"
    demo = subprocess.Popen(
        COMMAND,
        env={**os.environ, "MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any("VLLM::EngineCore" in line or "vllm serve" in line for line in processes_in(mark)):
        assert demo.poll() is None, demo.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    demo.send_signal(signal.SIGINT)
    _, said = demo.communicate(timeout=PATIENCE_SECONDS)
    assert demo.returncode == 130, said
    assert "stopped" in said
    assert folders() == before
    assert processes_in(mark) == []
