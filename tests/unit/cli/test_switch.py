"""``llmprobe off`` and ``llmprobe on`` where the agent has no answer to give."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmprobe.cli.app import app
from llmprobe.record.agent_launch import SOCKET_NAME


class _Full(BaseHTTPRequestHandler):
    """What uvicorn answers where all connections have a request that is being answered."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("content-type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(b"Service Unavailable")

    def address_string(self) -> str:
        return "local"

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LLMPROBE_DIR", str(tmp_path))
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / SOCKET_NAME), _Full) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.mark.parametrize("verb", ["off", "on", "status"])
def test_an_agent_that_has_no_time_is_one_line(full: None, verb: str) -> None:
    done = CliRunner().invoke(app, [verb])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert done.stderr == "llmprobe: the agent answered 503: Service Unavailable\n"
