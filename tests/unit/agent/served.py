"""An application behind a real socket, and what its problems look like."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from llmprobe.agent.server import _Server

HERE = "http://127.0.0.1:9480"
FACTS = {"group": "g", "role": "program", "server": "prog", "model_name": "m", "framework": "transformers"}


def problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["next"].endswith(".")
    return dict(body)


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
