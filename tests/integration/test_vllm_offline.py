"""``vllm.LLM`` under ``llmprobe run``; and a vLLM that is not asked to be measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent


def run(command: list[str], directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LLMPROBE_DIR": str(directory),
        "LLMPROBE_AGENT": "off",
        **variables,
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_program_with_llm_is_reported_to_the_last_token(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    llmprobe = str(Path(sys.executable).with_name("llmprobe"))
    done = run(
        [
            llmprobe,
            "run",
            "--output",
            str(output),
            "--",
            sys.executable,
            str(HERE / "offline.py"),
            str(tiny_model),
        ],
        tmp_path / "probe",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens [12, 12, 12]" in done.stdout
    assert "vLLM's request statistics were off; turned on" in done.stdout + done.stderr
    report = json.loads(output.read_text())
    (server,) = report["servers"]
    assert server["server"] == "offline"
    (engine,), (rank,) = server["engines"], server["ranks"]
    assert (engine["requests"], engine["prompt_tokens"], engine["generated_tokens"]) == (3, 48, 36)
    assert engine["ttft_seconds"]["count"] == engine["tpot_seconds"]["count"] == 3
    phases = rank["phases"]
    assert phases["prefill"]["steps"] + phases.get("mixed", {"steps": 0})["steps"] >= 1
    assert phases["decode"]["steps"] >= 10
    assert "decode" in done.stderr  # the summary on the terminal
    for found in phases.values():
        assert found["seconds"] == pytest.approx(sum(found["components_seconds"].values()))


def test_without_llmprobe_vllm_keeps_nothing_of_ours(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, sys, threading
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        import vllm.v1.worker.worker_base as worker, vllm.v1.metrics.loggers as loggers
        import vllm.v1.engine.async_llm as serving, vllm.v1.engine.output_processor as output
        wrapped = [f for f in (worker.WorkerBase.__init__, loggers.StatLoggerManager.record,
                               loggers.StatLoggerManager.__init__, serving.AsyncLLM.__init__,
                               output.OutputProcessor.add_request) if hasattr(f, "__wrapped__")]
        print("wrapped", [f.__qualname__ for f in wrapped if "llmprobe" in f.__code__.co_filename])
        print("modules", sorted(m for m in sys.modules if m.startswith("llmprobe.")))
        print("threads", [t.name for t in threading.enumerate() if "llmprobe" in t.name])
        print("finders", [type(f).__module__ for f in sys.meta_path if "llmprobe" in type(f).__module__])
        print("group", os.environ.get("LLMPROBE_GROUP"))
        """
    )
    with ThreadPoolExecutor() as both:  # importing vLLM takes its time
        runs = [
            both.submit(run, [sys.executable, "-c", code], tmp_path / "probe", **variables)
            for variables in ({}, {"LLMPROBE": "0"})
        ]
    for done in (one.result() for one in runs):
        assert done.returncode == 0, done.stderr[-2000:]
        lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
        assert lines["wrapped"] == lines["threads"] == lines["finders"] == "[]"
        assert lines["modules"] == "['llmprobe.plugin']"
        assert lines["group"] == "None"
    assert not (tmp_path / "probe").exists()


def test_a_wrong_setting_is_one_line_and_vllm_goes_on(tmp_path: Path) -> None:
    code = "from vllm.plugins import load_general_plugins as load; load(); load(); print('went on')"
    done = run([sys.executable, "-c", code], tmp_path / "probe", LLMPROBE="1", LLMPROBE_LISTEN="everywhere")
    assert "went on" in done.stdout
    said = [line for line in done.stderr.splitlines() if "LLMPROBE_LISTEN" in line]
    assert len(said) == 1
    assert "'everywhere' is not allowed: HOST:PORT" in said[0]
