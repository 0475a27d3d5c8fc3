"""Asking the agent from the same node, over its Unix socket: no port to know, no token to send."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from llmprobe.agent.listen import short_socket_path
from llmprobe.record.agent_launch import LOG_NAME


class AgentError(Exception):
    """No agent answers; the message says what to do."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the socket in an agent's directory."""

    def __init__(self, directory: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._directory = directory

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with short_socket_path(self._directory) as address:
            self.sock.connect(address)


def request(
    directory: Path, method: str, path: str, body: Any = None, *, timeout: float = 10.0
) -> tuple[int, Any]:
    """Ask the agent that serves ``directory``.

    Args:
        path: such as ``/api/status``, with the query.
        body: sent as JSON unless None.
        timeout: seconds.

    Returns:
        HTTP status and the answer: parsed if it is JSON, else text.

    Raises:
        AgentError: no agent runs there, or it does not answer.
    """
    connection = _UnixConnection(directory, timeout)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {} if data is None else {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    except (FileNotFoundError, ConnectionRefusedError):
        raise AgentError(
            f"no agent serves {directory}: start an engine with LLMPROBE=1, or run `llmprobe agent`; "
            "if LLMPROBE_DIR is set for the engine, set it here too"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise AgentError(
            f"the agent of {directory} does not answer ({error}); see {directory / LOG_NAME}"
        ) from None
    finally:
        connection.close()
    if "json" in response.headers.get("content-type", ""):
        return response.status, json.loads(text)
    return response.status, text
