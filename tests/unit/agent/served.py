"""An application behind a real socket, and what its problems look like."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprobe.agent.server import _Server
from llmprobe.collect.collector import Collector
from llmprobe.record.layout import Clock, Phase
from llmprobe.record.recorder import Recorder

HERE = "http://127.0.0.1:9480"
FACTS = {"group": "g", "role": "program", "server": "prog", "model_name": "m", "framework": "transformers"}


def problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["next"].endswith(".")
    return dict(body)


@contextlib.contextmanager
def collected(directory: Path) -> Iterator[Collector]:
    """A collector that has read a real journal of three decode steps."""
    recorder = Recorder.open(directory, "program", FACTS)
    for number in range(1, 4):
        at = number * 10_000_000
        recorder.begin(int(Phase.DECODE), 1, at)
        times = (at, at + 5_000_000, at + 5_000_000, at + 6_000_000)
        counts = {"requests": 1, "prefill_requests": 0, "prompt_tokens": 0, "decode_tokens": 1}
        recorder.step(number, at, int(Phase.DECODE), int(Clock.HOST), 0, times, **counts)
    collector = Collector(directory, own_writers=lambda: {recorder.writer.path: recorder.writer})
    collector.tick(final=True)
    yield collector
    collector.close()
    recorder.close(remove=True)


@contextlib.contextmanager
def serving(app: Any) -> Iterator[tuple[str, int]]:
    """The app behind a real socket and the agent's own server; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(app, listener)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()
