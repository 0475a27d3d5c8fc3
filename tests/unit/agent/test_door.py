"""Who may ask what, by the way they come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprobe.agent.door import Door, door_for, is_loopback
from llmprobe.agent.files import Token

HERE = {"host": "127.0.0.1:9480"}


@pytest.fixture
def token(tmp_path: Path) -> Token:
    return Token.make(tmp_path)


def bearer(token: Token) -> dict[str, str]:
    return {**HERE, "authorization": f"Bearer {token.value()}"}


def status(door: Door, method: str, path: str, headers: dict[str, str]) -> int:
    problem = door.check(method, path, headers)
    return 200 if problem is None else problem.status


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_reads_without_a_token(token: Token, host: str) -> None:
    door = door_for(host, token, token_file_given=False)
    for path in ("/metrics", "/healthz", "/api/status", "/"):
        assert status(door, "GET", path, HERE) == 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "localhost:9480", "[::1]:9480", "LOCALHOST", "10.0.0.7:80", "127.0.0.1"]
)
def test_names_of_this_machine_are_hosts(token: Token, host: str) -> None:
    assert status(door_for("127.0.0.1", token, False), "GET", "/api/status", {"host": host}) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9480", "", "127.0.0.1.evil.example", "localhost.evil.example", "["]
)
def test_a_rebound_name_is_refused_on_loopback(token: Token, host: str) -> None:
    door = door_for("127.0.0.1", token, False)
    for path in ("/metrics", "/api/status"):
        assert status(door, "GET", path, {"host": host}) == 403
    assert status(door, "POST", "/api/probe", {**bearer(token), "host": host}) == 403
    assert status(door, "GET", "/metrics", {}) == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "https://["])
def test_pages_of_others_are_refused(token: Token, origin: str) -> None:
    door = door_for("127.0.0.1", token, False)
    assert status(door, "POST", "/api/probe", {**bearer(token), "origin": origin}) == 403
    assert status(door, "GET", "/api/status", {**HERE, "origin": origin}) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site"])
@pytest.mark.parametrize("mode", [{}, {"sec-fetch-mode": "no-cors"}, {"sec-fetch-mode": "navigate"}])
def test_what_a_page_of_others_asks_for_is_refused_also_where_it_only_reads(
    token: Token, site: str, mode: dict[str, str]
) -> None:
    there = {**bearer(token), **mode, "sec-fetch-site": site, "sec-fetch-dest": "image"}
    for door in (door_for("127.0.0.1", token, False), door_for("0.0.0.0", token, True)):
        for path in ("/api/events", "/api/status", "/metrics", "/healthz", "/", "/openapi.json"):
            assert status(door, "GET", path, there) == 403
            assert status(door, "HEAD", path, there) == 403
        assert status(door, "POST", "/api/probe", there) == 403
    shut = door_for("0.0.0.0", token, False)
    problem = shut.check("GET", "/metrics", there)
    assert problem is not None
    assert (problem.status, problem.next != "") == (403, True)


@pytest.mark.parametrize("site", [None, "none", "same-origin"])
def test_scrapers_programs_and_our_own_page_still_read(token: Token, site: str | None) -> None:
    headers = HERE if site is None else {**HERE, "sec-fetch-site": site}
    door = door_for("127.0.0.1", token, False)
    for path in ("/", "/metrics", "/api/events", "/api/status"):
        assert status(door, "GET", path, headers) == 200
    assert status(door_for("0.0.0.0", token, False), "GET", "/metrics", headers) == 200


def test_a_link_on_another_page_may_lead_to_a_page_but_to_nothing_else(token: Token) -> None:
    link = {
        **HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"
    }  # fmt: skip
    door = door_for("127.0.0.1", token, False)
    assert status(door, "GET", "/", link) == 200
    assert status(door, "GET", "/", {**link, "sec-fetch-dest": "iframe"}) == 403
    assert status(door, "POST", "/", link) == 403
    for path in ("/api/events", "/api/status", "/api/captures"):
        assert status(door, "GET", path, link) == 403


def test_our_own_page_is_not(token: Token) -> None:
    door = door_for("127.0.0.1", token, False)
    assert status(door, "POST", "/api/probe", {**bearer(token), "origin": "http://127.0.0.1:9480"}) == 200


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer ünï"])
def test_switches_need_the_token_even_on_loopback(token: Token, given: str | None) -> None:
    headers = HERE if given is None else {**HERE, "authorization": given.format(token.value())}
    problem = door_for("127.0.0.1", token, False).check("POST", "/api/probe", headers)
    assert problem is not None
    assert problem.status == 401
    assert str(token.path) in problem.next
    assert token.value() not in problem.next


def test_the_token_opens_switches(token: Token) -> None:
    assert status(door_for("127.0.0.1", token, False), "POST", "/api/probe", bearer(token)) == 200


def test_an_empty_token_file_opens_nothing(tmp_path: Path) -> None:
    empty = Token(tmp_path / "empty")
    empty.path.write_text("\n")
    for given in ("Bearer ", "Bearer"):
        headers = {**HERE, "authorization": given}
        assert status(door_for("127.0.0.1", empty, True), "POST", "/api/probe", headers) == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "node7"])
def test_beyond_loopback_without_a_token_file_only_scrapes_are_served(token: Token, host: str) -> None:
    door = door_for(host, token, token_file_given=False)
    assert status(door, "GET", "/metrics", {"host": "node7.cluster:9480"}) == 200
    assert status(door, "GET", "/healthz", HERE) == 200
    for method, path in (
        ("GET", "/api/status"),
        ("GET", "/"),
        ("GET", "/openapi.json"),
        ("POST", "/metrics"),
    ):
        assert status(door, method, path, bearer(token)) == 403


def test_beyond_loopback_the_token_is_needed_to_read_too(token: Token) -> None:
    door = door_for("0.0.0.0", token, token_file_given=True)
    assert status(door, "GET", "/metrics", {"host": "anything"}) == 200
    assert status(door, "GET", "/api/status", HERE) == 401
    assert status(door, "GET", "/api/status", bearer(token)) == 200
    assert status(door, "GET", "/api/status", {**bearer(token), "host": "evil.example"}) == 403


def test_the_unix_socket_asks_nothing() -> None:
    assert status(Door("unix", None), "POST", "/api/probe", {}) == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com", "10.0.0.1"])
def test_other_addresses_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)
