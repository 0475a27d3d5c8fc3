"""Captures over HTTP, as a user and as an abuser: never a 5xx, nothing outside a capture's folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from capture.scripted_nsys import ScriptedNsys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from llmprobe.agent.captures import Watched
from llmprobe.agent.door import Door, door_for
from llmprobe.agent.files import Token
from llmprobe.agent.service import State, create_app
from llmprobe.capture.manager import Manager
from llmprobe.capture.session import Capture, Request
from llmprobe.capture.store import LIVE, PUBLIC_FILES, RAW
from llmprobe.collect.collector import Collector
from llmprobe.record.layout import Clock, Phase
from llmprobe.record.recorder import Recorder

from .served import FACTS, HERE, problem

NEVER = "sync_gap_ratio > 9"


def done(manager: Manager, files: dict[str, bytes]) -> Capture:
    """A finished capture with these files."""
    capture = Capture(
        id=manager.store.new_id(),
        owner="/gone",
        server="prog",
        group="g",
        request=Request("nsys", 1.0, None),
        times={"pending": 1.0},
    )
    for step in ("recording", "importing", "analysing", "done"):
        capture = capture.enter(step, 2.0)
    manager.store.create(capture)
    for name, content in files.items():
        (manager.store.folder(capture.id) / name).write_bytes(content)
    return capture


def test_a_capture_begins_with_its_url(client: TestClient, nsys: ScriptedNsys) -> None:
    answer = client.post("/api/captures", json={"when": NEVER, "label": "mine"})
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["location"] == body["url"] == f"/api/captures/{body['id']}"
    assert (body["state"], body["server"], body["request"]["label"]) == ("pending", "prog", "mine")
    assert body["request"]["seconds"] == 5.0
    assert client.get(body["url"]).json()["state"] == "pending"
    listed = client.get("/api/captures").json()
    assert [capture["id"] for capture in listed["captures"]] == [body["id"]]
    assert listed["tools"]["prog"]["nsys"] is None
    assert client.delete(body["url"]).json()["removed"] is True
    problem(client.get(body["url"]), 404)


def test_each_ranks_steps_are_known_by_themselves(tmp_path: Path) -> None:
    facts = {**FACTS, "role": "worker", "framework": "vllm", "rank": 0}
    ranks = [Recorder.open(tmp_path, "worker", {**facts, "engine": engine}) for engine in range(2)]
    for rank, recorder in enumerate(ranks):
        for number in range(1, 2 + rank):
            at = number * 10_000_000
            recorder.begin(int(Phase.DECODE), 1, at)
            times = (at, at + 5_000_000, at + 5_000_000, at + 6_000_000)
            counts = {"requests": 1, "prefill_requests": 0, "prompt_tokens": 0, "decode_tokens": 1}
            recorder.step(number, at, int(Phase.DECODE), int(Clock.HOST), 0, times, **counts)
    collector = Collector(tmp_path, own_writers=lambda: {one.writer.path: one.writer for one in ranks})
    collector.tick(final=True)
    live = Watched(collector).live(Capture("1", "/", "prog", "g", Request("torch", 1.0, None)))
    collector.close()
    for recorder in ranks:
        recorder.close(remove=True)
    assert live is not None
    assert sorted(steps["decode"] for steps in live.steps.values()) == [1, 2]


def test_status_says_what_can_be_captured(client: TestClient, nsys: ScriptedNsys) -> None:
    shown = client.get("/api/status").json()["agent"]["captures"]
    assert shown["tools"]["prog"]["nsys"] is None
    assert "has not said" in shown["tools"]["prog"]["torch"]
    assert shown["ended"] == []
    assert shown["nsys"] == {"prog": {"trace": ["nvtx"], "cuda_graph_trace": None}}
    assert client.get("/api/captures").json()["nsys"] == shown["nsys"]


def test_an_nsys_that_is_no_more_is_refused_and_shown(client: TestClient, nsys: ScriptedNsys) -> None:
    nsys.set_state("Shutdown")
    answer = problem(client.post("/api/captures", json={"tool": "nsys"}), 409)
    assert "nsys's own process of the server's session has failed" in answer["detail"]
    listed = client.get("/api/captures").json()
    assert listed["captures"] == []
    assert listed["tools"]["prog"]["nsys"] in answer["detail"]
    assert nsys.calls() == []


def test_a_second_one_is_refused_with_a_link_and_may_queue(client: TestClient, nsys: ScriptedNsys) -> None:
    first = client.post("/api/captures", json={"when": NEVER}).json()
    nsys.does("hang")  # which is not even asked for one that may not begin
    asked = nsys.asked()
    refused = client.post("/api/captures", json={})
    assert first["id"] in problem(refused, 409)["detail"]
    assert nsys.asked() == asked
    # What could never be captured is said as such, also while another one runs.
    problem(client.post("/api/captures", json={"when": "bogus > 1"}), 422)
    problem(client.post("/api/captures", json={"seconds": 3600}), 422)
    nsys.undo("hang")
    assert refused.headers["link"] == f'<{first["url"]}>; rel="related"'
    assert client.post("/api/captures", json={"when": NEVER, "queue": True}).status_code == 202


def test_a_server_without_nsys_is_409_that_says_how(client: TestClient) -> None:
    for wanted in ({}, {"tool": "nsys"}):
        assert "llmprobe run --nsys" in problem(client.post("/api/captures", json=wanted), 409)["detail"]


@pytest.mark.parametrize("tool", ["torch", "kernels"])
def test_a_tool_that_cannot_is_409_with_what_the_process_says(
    client: TestClient, nsys: ScriptedNsys, tool: str
) -> None:
    assert "has not said" in problem(client.post("/api/captures", json={"tool": tool}), 409)["detail"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tool": "foo"}, "body.tool: Input should be 'auto', 'nsys', 'torch' or 'kernels', not 'foo'."),
        ({"seconds": -1.5}, "body.seconds: Input should be greater than 0, not -1.5."),
        ({"seconds": 1.0, "steps": 2}, "body: seconds and steps exclude each other."),
        ({"server": "x" * 1000}, "body.server: String should have at most 128 characters."),
        ({"second": 2}, "body.second: there is no such member."),
        ([], "The body is JSON, but no object."),
    ],
)
def test_what_is_wrong_is_said_with_its_value(client: TestClient, body: Any, said: str) -> None:
    assert problem(client.post("/api/captures", json=body), 422)["detail"] == said


@pytest.mark.parametrize(
    ("content", "media", "said"),
    [
        (b"{}", "application/x-www-form-urlencoded", "Content-Type: application/json, and there is 'appl"),
        (b"{}", None, "Content-Type: application/json, and there is none."),
        (b"", "application/json", "The body is empty, and a JSON object is wanted"),
        (b"", None, "The body is empty, and a JSON object is wanted"),
        (b"{seconds: 2}", "application/json", "The body is no JSON, at character 1: Expecting property name"),
    ],
)
def test_a_body_that_is_no_json_is_told_what_it_lacks(
    client: TestClient, content: bytes, media: str | None, said: str
) -> None:
    headers = {} if media is None else {"Content-Type": media}
    assert said in problem(client.post("/api/captures", content=content, headers=headers), 422)["detail"]


@pytest.mark.parametrize(
    "body",
    [
        [],
        "now",
        {"tool": "gdb"},
        {"tool": "nsys; reboot"},
        {"seconds": 0},
        {"seconds": -1},
        {"seconds": "5"},
        {"seconds": 61},
        {"seconds": 1e308},
        {"seconds": True},
        {"steps": 1.5},
        {"steps": 0},
        {"seconds": 1, "steps": 1},
        {"when": "$(reboot)"},
        {"when": "x" * 201},
        {"when": 3},
        {"label": "two\nlines"},
        {"label": "x" * 101},
        {"label": "nul\0"},
        {"ranks": [-1]},
        {"ranks": [0, 7]},
        {"ranks": "all"},
        {"ranks": []},
        {"torch_cpu": 1},
        {"tool": "nsys", "torch_cpu": True},
        {"tool": "kernels", "torch_stacks": True},
        {"torch_stacks": "yes"},
        {"queue": "yes"},
        {"output": "/etc/passwd"},
        {"id": "../../x"},
        {"wait_seconds": -1},
    ],
)
def test_a_wrong_request_is_422_and_begins_nothing(
    client: TestClient, nsys: ScriptedNsys, manager: Manager, body: Any
) -> None:
    problem(client.post("/api/captures", json=body), 422)
    assert nsys.calls() == []
    assert not manager.store.root.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"NaN", b'{"seconds": NaN}', b"[" * 20000])
def test_a_body_that_is_no_json_is_a_problem(client: TestClient, content: bytes) -> None:
    answer = client.post("/api/captures", content=content, headers={"Content-Type": "application/json"})
    problem(answer, 400 if len(content) > 1000 else 422)  # nested deeper than Python's parser goes


def test_an_unknown_server_is_404(client: TestClient, nsys: ScriptedNsys) -> None:
    problem(client.post("/api/captures", json={"server": "../prog"}), 404)


def test_an_unusable_directory_is_409_with_mount_and_variable(
    client: TestClient, manager: Manager, nsys: ScriptedNsys
) -> None:
    manager.store.root = Path("/sys/captures")
    said = problem(client.post("/api/captures", json={}), 409)["detail"]
    assert "/sys/captures" in said
    assert "LLMPROBE_CAPTURE_DIR" in said


CALLS = [
    ("POST", "/api/captures"),
    ("GET", "/api/captures"),
    ("GET", "/api/captures/20261123-101500-ab12cd"),
    ("DELETE", "/api/captures/20261123-101500-ab12cd"),
    ("GET", "/api/captures/20261123-101500-ab12cd/report"),
    ("GET", "/api/captures/20261123-101500-ab12cd/files/report.json"),
    ("GET", "/api/captures/20261123-101500-ab12cd/files/capture.nsys-rep?raw=1"),
    ("HEAD", "/api/captures"),
    ("OPTIONS", "/api/captures"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer ", "Basic x"])
def test_everything_about_captures_needs_the_token_even_on_loopback(
    bare: TestClient, method: str, path: str, given: str | None
) -> None:
    headers = {} if given is None else {"Authorization": given}
    assert bare.request(method, path, headers=headers).status_code == 401


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_other_sites_and_rebound_names_are_refused_with_the_token_too(
    client: TestClient, method: str, path: str
) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert client.request(method, path, headers=headers).status_code == 403


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_beyond_loopback_without_a_token_file_there_are_no_captures(
    state: State, token: Token, method: str, path: str
) -> None:
    door = door_for("0.0.0.0", token, token_file_given=False)
    there = TestClient(create_app(state, door), base_url="http://10.0.0.1:9480")
    assert (
        there.request(method, path, headers={"Authorization": f"Bearer {token.value()}"}).status_code == 403
    )


def test_files_come_as_they_are_for_saving(client: TestClient, manager: Manager) -> None:
    content = {name: os.urandom(300_000) for name in PUBLIC_FILES}
    capture = done(manager, content)
    for name in PUBLIC_FILES:
        answer = client.get(f"/api/captures/{capture.id}/files/{name}")
        assert answer.content == content[name]
        assert answer.headers["content-length"] == "300000"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


def test_the_report_comes_as_json_or_text(client: TestClient, manager: Manager) -> None:
    capture = done(manager, {"report.json": b'{"a": 1}', "report.txt": b"text"})
    assert client.get(f"/api/captures/{capture.id}/report").json() == {"a": 1}
    answer = client.get(f"/api/captures/{capture.id}/report", headers={"Accept": "text/plain"})
    assert answer.text == "text"


def test_the_raw_file_needs_to_be_wanted_and_warns(client: TestClient, manager: Manager) -> None:
    capture = done(manager, {RAW: b"environment"})
    url = f"/api/captures/{capture.id}/files/{RAW}"
    assert "environment" in problem(client.get(url), 403)["detail"]
    problem(client.get(f"{url}?raw=0"), 403)
    problem(client.get(f"{url}?raw=yes"), 422)
    answer = client.get(f"{url}?raw=1")
    assert answer.content == b"environment"
    assert "environment" in answer.headers["x-llmprobe-warning"]


def test_a_pages_cookie_opens_all_files_but_raw_ones(
    client: TestClient, manager: Manager, token: Token
) -> None:
    capture = done(manager, {RAW: b"environment", "report.json": b"{}"})
    assert client.post("/api/session").status_code == 200
    del client.headers["Authorization"]
    assert client.get(f"/api/captures/{capture.id}/files/report.json").status_code == 200
    said = problem(client.get(f"/api/captures/{capture.id}/files/{RAW}?raw=1"), 403)
    assert "cookie" in said["detail"]
    bearer = {"Authorization": f"Bearer {token.value()}"}
    assert client.get(f"/api/captures/{capture.id}/files/{RAW}?raw=1", headers=bearer).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "{id}/files/capture.json",
        "{id}/files/raw.sqlite",
        "{id}/files/.report.json",
        "{id}/files/..%2f..%2fsecret",
        "{id}/files/%2e%2e/secret",
        "{id}/files/%00",
        "{id}/files/report.json%00.txt",
        "{id}/files/report.json%0d%0aX-Evil:%201",
        "{id}%2f..%2f{id}/files/report.json",
        "..%2f..%2fsecret/report",
        "%2e%2e/report",
        "%2e%2e%2fsecret",
        "20261123-101500-ab12cd/report",
        "x" * 5000,
        "{id}/files/" + "x" * 5000,
        "%ff%fe",
    ],
)
def test_no_other_file_can_be_asked_for(
    client: TestClient, manager: Manager, tmp_path: Path, path: str
) -> None:
    capture = done(manager, {"report.json": b"{}", "raw.sqlite": b"environment"})
    (tmp_path / "secret").write_text("environment")
    (manager.store.root / "secret").write_text("environment")
    answer = client.get("/api/captures/" + path.format(id=capture.id))
    problem(answer, 404)
    assert "environment" not in answer.text
    assert "X-Evil" not in answer.headers


def test_links_in_a_folder_lead_nowhere(client: TestClient, manager: Manager, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("environment")
    capture = done(manager, {})
    folder = manager.store.folder(capture.id)
    (folder / "report.json").symlink_to(secret)
    os.link(secret, folder / LIVE)
    os.mkfifo(folder / "report.txt")
    for name in ("report.json", LIVE, "report.txt"):
        problem(client.get(f"/api/captures/{capture.id}/files/{name}"), 404)
    problem(client.get(f"/api/captures/{capture.id}/report"), 404)


def test_deleting_goes_no_further_than_the_folder(
    client: TestClient, manager: Manager, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    capture = done(manager, {})
    (manager.store.folder(capture.id) / "link").symlink_to(elsewhere)
    for wrong in ("..", "%2e%2e", "..%2felsewhere", "."):
        assert client.delete(f"/api/captures/{wrong}").status_code in (404, 405)
    assert client.delete(f"/api/captures/{capture.id}").json()["removed"] is True
    assert (elsewhere / "mine").exists()
    problem(client.delete(f"/api/captures/{capture.id}"), 404)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be removed, whoever asks: root may write where the mode says no."""

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "rename", refuse)


