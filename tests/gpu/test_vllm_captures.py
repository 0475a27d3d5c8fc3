"""Captures of a real ``vllm serve`` on a GPU, over HTTP, while it answers requests.

Where it fails, the capture's state, the end of the server's log and the agent's are in the output.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.agent.client import AgentError, LocalAgent
from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer
from llmprobe.settings import default_directory

from .limits import limited

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAME = "captured"
#: Compiling and the capture of graphs take most of it.
START_SECONDS = 180.0
CAPTURE_SECONDS = 60.0
FINAL = ("done", "failed", "cancelled")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmServer]:
    """One that answers, and its agent; what they said is printed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="llmprobe-test-", dir=default_directory().parent))
    flags = ["--served-model-name", NAME, "--max-model-len", "2048", "--max-num-seqs", "8"]
    flags += ["--gpu-memory-utilization", "0.3"]
    environment = {"LLMPROBE_CAPTURE_DIR": str(tmp_path / "kept")}
    started = VllmServer.start(
        make_model(tmp_path / "model"), directory, tmp_path / "vllm.log", flags, environment
    )
    try:
        started.wait_ready(START_SECONDS)
        started.wait_agent()
        yield started
    finally:
        print("the server:", started.last_lines(60), sep="\n")
        with contextlib.suppress(OSError):
            print("its agent:", (directory / "agent.log").read_text()[-4000:], sep="\n")
        started.stop()


class Requests:
    """Four at a time, from entering the ``with`` block to leaving it."""

    def __init__(self, server: VllmServer) -> None:
        self.answered = 0
        self.failures: list[Exception] = []
        self._url = f"{server.url}/v1/completions"
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(4)]

    def __enter__(self) -> Requests:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _send(self) -> None:
        body = {"model": NAME, "prompt": "one two three", "max_tokens": 200, "ignore_eos": True}
        wanted = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        while not self._over.is_set():
            try:
                with urllib.request.urlopen(wanted, timeout=60) as answer:
                    answer.read()
                self.answered += 1
            except Exception as error:
                self.failures.append(error)
                return


def capture(agent: LocalAgent, **wanted: Any) -> dict[str, Any]:
    """Begin one and return it once it is done; prints it in whatever state it ends."""
    status, answer = agent.request("POST", "/api/captures", wanted, timeout=30)
    assert status == 202, answer
    found: dict[str, Any] = answer
    try:
        found = wait(lambda: _ended(agent, str(answer["url"])), f"end of {answer}", CAPTURE_SECONDS)
    finally:
        print("the capture:", json.dumps(agent.request("GET", str(answer["url"]))[1], indent=1))
    assert found["state"] == "done", found["reason"]
    return found


def _ended(agent: LocalAgent, url: str) -> dict[str, Any] | None:
    found = dict(agent.request("GET", url, timeout=30)[1])
    return found if found["state"] in FINAL else None


def wait(ready: Callable[[], Any], what: str, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AgentError):  # one that was replaced
            if found := ready():
                return found
        assert time.monotonic() < deadline, f"no {what} after {seconds:g} s"
        time.sleep(0.2)


@limited(330)
def test_every_tool_captures_a_server_that_goes_on(server: VllmServer) -> None:
    agent = LocalAgent(server.directory)

    def tools() -> dict[str, str | None]:
        ((_, found),) = agent.request("GET", "/api/captures")[1]["tools"].items()
        return dict(found)

    with Requests(server) as requests:
        wait(lambda: requests.answered >= 8 or requests.failures, "answers", 60)
        wait(lambda: tools()["kernels"] is None and tools()["torch"] is None, "tools", 15)
        assert "llmprobe run --nsys" in (tools()["nsys"] or "")
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
        wait(lambda: _ended(agent, str(answer["url"])), "end of auto's", CAPTURE_SECONDS)
    assert server.process.poll() is None
