"""What the agent answers, through its real application."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llmprobe.agent.door import Door, door_for
from llmprobe.agent.files import Token
from llmprobe.agent.problems import Problem
from llmprobe.agent.service import State, Switching, create_app

from .served import collected


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    """Of an agent without captures."""
    with collected(tmp_path) as collector:
        yield State(collector, tmp_path, since_read=lambda: 0.1)


@pytest.fixture
def client(state: State, token: Token) -> TestClient:
    door = door_for("127.0.0.1", token, token_file_given=False)
    return TestClient(create_app(state, door), base_url="http://127.0.0.1:9480")


def auth(token: Token) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.value()}"}


def problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["next"].endswith(".")
    return dict(body)


def test_metrics_are_prometheus_text(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'llmprobe_step_duration_seconds_count{engine="0",model_name="m",phase="decode"' in answer.text
    assert "llmprobe_build_info" in answer.text
    assert "process_resident_memory_bytes" in answer.text


def test_metrics_are_openmetrics_when_asked(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=xx",
        "text/plain;version=zz;escaping=underscores",
        "application/openmetrics-text;version=1.x",
        "text/plain;version=",
    ],
)
def test_metrics_are_there_whatever_version_is_asked_for(client: TestClient, accept: str) -> None:
    answer = client.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    assert "llmprobe_build_info" in answer.text


def test_health_is_ok_while_journals_are_read(client: TestClient, state: State) -> None:
    assert client.get("/healthz").json()["processes"] == 1
    for stuck in (lambda: None, lambda: 60.0):
        state.since_read = stuck
        assert "agent.log" in problem(client.get("/healthz"), 503)["next"]


def test_status_shows_servers_and_the_agent(client: TestClient) -> None:
    status = client.get("/api/status").json()
    assert status["schema_version"] == 1
    assert status["servers"][0]["server"] == "prog"
    assert status["agent"]["switch"] is None


def test_steps_come_newest_last_and_as_many_as_asked(client: TestClient) -> None:
    steps = client.get("/api/steps?last=2").json()["steps"]
    assert [step["step"] for step in steps] == [2, 3]
    assert steps[0]["span_seconds"] == pytest.approx(0.006)


@pytest.mark.parametrize("last", ["0", "x", "99999"])
def test_a_wrong_number_of_steps_is_a_problem_that_names_it(client: TestClient, last: str) -> None:
    assert "last" in problem(client.get(f"/api/steps?last={last}"), 422)["detail"]


def test_the_switch_is_written_for_engines(
    client: TestClient, state: State, token: Token, tmp_path: Path
) -> None:
    answer = client.post("/api/probe", json={"armed": False}, headers=auth(token))
    assert answer.status_code == 200
    control = json.loads((tmp_path / "control.json").read_text())
    assert (control["armed"], control["servers"]) == (False, None)
    answer = client.post("/api/probe", json={"armed": True, "servers": ["prog"]}, headers=auth(token))
    (view,) = state.reader.views()
    (rank,) = view.ranks
    assert rank.journal is not None
    assert (answer.json()["servers"], answer.json()["journals"]) == (["prog"], [rank.journal.name])
    assert client.get("/api/status").json()["agent"]["switch"]["armed"] is True


def test_a_switch_is_not_taken_away_before_engines_see_it(
    client: TestClient, state: State, token: Token, tmp_path: Path
) -> None:
    stood: list[bool] = []

    async def pause(seconds: float) -> None:
        assert 0 < seconds <= 1
        stood.append(json.loads((tmp_path / "control.json").read_text())["armed"])

    state.switch = Switching(pause)
    for armed, servers in ((False, ["prog"]), (True, ["prog"]), (False, None), (True, ["prog"]), (False, [])):
        answer = client.post("/api/probe", json={"armed": armed, "servers": servers}, headers=auth(token))
        assert answer.status_code == 200
    assert stood == [False, True]


def test_the_switch_needs_the_token(client: TestClient, tmp_path: Path) -> None:
    problem(client.post("/api/probe", json={"armed": False}), 401)
    assert not (tmp_path / "control.json").exists()


@pytest.mark.parametrize("body", [{}, {"armed": "yes"}, {"armed": True, "server": "a"}, [], {"armed": 1}])
def test_a_wrong_switch_is_a_problem(client: TestClient, token: Token, body: Any, tmp_path: Path) -> None:
    problem(client.post("/api/probe", json=body, headers=auth(token)), 422)
    assert not (tmp_path / "control.json").exists()


@pytest.mark.parametrize(
    "body",
    [rb'{"armed": true, "servers": ["\ud800"]}', rb'{"armed": true, "\ud800": 1}', rb'{"armed": "\ud800"}'],
)
def test_what_utf8_cannot_say_is_a_problem(client: TestClient, token: Token, body: bytes) -> None:
    headers = {**auth(token), "Content-Type": "application/json"}
    problem(client.post("/api/probe", content=body, headers=headers), 422)


def test_a_problem_can_be_said_whatever_it_names() -> None:
    said = json.loads(Problem(404, "No such server: \ud800.", "Ask for \udfff.").response().body)
    assert (said["detail"], said["next"]) == ("No such server: ?.", "Ask for ?.")


def test_an_unknown_server_is_named_with_those_there_are(client: TestClient, token: Token) -> None:
    answer = client.post("/api/probe", json={"armed": True, "servers": ["nope"]}, headers=auth(token))
    body = problem(answer, 404)
    assert "nope" in body["detail"]
    assert "prog" in body["next"]


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    assert "/nope" in problem(client.get("/nope"), 404)["detail"]
    answer = client.delete("/api/status")
    problem(answer, 401)
    problem(client.get("/api/probe"), 405)


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/status"])
def test_head_is_answered_as_get_without_its_body(client: TestClient, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert whole.content
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert (
        client.head(path, headers={"Host": "evil.example"}).status_code
        == client.get(path, headers={"Host": "evil.example"}).status_code
    )


def test_head_of_what_does_not_end_is_refused(client: TestClient) -> None:
    assert client.head("/api/events").status_code == 405


def test_another_host_is_refused_before_anything_runs(client: TestClient) -> None:
    problem(client.get("/metrics", headers={"Host": "evil.example"}), 403)


def test_the_service_describes_itself_without_foreign_scripts(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/metrics", "/healthz", "/api/status", "/api/steps", "/api/probe"} <= set(paths)
    problem(client.get("/docs"), 404)
    assert "/api/status" in client.get("/").text


def test_the_unix_door_switches_without_a_token(state: State) -> None:
    client = TestClient(create_app(state, Door("unix", None)))
    assert client.post("/api/probe", json={"armed": True}).status_code == 200


def test_an_error_of_ours_is_a_problem_too(state: State, token: Token) -> None:
    class Broken:
        def views(self) -> list[Any]:
            raise RuntimeError("broken")

    state.reader = Broken()  # type: ignore[assignment]
    door = door_for("127.0.0.1", token, False)
    client = TestClient(create_app(state, door), base_url="http://127.0.0.1", raise_server_exceptions=False)
    assert "RuntimeError" in problem(client.get("/metrics"), 500)["detail"]
