"""A model on two GPUs: both ranks are measured, live windows see both, and both are in every capture."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmprobe.agent.client import LocalAgent

from .captured_server import Requests, capture, serving, tools, wait
from .limits import limited

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
FLAGS = ("--tensor-parallel-size", "2")
PROGRAM = Path(sys.executable).with_name("llmprobe")
Loaded: TypeAlias = tuple[LocalAgent, Requests]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A server with kernel windows, its agent, and the requests that keep it busy."""
    folder = tmp_path_factory.mktemp("two")
    windows = {"LLMPROBE_KERNEL_WINDOWS": "0.1/3"}
    with serving(folder, FLAGS, env=windows) as server, Requests(server) as requests:
        wait(lambda: requests.answered >= 8 or requests.failures, "answers", 60)
        yield LocalAgent(server.directory), requests


def _two_ranks(agent: LocalAgent) -> list[dict[str, Any]] | None:
    ranks = list(agent.request("GET", "/api/status", timeout=30)[1]["servers"][0]["ranks"])
    return ranks if len(ranks) == 2 and all(rank["gpu"] for rank in ranks) else None


def _report(agent: LocalAgent, done: dict[str, Any]) -> dict[str, Any]:
    """Of a capture in which both GPUs were busy."""
    report: dict[str, Any] = agent.request("GET", done["report"], timeout=30)[1]
    print(json.dumps({name: report[name] for name in ("trust", "gpus", "phases", "operators")}, indent=1))
    assert report["trust"]["verdict"] != "untrusted", report["trust"]
    assert len(report["gpus"]) == 2
    assert min(gpu["busy_ratio"] for gpu in report["gpus"]) > 0
    steps = [
        row["steps"] for row in report["phases"] if row["name"] == "decode" and row["part"] is None
    ]  # of each GPU
    assert len(steps) == 2
    assert abs(steps[0] - steps[1]) < 0.3 * max(steps), "both run the same, and were recorded for as long"
    return report


def _alone(agent: LocalAgent) -> dict[str, float]:
    """Rank → seconds of decode in which only communication ran, by live windows."""
    text = str(agent.request("GET", "/metrics", timeout=30)[1])
    return {
        sample.labels["rank"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "llmprobe_device_time_seconds_total"
        and (sample.labels["phase"], sample.labels["component"]) == ("decode", "communication")
    }


@limited(330)
@pytest.mark.skipif(shutil.which("nsys") is None, reason="needs nsys")
def test_nsys_sees_both_ranks(tmp_path: Path) -> None:
    prefix = [str(PROGRAM), "run", "--nsys", "--no-summary", "--"]
    with serving(tmp_path, FLAGS, prefix) as server:
        agent = LocalAgent(server.directory)
        with Requests(server) as requests:
            wait(lambda: requests.answered >= 8 or requests.failures, "answers", 60)
            wait(lambda: tools(agent)["nsys"] is None, "nsys", 15)
            _report(agent, capture(agent, tool="nsys", seconds=1.0))
        assert requests.failures == []


@limited(330)
def test_both_ranks_are_measured_and_captured(loaded: Loaded) -> None:
    agent, requests = loaded
    ranks = wait(lambda: _two_ranks(agent), "two ranks, each with a GPU", 30)
    print(json.dumps(ranks, indent=1)[:6000])
    assert sorted(rank["rank"] for rank in ranks) == [0, 1]
    assert len({rank["gpu"]["uuid"] for rank in ranks}) == 2
    for tool in ("kernels", "torch"):
        before = requests.answered
        report = _report(agent, capture(agent, tool=tool, seconds=1.0))
        assert min(gpu["kernels"] for gpu in report["gpus"]) > 1000
        operators = {row["name"]: row for row in report["operators"]}
        assert operators["communication"]["share"] > 0
        wait(lambda before=before: requests.answered > before + 4, "further answers", 30)
    assert requests.failures == []


@limited(330)
def test_live_windows_see_what_communication_alone_takes(loaded: Loaded) -> None:
    agent, requests = loaded
    found = wait(
        lambda: found if len(found := _alone(agent)) == 2 and min(found.values()) > 0 else None,
        "communication in windows of both ranks",
        60,
    )
    print(found)
    assert requests.failures == []
