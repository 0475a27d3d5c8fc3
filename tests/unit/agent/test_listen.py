"""Sockets: the next free port, private Unix sockets, long directories."""

from __future__ import annotations

import json
import logging
import socket
import stat
from pathlib import Path

import pytest

from llmprobe.agent import listen
from llmprobe.agent.client import AgentError, request


def taken_port() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


def test_a_taken_port_means_the_next_free_one_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with taken_port() as taken, caplog.at_level(logging.WARNING):
        port = taken.getsockname()[1]
        bound = listen.bind_tcp("127.0.0.1", port)
        assert bound is not None
        with bound:
            found = bound.getsockname()[1]
            assert port < found <= port + 50
    (record,) = caplog.records
    assert str(port) in record.message
    assert str(found) in record.message


@pytest.mark.parametrize("host", ["192.0.2.1", "node..example"])
def test_an_address_that_is_not_ours_is_said_and_not_fatal(
    caplog: pytest.LogCaptureFixture, host: str
) -> None:
    with caplog.at_level(logging.ERROR):
        assert listen.bind_tcp(host, 9480) is None
    assert "LLMPROBE_LISTEN" in caplog.text


def test_the_unix_socket_is_its_owners_alone_and_replaces_a_dead_one(tmp_path: Path) -> None:
    listen.bind_unix(tmp_path).close()
    with listen.bind_unix(tmp_path):
        assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600


def test_something_else_in_its_place_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "agent.sock").write_text("precious")
    with pytest.raises(FileExistsError):
        listen.bind_unix(tmp_path)
    assert (tmp_path / "agent.sock").read_text() == "precious"


def test_a_directory_too_deep_for_a_socket_address_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with listen.bind_unix(deep) as bound, socket.socket(socket.AF_UNIX) as client:
        with listen.short_socket_path(deep) as address:
            client.connect(address)
        bound.accept()[0].close()


def test_the_note_says_where_the_agent_is(tmp_path: Path) -> None:
    with taken_port() as bound:
        listen.publish(tmp_path, listen.about(tmp_path, bound, ("127.0.0.1", 9480)))
        info = json.loads((tmp_path / "agent.json").read_text())
        assert (info["address"], info["port"]) == bound.getsockname()
    assert info["requested"] == "127.0.0.1:9480"
    (tmp_path / "agent.json").unlink()
    listen.publish(tmp_path, listen.about(tmp_path, None, ("::1", 9480)))
    info = json.loads((tmp_path / "agent.json").read_text())
    assert (info["port"], info["requested"]) == (None, "[::1]:9480")
    listen.unpublish(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_asking_where_no_agent_is_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="LLMPROBE=1"):
        request(tmp_path, "GET", "/api/status")
    listen.bind_unix(tmp_path).close()
    with pytest.raises(AgentError, match="llmprobe agent"):
        request(tmp_path, "GET", "/api/status")
