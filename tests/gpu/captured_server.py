"""A real ``vllm serve`` on a GPU under load, and captures of it over HTTP.

Where something fails, the capture's state, the end of the server's log and the agent's are in the output.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprobe.agent.client import AgentError, LocalAgent
from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer
from llmprobe.settings import default_directory

NAME = "captured"
#: Compiling and the capture of graphs take most of it.
START_SECONDS = 180.0
CAPTURE_SECONDS = 60.0
FINAL = ("done", "failed", "cancelled")


@contextlib.contextmanager
def serving(
    folder: Path, flags: Sequence[str] = (), prefix: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[VllmServer]:
    """One that answers, and its agent; what they said is printed at the end.

    Args:
        folder: the model, the log and the captures go there.
        flags: further ones of ``vllm serve``.
        prefix: a command that starts the server.
        env: further variables of it.
    """
    directory = Path(tempfile.mkdtemp(prefix="llmprobe-test-", dir=default_directory().parent))
    common = ["--served-model-name", NAME, "--max-model-len", "2048", "--max-num-seqs", "8"]
    common += ["--gpu-memory-utilization", "0.3"]
    environment = {"LLMPROBE_CAPTURE_DIR": str(folder / "kept"), **(env or {})}
    started = VllmServer.start(
        make_model(folder / "model"),
        directory,
        folder / "vllm.log",
        [*common, *flags],
        environment,
        prefix=prefix,
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
        found = wait(lambda: ended(agent, str(answer["url"])), f"end of {answer}", CAPTURE_SECONDS)
    finally:
        print("the capture:", json.dumps(agent.request("GET", str(answer["url"]))[1], indent=1))
    assert found["state"] == "done", found["reason"]
    return found


def ended(agent: LocalAgent, url: str) -> dict[str, Any] | None:
    """The capture, once it is over."""
    found = dict(agent.request("GET", url, timeout=30)[1])
    return found if found["state"] in FINAL else None


def wait(ready: Callable[[], Any], what: str, seconds: float) -> Any:
    """What ``ready`` returns once it is something; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AgentError):  # one that was replaced
            if found := ready():
                return found
        assert time.monotonic() < deadline, f"no {what} after {seconds:g} s"
        time.sleep(0.2)


def tools(agent: LocalAgent) -> dict[str, str | None]:
    """What can capture the only server: tool → None, or why it cannot."""
    ((_, found),) = agent.request("GET", "/api/captures")[1]["tools"].items()
    return dict(found)