def test_what_cannot_be_removed_is_a_problem_that_names_the_mount(
    client: TestClient, manager: Manager, read_only: None
) -> None:
    capture = done(manager, {})
    detail = problem(client.delete(f"/api/captures/{capture.id}"), 409)["detail"]
    assert f"mount a writable volume at {manager.store.root}" in detail
    assert "LLMPROBE_CAPTURE_DIR" in detail
    assert client.get(f"/api/captures/{capture.id}").json()["state"] == "done"


def test_one_that_goes_on_is_stopped_where_it_cannot_be_removed(
    client: TestClient, nsys: ScriptedNsys, read_only: None
) -> None:
    url = client.post("/api/captures", json={"when": NEVER}).json()["url"]
    assert "LLMPROBE_CAPTURE_DIR" in problem(client.delete(url), 409)["detail"]
    assert client.get(url).json()["state"] == "cancelled"


def test_captures_that_go_while_they_are_listed_break_nothing(
    client: TestClient, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, goes = done(manager, {}), done(manager, {})
    listed = manager.store.all

    def all_and_then_one_goes() -> list[Capture]:
        found = listed()
        manager.store.remove(goes.id)
        return found

    monkeypatch.setattr(manager.store, "all", all_and_then_one_goes)
    said = client.get("/api/captures").json()["captures"]
    assert {stays.id} <= {capture["id"] for capture in said} <= {stays.id, goes.id}


def test_a_report_is_not_there_before_its_time(client: TestClient, nsys: ScriptedNsys) -> None:
    url = client.post("/api/captures", json={"when": NEVER}).json()["url"]
    assert "pending" in problem(client.get(f"{url}/report"), 409)["detail"]
    problem(client.get(f"{url}/files/report.json"), 409)


def test_every_call_is_in_the_log_with_its_outcome(
    bare: TestClient, token: Token, nsys: ScriptedNsys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bare.post("/api/captures", json={})
    bare.post("/api/probe", json={"armed": True})
    bare.delete("/api/captures/a%0aFAKE LINE")
    headers = {"Authorization": f"Bearer {token.value()}"}
    bare.post("/api/captures", json={"when": NEVER, "label": "it's me"}, headers=headers)
    said = [record.getMessage() for record in caplog.records if record.name == "llmprobe.audit"]
    assert said[0].startswith("POST '/api/captures' from testclient:")
    assert said[0].endswith("(loopback): 401")
    assert said[1].endswith("(loopback): 401")
    assert "'/api/captures/a\\nFAKE LINE'" in said[2]
    assert "it's me" in said[3]
    assert said[4].endswith("(loopback): 202")
    assert not any(token.value() in line or "\n" in line for line in said)


TEXT = st.text(max_size=40)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "tool",
    "server",
    "seconds",
    "steps",
    "when",
    "wait_seconds",
    "ranks",
    "label",
    "queue",
    "torch_cpu",
    "other",
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4) | ANYTHING, TEXT, TEXT)
def test_no_body_and_no_path_makes_it_fail(state: State, body: Any, capture_id: str, name: str) -> None:
    """Errors of the agent are raised here; all others are problems."""
    from urllib.parse import quote

    there = TestClient(create_app(state, Door("unix", None)), base_url=HERE)
    sent = json.dumps(body).encode("utf-8", "surrogatepass")
    answers = [
        there.post("/api/captures", content=sent, headers={"Content-Type": "application/json"}),
        there.get(f"/api/captures/{quote(capture_id)}"),
        there.delete(f"/api/captures/{quote(capture_id)}"),
        there.get(f"/api/captures/{quote(capture_id)}/files/{quote(name)}"),
    ]
    for answer in answers:
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json"


def test_no_word_of_a_request_reaches_a_command_line(
    client: TestClient, manager: Manager, nsys: ScriptedNsys, tmp_path: Path
) -> None:
    evil = f"$(touch {tmp_path}/evil);`touch {tmp_path}/evil` --output=/tmp/evil -o evil && touch evil"
    wanted = {"seconds": 0.1, "label": evil[:100]}
    url = client.post("/api/captures", json=wanted).json()["url"]
    deadline = time.monotonic() + 60
    while client.get(url).json()["state"] not in ("done", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    calls = nsys.calls()
    assert [line.split()[0] for line in calls][:2] == ["start", "stop"]
    assert not [line for line in calls if "evil" in line or "touch" in line]
    assert not list(tmp_path.rglob("*evil*"))
