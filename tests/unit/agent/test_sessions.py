"""The cookie that a page gets for the token: what it opens, for whom, and when it ends."""

from __future__ import annotations

from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from llmprobe.agent.door import Door, door_for
from llmprobe.agent.files import Token, write_atomically
from llmprobe.agent.service import State, create_app
from llmprobe.agent.sessions import SECONDS, Sessions, cookie_name
from llmprobe.collect.collector import Collector

HERE = "http://127.0.0.1:9480"
NAME = "llmprobe_session_9480"
OURS = {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def token(tmp_path: Path) -> Token:
    return Token.make(tmp_path)


@pytest.fixture
def door(token: Token) -> Door:
    return door_for("127.0.0.1", token, token_file_given=False)


@pytest.fixture
def browser(tmp_path: Path, door: Door) -> TestClient:
    """On our own page, with nothing yet."""
    app = create_app(State(Collector(tmp_path), tmp_path), door)
    return TestClient(app, base_url=HERE, headers=OURS)


def log_in(browser: TestClient, token: Token) -> str:
    """Exchange the token; returns what the cookie holds."""
    answer = browser.post("/api/session", headers={"Authorization": f"Bearer {token.value()}"})
    assert answer.status_code == 200, answer.text
    return str(browser.cookies[NAME])


def switch(browser: TestClient, **headers: str) -> int:
    return browser.post("/api/probe", json={"armed": True}, headers=headers).status_code


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(
    browser: TestClient, token: Token
) -> None:
    answer = browser.post("/api/session", headers={"Authorization": f"Bearer {token.value()}"})
    jar = SimpleCookie(answer.headers["set-cookie"])
    assert list(jar) == [NAME]
    cookie = jar[NAME]
    assert cookie["httponly"] is True
    assert (cookie["samesite"], cookie["path"]) == ("strict", "/api")
    assert cookie["max-age"] == str(SECONDS)
    assert not cookie["domain"]  # of this host alone
    assert len(cookie.value) >= 40
    assert token.value() not in answer.headers["set-cookie"] + answer.text
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer "])
def test_without_the_token_there_is_none(browser: TestClient, given: str | None) -> None:
    answer = browser.post("/api/session", headers={} if given is None else {"Authorization": given})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_the_cookie_alone_opens_what_needs_the_token(browser: TestClient, token: Token) -> None:
    assert switch(browser) == 401
    assert browser.get("/api/session").json()["open"] is False
    log_in(browser, token)
    assert switch(browser) == 200
    said = browser.get("/api/session").json()
    assert said["open"] is True
    assert 0 < said["seconds_left"] <= SECONDS


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "http://127.0.0.1"]
)
def test_with_the_origin_of_another_site_or_port_it_opens_nothing(
    browser: TestClient, token: Token, origin: str
) -> None:
    log_in(browser, token)
    for site in ("cross-site", "same-site", "same-origin"):
        assert switch(browser, **{"Origin": origin, "Sec-Fetch-Site": site}) == 403
        assert browser.delete("/api/session", headers={"Origin": origin}).status_code == 403
    assert switch(browser) == 200


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("none", 401), ("", 401), ("SAME-ORIGIN", 401)],
)
def test_what_a_browser_says_comes_from_elsewhere_opens_nothing(
    browser: TestClient, token: Token, site: str, status: int
) -> None:
    log_in(browser, token)
    assert switch(browser, **{"Sec-Fetch-Site": site}) == status


def test_a_change_that_says_nothing_of_where_it_comes_from_is_refused(
    door: Door, browser: TestClient, token: Token
) -> None:
    cookie = {"host": "127.0.0.1:9480", "cookie": f"{NAME}={log_in(browser, token)}"}
    refused = door.check("POST", "/api/probe", cookie)
    assert refused is not None and refused.status == 401
    assert door.check("POST", "/api/probe", {**cookie, "origin": HERE}) is None
    # Over plain HTTP beyond loopback browsers send neither with what only reads.
    assert door.check("GET", "/api/captures", cookie) is None
    assert door.check("GET", "/api/captures", {**cookie, "sec-fetch-site": "none"}) is None  # typed by hand
    assert door.check("GET", "/api/captures", {**cookie, "sec-fetch-site": "same-site"}) is not None
    assert door.check("GET", "/api/captures", {**cookie, "host": "evil.example"}) is not None


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "{name}=",
        "{name}=wrong",
        "{name}={token}",
        "other={value}",
        "{name}_={value}",
        "{name}={value}x",
        "\x00;",
    ],
)
def test_another_cookie_opens_nothing(door: Door, browser: TestClient, token: Token, cookie: str) -> None:
    value = log_in(browser, token)
    text = cookie.format(name=NAME, value=value, token=token.value())
    headers = {"host": "127.0.0.1:9480", "cookie": text}
    assert door.check("GET", "/api/captures", headers) is not None


