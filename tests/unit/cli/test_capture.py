"""``llmprobe capture`` against agents elsewhere, which may be anything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmprobe.cli.app import app

PATIENCE_SECONDS = 30.0
ID = "20261123-101501-ab12cd"
REPORT = {
    "trust": {"verdict": "trusted", "reasons": []},
    "gpus": [{"name": "GPU 0", "busy_ratio": 0.75, "idle_ratio": 0.25}],
    "phases": [
        {"name": "decode", "part": None, "gpu": "GPU 0", "sync_gap_ratio": 0.125},
        {"name": "decode", "part": "sample", "gpu": "GPU 0", "sync_gap_ratio": None},
    ],
}
LIVE = {"during": {"server": {"verdicts": {"decode": {"bottleneck": "memory_bound"}}}}}
FILES = [{"name": name} for name in ("report.json", "report.txt", "live.json")]


class Elsewhere:
    """A server that answers a POST, the GETs of captures, and those of files as it was told."""

    def __init__(self) -> None:
        self.begun: tuple[int, Any] = (202, self.capture())
        self.looked: tuple[int, Any] = (200, self.capture(state="done", files=FILES))
        self.files: dict[str, Any] = {
            "report.json": REPORT,
            "live.json": LIVE,
            "report.txt": "busy\x1b]0;evil\x07",
        }
        self.kind = "application/json"
        self.tokens: set[str | None] = set()
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        #: What is said of the length of report.txt, where it is not true; None: nothing.
        self.length: str | None = "true"
        #: A POST is taken at once, and answered once this is set.
        self.answering = threading.Event()
        self.answering.set()
        there = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                there.tokens.add(self.headers["Authorization"])
                there.answering.wait(PATIENCE_SECONDS)
                self.answer(*there.begun)

            def do_DELETE(self) -> None:
                there.cancelled.append(self.path)
                self.answer(200, {})

            def do_GET(self) -> None:
                there.asked.append(self.path)
                if self.path == f"/api/captures/{ID}":
                    self.answer(*there.looked)
                else:
                    self.answer(200, there.files.get(self.path.rpartition("/")[2], {}))

            def answer(self, status: int, body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                data = body.encode() if isinstance(body, str) else data
                self.send_response(status)
                self.send_header("Content-Type", there.kind)
                false = there.length if self.path.endswith("/report.txt") else "true"
                if false is not None:
                    self.send_header("Content-Length", str(len(data)) if false == "true" else false)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *said: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.node = f"127.0.0.1:{self.server.server_port}"

    @staticmethod
    def capture(**members: Any) -> dict[str, Any]:
        return {"id": ID, "state": "pending", "progress": None, "notes": [], **members}


@pytest.fixture
def nodes() -> Iterator[tuple[Elsewhere, Elsewhere]]:
    both = (Elsewhere(), Elsewhere())
    threads = [threading.Thread(target=one.server.serve_forever, args=(0.01,)) for one in both]
    for thread in threads:
        thread.start()
    yield both
    for one, thread in zip(both, threads, strict=True):
        one.server.shutdown()
        thread.join()
        one.server.server_close()


@pytest.fixture
def node(nodes: tuple[Elsewhere, Elsewhere]) -> Elsewhere:
    return nodes[0]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


def run(tmp_path: Path, *options: object) -> Result:
    result = CliRunner().invoke(app, ["capture", "--output", str(tmp_path / "out"), *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def written(tmp_path: Path) -> set[str]:
    return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}


def test_files_lie_in_a_folder_of_the_node(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "--target", node.node, "--token-file", token, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["node"] == node.node
    folder = tmp_path / "out" / node.node.replace(":", "-") / ID
    assert found["folder"] == str(folder)
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.txt", "live.json"}
    assert found["summary"] == {
        "trust": "trusted",
        "gpus": [
            {"name": "GPU 0", "busy_ratio": 0.75, "idle_ratio": 0.25, "sync_gap_ratio": {"decode": 0.125}}
        ],
        "bound_by": {"decode": "memory_bound"},
    }


def test_several_are_held_side_by_side_each_with_its_token(
    nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other@token"
    other.write_text("another")
    nodes[1].files["report.json"] = {**REPORT, "gpus": [], "phases": []}
    targets = ("--target", nodes[0].node, "--target", f"{other}@{nodes[1].node}")
    result = run(tmp_path, *targets, "--token-file", token)
    assert result.exit_code == 0, result.output
    assert [node.tokens for node in nodes] == [{"Bearer secret"}, {"Bearer another"}]
    assert "\x1b" not in result.stdout
    table = result.stdout[result.stdout.index("node ") :].splitlines()
    rows = {line.split()[0]: line for line in table[1:]}
    assert table[0].split() == [
        "node",
        "GPU",
        "busy",
        "idle",
        "gap",
        "decode",
        "capture",
        "live:",
        "bound",
        "by",
    ]
    assert rows[nodes[0].node].split()[1:] == [
        "GPU",
        "0",
        "75.0%",
        "25.0%",
        "12.5%",
        "trusted",
        "decode",
        "memory_bound",
    ]
    assert rows[nodes[1].node].split()[1:] == ["–", "–", "–", "–", "trusted", "decode", "memory_bound"]


def test_one_that_fails_is_in_the_table_too(
    nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path
) -> None:
    nodes[1].begun = (409, {"detail": "It is busy.", "next": "Wait."})
    targets = [word for node in nodes for word in ("--target", node.node)]
    result = run(tmp_path, *targets, "--token-file", token)
    assert result.exit_code == 1
    assert f"{nodes[1].node}: It is busy. Wait." in result.stderr
    assert "75.0%" in result.stdout


def test_what_no_agent_takes_is_wrong_usage(
    nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path
) -> None:
    nodes[1].begun = (422, {"detail": "tool: no such tool, not 'foo'.", "next": "See there."})
    result = run(tmp_path, "--target", nodes[1].node, "--token-file", token, "--tool", "foo")
    assert result.exit_code == 2
    assert "not 'foo'. See there." in result.stderr
    nodes[1].begun = (422, {"detail": "steps: 0.", "next": "See GET /openapi.json for what is allowed."})
    result = run(tmp_path, "--target", nodes[1].node, "--token-file", token, "--steps", "0")
    said = " ".join(result.stderr.split())
    assert said == "llmprobe: steps: 0. `llmprobe capture --help` says what is allowed."
    nodes[0].begun = (409, {"detail": "It is busy.", "next": "Wait."})
    targets = [word for node in nodes for word in ("--target", node.node)]
    assert run(tmp_path, *targets, "--token-file", token).exit_code == 1


def test_of_several_one_that_does_not_answer_is_named_once(
    nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path
) -> None:
    targets = ("--target", nodes[0].node, "--target", "127.0.0.1:9")
    result = run(tmp_path, *targets, "--token-file", token)
    assert "llmprobe: 127.0.0.1:9 does not answer" in result.stderr


def test_an_engine_that_is_taken_for_an_agent_is_said(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    node.begun = (404, {"detail": "Not Found"})  # as FastAPI, and so vLLM, answers
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert f"what answers as {node.node} is no llmprobe agent (it answers 404)" in result.stderr


def test_nothing_is_recorded_that_cannot_be_saved(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 2
    assert "is no directory" in result.stderr
    assert not node.tokens  # nobody was asked


def test_what_could_not_be_saved_is_still_to_be_had(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    taken = tmp_path / "out" / node.node.replace(":", "-") / ID
    taken.mkdir(parents=True)
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert f"{node.node} keeps it as /api/captures/{ID}" in result.stderr


@pytest.mark.parametrize("evil", ["../escaped", "/tmp/x", "..", "", ID + "/..", ID.upper(), None, 7])
def test_an_id_that_is_none_writes_nothing(node: Elsewhere, token: Path, tmp_path: Path, evil: Any) -> None:
    node.begun = (202, node.capture(id=evil))
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert "no llmprobe agent" in result.stderr
    assert written(tmp_path) == {"token"}


def test_another_id_later_on_is_refused(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    node.looked = (200, node.capture(id="20261123-101501-ffffff", state="done", files=FILES))
    assert "no llmprobe agent" in run(tmp_path, "--target", node.node, "--token-file", token).stderr
    assert written(tmp_path) == {"token"}


def test_only_names_that_there_are_become_files(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    names = [
        "../escaped",
        "/tmp/x",
        "capture.json",
        ".bashrc",
        "capture.nsys-rep",
        7,
        None,
        [],
        "a/report.txt",
    ]
    wrong = [{"name": name, "url": "http://127.0.0.1:1/"} for name in names]
    node.looked = (200, node.capture(state="done", files=[*FILES, *wrong, *FILES, "x"], url="/evil"))
    assert run(tmp_path, "--target", node.node, "--token-file", token).exit_code == 0
    assert {name.rpartition("/")[2] for name in written(tmp_path)} == {
        "token",
        "report.json",
        "report.txt",
        "live.json",
    }
    prefix = f"/api/captures/{ID}"
    assert all(path == prefix or path.startswith(f"{prefix}/files/") for path in node.asked)


@pytest.mark.parametrize(
    ("when", "kind"), [("begun", "text/html"), ("begun", "application/json"), ("looked", "application/json")]
)
@pytest.mark.parametrize("body", [b"\xff", b"<html>", b"[]", b"{}", b"[" * 100_000, b'"x"', b""])
def test_what_is_no_agent_is_said(
    node: Elsewhere, token: Path, tmp_path: Path, body: bytes, kind: str, when: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("llmprobe.cli.capture_follow._SILENCE_SECONDS", 0.0)
    node.kind = kind
    setattr(node, when, (202 if when == "begun" else 200, body))
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert "no llmprobe agent" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def gpu(busy: float) -> dict[str, Any]:
    return {**REPORT, "gpus": [{"name": "GPU 0", "busy_ratio": busy, "idle_ratio": 0.0}]}


@pytest.mark.parametrize(
    "report",
    [
        *([], {}, {**REPORT, "gpus": [7]}, {**REPORT, "phases": [{"name": 1}, 2]}),
        *(gpu(10**400), gpu(float("nan")), gpu(float("inf"))),
    ],
)
def test_a_report_that_is_none_is_said(node: Elsewhere, token: Path, tmp_path: Path, report: Any) -> None:
    node.files["report.json"] = report
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert "not what an agent writes" in result.stderr


@pytest.mark.parametrize("name", [file["name"] for file in FILES])
def test_a_file_that_is_not_sent_is_said(node: Elsewhere, token: Path, tmp_path: Path, name: str) -> None:
    node.looked = (200, node.capture(state="done", files=[file for file in FILES if file["name"] != name]))
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert f"no {name}" in result.stderr


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (None, "does not say how long"),
        ("-1", "does not say how long"),
        ("x", "does not say how long"),
        ("100", "broke off"),
        (str(1 << 60), "stay free"),
    ],
)
def test_a_file_comes_as_a_whole_or_not_at_all(
    node: Elsewhere, token: Path, tmp_path: Path, length: str | None, said: str
) -> None:
    node.length = length
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not any(name.endswith("report.txt") for name in written(tmp_path))


def test_a_report_of_no_end_is_not_read_into_memory(
    node: Elsewhere, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprobe.cli.capture._MOST_REPORT_BYTES", 3)
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert "report.json is larger" in result.stderr


def test_what_was_asked_for_while_it_is_interrupted_is_cancelled(
    nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path
) -> None:
    for one in nodes:
        one.answering.clear()
    targets = ("--target", nodes[0].node, "--target", nodes[1].node)
    command = [sys.executable, "-c", "from llmprobe.cli.app import main; main()", "capture", *targets]
    command += ["--token-file", str(token)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(one.tokens for one in nodes):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        for one in nodes:
            one.answering.set()
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode == 130, said
    assert said == "llmprobe: cancelled\n"
    assert [one.cancelled for one in nodes] == [[f"/api/captures/{ID}"]] * 2


def test_where_it_is_saved_is_said_on_one_line(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert f"saved {tmp_path / 'out' / node.node.replace(':', '-') / ID}\n" in result.stderr


def test_nodes_are_named_in_whole_where_the_table_is_narrow(
    nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path
) -> None:
    name = "GPU 0 (NVIDIA H100 80GB HBM3)"
    phases = [
        {"name": phase, "gpu": name, "sync_gap_ratio": 0.125} for phase in ("prefill", "decode", "mixed")
    ]
    for one in nodes:
        gpus = [{"name": name, "busy_ratio": 0.75, "idle_ratio": 0.25}]
        one.files["report.json"] = {**REPORT, "gpus": gpus, "phases": phases}
    targets = [word for node in nodes for word in ("--target", node.node)]
    result = run(tmp_path, *targets, "--token-file", token)
    table = result.stdout[result.stdout.index("node ") :].splitlines()
    assert {node.node for node in nodes} <= {line.split(" ")[0] for line in table}


def test_no_name_steers_the_terminal(nodes: tuple[Elsewhere, Elsewhere], token: Path, tmp_path: Path) -> None:
    evil = "\x1b[2Jevil\x9b2J\u202e"
    for one in nodes:
        one.files["report.json"] = {
            "trust": {"verdict": evil},
            "gpus": [{"name": evil, "busy_ratio": 0.75, "idle_ratio": 0.25}],
            "phases": [{"name": evil, "gpu": evil, "sync_gap_ratio": 0.125}],
        }
    nodes[0].looked = (200, nodes[0].capture(state="done", files=FILES, notes=[evil]))
    targets = [word for node in nodes for word in ("--target", node.node)]
    result = run(tmp_path, *targets, "--token-file", token)
    assert result.exit_code == 0, result.output
    assert "evil" in result.stdout
    assert not any(letter in result.output for letter in "\x1b\x9b\u202e")


@pytest.mark.parametrize("content", ["a\nb", "a b", "t\u00f6ken", "\u2603", "", "a\x00b"])
def test_a_file_that_holds_no_token_is_said(node: Elsewhere, tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    result = run(tmp_path, "--target", node.node, "--token-file", tmp_path / "token")
    assert result.exit_code == 2
    assert "holds no token" in result.stderr
    assert node.tokens == set()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("node:99999", "1 to 65535"),
        ("node:0", "1 to 65535"),
        ("node", "HOST:PORT"),
        (":9480", "HOST:PORT"),
        ("a b:9480", "HOST:PORT"),
        ("node:\u0661", "HOST:PORT"),
        ("missing@node:9480", "cannot read missing"),
    ],
)
def test_a_target_that_is_none_is_said(token: Path, tmp_path: Path, target: str, said: str) -> None:
    result = run(tmp_path, "--target", target, "--token-file", token)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_target_without_a_token_is_said(tmp_path: Path) -> None:
    result = run(tmp_path, "--target", "node:9480")
    assert result.exit_code == 2
    assert "FILE@node:9480" in result.stderr


def test_a_name_that_no_resolver_takes_is_said(token: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "--target", f"{'x' * 300}..y:9480", "--token-file", token)
    assert result.exit_code == 1
    assert "does not answer" in result.stderr


def test_a_refused_token_is_named_by_where_it_lies_here(node: Elsewhere, token: Path, tmp_path: Path) -> None:
    node.begun = (401, {"detail": "This needs the token.", "next": "It is in /dev/shm/there/token."})
    result = run(tmp_path, "--target", node.node, "--token-file", token)
    assert result.exit_code == 1
    assert str(token) in result.stderr
    assert "/dev/shm/there" not in result.stderr
