"""Captures of a real ``vllm serve`` on a GPU, over HTTP, while it answers requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprobe.agent.client import LocalAgent
from llmprobe.demo.server import VllmServer

from .captured_server import CAPTURE_SECONDS, Requests, capture, ended, serving, tools, wait
from .limits import limited

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmServer]:
    with serving(tmp_path) as started:
        yield started


@limited(330)
def test_every_tool_captures_a_server_that_goes_on(server: VllmServer) -> None:
    agent = LocalAgent(server.directory)
    with Requests(server) as requests:
        wait(lambda: requests.answered >= 8 or requests.failures, "answers", 60)
        wait(lambda: not any(map(tools(agent).get, ("kernels", "torch"))), "tools", 15)
        assert "llmprobe run --nsys" in (tools(agent)["nsys"] or "")
        for tool in ("kernels", "torch", "kernels"):
            before = requests.answered
            done = capture(agent, tool=tool, seconds=1.0)
            report = agent.request("GET", done["report"], timeout=30)[1]
            phases = {row["name"]: row for row in report["phases"] if row["part"] is None}
            print(tool, json.dumps({"trust": report["trust"], "gpus": report["gpus"], "phases": phases}))
            assert report["trust"]["verdict"] != "untrusted", report["trust"]
            assert report["gpus"][0]["kernels"] > 1000
            assert phases["decode"]["steps"] > 20
            assert phases["decode"]["sync_gap_ratio"] is not None
            wait(lambda before=before: requests.answered > before + 4, "further answers", 30)
            assert requests.failures == []
        status, answer = agent.request("POST", "/api/captures", {"steps": 20}, timeout=30)
        assert (status, answer["request"]["tool"]) == (202, "kernels")  # auto, where torch holds the lock
        wait(lambda: ended(agent, str(answer["url"])), "end of auto's", CAPTURE_SECONDS)
    assert server.process.poll() is None