@pytest.mark.parametrize(
    "cookie",
    [
        'a={{"x":1}}; {name}={value}',
        "{name}={value}; a=[1, 2]; b=ü",
        "a=b c; ;=;x;{name}={value}",
        "  {name} = {value} ",
        'a="; {name}={value}',
        "{name}=of-another-path; {name}={value}",
        "{name}={value}; {name}=of-another-path",
        '{name}="{value}"',
    ],
)
def test_what_else_is_in_the_header_does_not_shut_it_out(
    door: Door, browser: TestClient, token: Token, cookie: str
) -> None:
    value = log_in(browser, token)
    headers = {"host": "127.0.0.1:9480", "cookie": cookie.format(name=NAME, value=value)}
    assert door.check("GET", "/api/captures", headers) is None
    assert browser.get("/api/session", headers={"Cookie": headers["cookie"].encode()}).json()["open"] is True


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_header_of_any_sort_is_taken(before: str, after: str) -> None:
    sessions = Sessions(Token(Path("/nonexistent")), clock=lambda: 0.0)
    value = sessions.begin()
    cookie = f"{before.replace(';', '')};{NAME}={value};{after}"
    assert sessions.seconds_left({"host": "127.0.0.1:9480", "cookie": cookie}) == SECONDS
    assert sessions.seconds_left({"host": "127.0.0.1:9480", "cookie": before}) is None


def test_of_another_door_or_port_it_opens_nothing(door: Door, browser: TestClient, token: Token) -> None:
    value = log_in(browser, token)
    headers = {"host": "127.0.0.1:9480", "cookie": f"{NAME}={value}"}
    assert door.check("GET", "/api/captures", {**headers, "host": "127.0.0.1:9481"}) is not None
    assert door_for("127.0.0.1", token, False).check("GET", "/api/captures", headers) is not None
    assert cookie_name({"host": "[::1]:9481"}) == "llmprobe_session_9481"
    assert cookie_name({"host": "node"}) == cookie_name({"host": "node:x"}) == "llmprobe_session_80"


def test_leaving_ends_it_also_for_who_kept_the_cookie(door: Door, browser: TestClient, token: Token) -> None:
    value = log_in(browser, token)
    answer = browser.delete("/api/session")
    assert answer.json()["ended"] is True
    assert NAME not in browser.cookies
    headers = {"host": "127.0.0.1:9480", "cookie": f"{NAME}={value}", "origin": HERE}
    assert door.check("POST", "/api/probe", headers) is not None
    bearer = {"Authorization": f"Bearer {token.value()}"}
    assert browser.delete("/api/session", headers=bearer).json()["ended"] is False


def test_leaving_ends_every_one_that_was_sent(door: Door, browser: TestClient, token: Token) -> None:
    first, second = log_in(browser, token), log_in(browser, token)
    both = f"{NAME}={first}; {NAME}={second}"
    assert browser.delete("/api/session", headers={"Cookie": both}).json()["ended"] is True
    for value in (first, second):
        headers = {"host": "127.0.0.1:9480", "cookie": f"{NAME}={value}"}
        assert door.check("GET", "/api/captures", headers) is not None


def test_a_cookie_is_not_exchanged_for_a_longer_one(browser: TestClient, token: Token) -> None:
    log_in(browser, token)
    answer = browser.post("/api/session")
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_another_token_ends_all(browser: TestClient, token: Token) -> None:
    log_in(browser, token)
    write_atomically(token.path, b"another\n")
    assert switch(browser) == 401
    write_atomically(token.path, b"")
    assert switch(browser) == 401


def test_it_ends_with_its_time_and_there_are_not_more_than_64(token: Token) -> None:
    now = 0.0
    sessions = Sessions(token, clock=lambda: now)

    def opens(value: str) -> bool:
        return sessions.admits("GET", {"host": "h:1", "cookie": f"llmprobe_session_1={value}"})

    first = sessions.begin()
    now = SECONDS - 1.0
    assert opens(first)
    now = SECONDS
    assert not opens(first)
    many = [sessions.begin() for _ in range(70)]
    assert [opens(value) for value in many] == [False] * 6 + [True] * 64


def test_beyond_loopback_it_opens_reading_too(tmp_path: Path, token: Token) -> None:
    door = door_for("0.0.0.0", token, token_file_given=True)
    app = create_app(State(Collector(tmp_path), tmp_path), door)
    page = TestClient(app, base_url="http://10.0.0.7:9480")
    assert page.get("/api/status").status_code == 401
    log_in(page, token)
    assert page.get("/api/status").status_code == 200
    assert page.post("/api/probe", json={"armed": True}).status_code == 401
    ours = {"Origin": "http://10.0.0.7:9480"}
    assert page.post("/api/probe", json={"armed": True}, headers=ours).status_code == 200


def test_where_no_page_can_come_in_there_are_none(tmp_path: Path, token: Token) -> None:
    state = State(Collector(tmp_path), tmp_path)
    unix = TestClient(create_app(state, Door("unix", None)), base_url="http://localhost")
    assert unix.post("/api/session").status_code == 404
    shut = TestClient(create_app(state, door_for("0.0.0.0", token, False)), base_url="http://10.0.0.7")
    bearer = {"Authorization": f"Bearer {token.value()}"}
    assert shut.post("/api/session", headers=bearer).status_code == 403
