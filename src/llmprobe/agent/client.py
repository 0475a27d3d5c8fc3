"""Asking an agent: on the same node over its Unix socket (no port to know, no token to send), or over TCP."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprobe.agent.listen import short_socket_path
from llmprobe.record.agent_launch import LOG_NAME

_MOST_ANSWER_BYTES = 64 << 20
#: Of a disk that files of an agent, which may be anything, are fetched to.
_STAYS_FREE_BYTES = 256 << 20


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


class Agent(ABC):
    """One agent to ask. ``name`` is how messages call it."""

    name: str

    def request(self, method: str, path: str, body: Any = None, *, timeout: float = 10.0) -> tuple[int, Any]:
        """Ask it.

        Args:
            path: such as ``/api/status``, with the query.
            body: sent as JSON unless None.
            timeout: seconds.

        Returns:
            HTTP status and the answer: parsed if it is JSON, else text.

        Raises:
            AgentError: no agent runs there, it does not answer, or what answers is none.
        """
        connection = self._connect(timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            kind = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, {**self._headers(), **kind})
            response = connection.getresponse()
            data = response.read(_MOST_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        if len(data) > _MOST_ANSWER_BYTES:
            raise self.foreign(f"an answer of more than {_MOST_ANSWER_BYTES >> 20} MiB")
        try:
            text = data.decode()
            if "json" in response.headers.get("content-type", ""):
                return response.status, json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.foreign(f"{type(error).__name__} in its answer") from None
        return response.status, text

    def foreign(self, why: str) -> AgentError:
        """The error that says that something else answers there."""
        return AgentError(f"what answers as {self.name} is no llmprobe agent ({why})")

    def download(self, path: str, target: Path, *, timeout: float = 60.0) -> None:
        """Fetch a file into ``target``, which must not be there yet: as a whole or not at all. Mode 0600.

        Raises:
            AgentError: it could not be had, or there is no room for it.
            OSError: ``target`` cannot be written.
        """
        connection = self._connect(timeout)
        try:
            connection.request("GET", path, headers=self._headers())
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise AgentError(f"{self.name} answered {response.status} for {path}")
            self._save(response, path, target)
        except (ConnectionError, http.client.HTTPException, TimeoutError, UnicodeError) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()

    def _save(self, response: http.client.HTTPResponse, path: str, target: Path) -> None:
        size = response.length
        if size is None:  # it could send for ever
            raise self.foreign(f"it does not say how long {path} is")
        free = shutil.disk_usage(target.parent).free
        if size > free - _STAYS_FREE_BYTES:
            raise AgentError(
                f"{path} of {self.name} has {size >> 20} MiB; {target.parent} has {free >> 20} MiB free, "
                f"of which {_STAYS_FREE_BYTES >> 20} MiB stay free"
            )
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
                if file.tell() != size:
                    raise AgentError(f"{self.name} broke off while sending {path}")
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    @abstractmethod
    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        """A connection that is not open yet."""

    def _headers(self) -> Mapping[str, str]:
        return {}

    def _unreachable(self, error: Exception) -> AgentError:
        return AgentError(f"{self.name} does not answer ({error})")


class LocalAgent(Agent):
    """The agent that serves a directory of this node."""

    def __init__(self, directory: Path) -> None:
        self.name = f"the agent of {directory}"
        self._directory = directory

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        return _UnixConnection(self._directory, timeout)

    def _unreachable(self, error: Exception) -> AgentError:
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            return AgentError(
                f"no agent serves {self._directory}: an engine with LLMPROBE=1 brings one up once its "
                "model is loaded, `llmprobe agent` at once; if LLMPROBE_DIR is set for the engine, set it "
                "here too"
            )
        return AgentError(f"{self.name} does not answer ({error}); see {self._directory / LOG_NAME}")


class RemoteAgent(Agent):
    """An agent that listens on a TCP port. Plain HTTP: the token is for a network that you trust."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._host = host
        self._port = port
        self._token = token

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    def _headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self._token}"}


def request(
    directory: Path, method: str, path: str, body: Any = None, *, timeout: float = 10.0
) -> tuple[int, Any]:
    """Ask the agent that serves ``directory``; see `Agent.request`."""
    return LocalAgent(directory).request(method, path, body, timeout=timeout)
