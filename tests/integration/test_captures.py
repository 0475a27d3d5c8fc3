"""Captures with the real nsys: from ``llmprobe run --nsys`` over HTTP to scrubbed files, and its deaths."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import PATIENCE_SECONDS, until

from llmprobe.agent.client import LocalAgent
from llmprobe.capture.nsys import Nsys, Session
from llmprobe.record.agent_launch import agent_info, agent_running

pytestmark = pytest.mark.integration

SECRET = "planted-5ecret-never-to-be-seen"
BIN = Path(sys.executable).parent
FINAL = ("done", "failed", "cancelled")


@pytest.fixture(scope="session")
def nsys() -> str:
    """The nsys that `make setup` fetched, the one on PATH, or the one that LLMPROBE_TEST_NSYS names."""
    here = BIN.parent / "nsys" / "usr/lib/x86_64-linux-gnu/nsight-systems/target-linux-x64/nsys"
    for found in (os.environ.get("LLMPROBE_TEST_NSYS"), shutil.which("nsys"), str(here)):
        if found and Path(found).exists():
            return found
    pytest.skip("no nsys: scripts/setup.py --nsys fetches one, LLMPROBE_TEST_NSYS names one")


@dataclass
class Wrapped:
    """A program under ``llmprobe run --nsys``, and the agent that watches it."""

    process: subprocess.Popen[str]
    directory: Path
    captures: Path
    output: Path

    @property
    def agent(self) -> LocalAgent:
        return LocalAgent(self.directory)

    @property
    def target(self) -> psutil.Process:
        """The program itself, as it called itself when it began to serve."""
        return psutil.Process(
            until(
                lambda: int(m[1]) if (m := re.search(r"serving as (\d+)", self.said())) else None, "program"
            )
        )

    def said(self) -> str:
        return self.output.read_text()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return self.agent.request(method, path, body, timeout=PATIENCE_SECONDS)

    def begin(self, **wanted: Any) -> str:
        """Begin a capture; returns its URL."""
        until(lambda: self.ask("GET", "/api/status")[1]["servers"], "server")
        status, answer = self.ask("POST", "/api/captures", wanted)
        assert status == 202, answer
        return str(answer["url"])

    def state(self, url: str, *states: str) -> dict[str, Any]:
        """The capture once it is in one of these states."""

        def ready() -> dict[str, Any] | None:
            answer = self.ask("GET", url)[1]
            assert answer["state"] in states or answer["state"] not in FINAL, answer
            return answer if answer["state"] in states else None

        return dict(until(ready, f"state {states}"))

    def hang(self) -> None:
        """Return once its worker stays in a step."""
        self.target.send_signal(signal.SIGUSR1)
        until(lambda: (self.rank()["step_running_seconds"] or 0) > 0.5, "a step that does not end")

    def rank(self) -> dict[str, Any]:
        return dict(self.ask("GET", "/api/status")[1]["servers"][0]["ranks"][0])

    def recording(self, url: str) -> None:
        """Return once nsys records: only then there is progress."""
        until(lambda: self.state(url, "recording")["progress"] is not None, "recording")

    def session(self) -> dict[str, Any]:
        (note,) = (self.directory / "nsys").glob("*.json")
        return dict(json.loads(note.read_text()))

    def events(self) -> list[dict[str, Any]]:
        """What the agent has saved of them."""
        path = self.directory / "events.json"
        saved = json.loads(path.read_text())["events"] if path.exists() else []
        return [json.loads(text) for _number, text in saved]

    def launch_line(self) -> list[str]:
        """With what nsys launched the program."""
        return next(line for found in self.nsys_processes() if "launch" in (line := found.cmdline()))

    def nsys_processes(self) -> list[psutil.Process]:
        """nsys's own processes of this program, but not the program."""
        session = self.session() if list((self.directory / "nsys").glob("*.json")) else None
        mark = str(session["name"]) if session else "llmprobe-nsys-"
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if line and "nsys" in Path(line[0]).name and any(mark in word for word in line):
                found.append(process)
        return found


@pytest.fixture
def wrapped(nsys: str, tmp_path: Path) -> Iterator[Callable[..., Wrapped]]:
    """Starts programs under ``llmprobe run --nsys``; nothing of them is left afterwards."""
    directory = Path(f"/dev/shm/llmprobe-test-captures-{os.getpid()}")
    started: list[Wrapped] = []

    def start(*command: str, options: str = "--trace nvtx,osrt", **variables: str) -> Wrapped:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "tmp").mkdir()
        output = tmp_path / "output"
        environment = {
            **os.environ,
            "LLMPROBE_DIR": str(directory),
            "LLMPROBE_LISTEN": f"127.0.0.1:{port}",
            "LLMPROBE_CAPTURE_DIR": str(tmp_path / "captures"),
            "TMPDIR": str(tmp_path / "tmp"),
            "PLANTED_SECRET": SECRET,
            **variables,
        }
        program = command or (sys.executable, str(Path(__file__).with_name("captured_program.py")))
        with output.open("w") as file:
            process = subprocess.Popen(
                [
                    str(BIN / "llmprobe"),
                    "run",
                    f"--nsys={nsys}",
                    *options.split(),
                    "--no-summary",
                    "--",
                    *program,
                ],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(Wrapped(process, directory, tmp_path / "captures", output))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(PATIENCE_SECONDS)
        print(one.said())
    if (directory / "agent.log").exists():
        print((directory / "agent.log").read_text())
    if info := agent_info(directory):
        os.kill(info["pid"], signal.SIGKILL)
        until(lambda: not agent_running(directory), "end of the agent")
    shutil.rmtree(directory, ignore_errors=True)


def call(one: Wrapped, method: str, path: str, token: str | None, body: Any = None) -> tuple[int, bytes]:
    """Over TCP, as curl would."""
    info = agent_info(one.directory)
    assert info is not None
    connection = http.client.HTTPConnection(info["address"], info["port"], timeout=PATIENCE_SECONDS)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def capture_verb(one: Wrapped, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "llmprobe"), "capture", "--json", "--output", str(tmp_path / "fetched"), *options],
        env={**os.environ, "LLMPROBE_DIR": str(one.directory)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_a_capture_from_http_to_files_without_secrets(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    one = wrapped()
    until(lambda: one.ask("GET", "/api/status")[1]["servers"], "server")
    token = (one.directory / "token").read_text().strip()
    wanted = {"tool": "nsys", "seconds": 0.5, "label": "whole path", "when": "next decode"}
    assert call(one, "POST", "/api/captures", None, wanted)[0] == 401
    status, answer = call(one, "POST", "/api/captures", token, wanted)
    assert status == 202, answer
    url = json.loads(answer)["url"]
    assert call(one, "POST", "/api/captures", token, wanted)[0] == 409
    done = one.state(url, "done")
    assert list(done["times"]) == ["pending", "recording", "importing", "analysing", "done"]
    names = {file["name"] for file in done["files"]}
    assert names == {"report.json", "report.txt", "capture.sqlite", "live.json", "capture.nsys-rep"}

    for name in names - {"capture.nsys-rep"}:
        status, content = call(one, "GET", f"{url}/files/{name}", token)
        assert status == 200
        assert content
        assert SECRET.encode() not in content, name
        assert call(one, "GET", f"{url}/files/{name}", None)[0] == 401
    status, report = call(one, "GET", f"{url}/report", token)
    assert json.loads(report)["trust"]["verdict"] == "untrusted"  # there is no GPU here
    assert call(one, "GET", f"{url}/files/capture.nsys-rep", token)[0] == 403
    status, raw = call(one, "GET", f"{url}/files/capture.nsys-rep?raw=1", token)
    assert status == 200
    assert SECRET.encode() in raw  # or this test could not fail
    live = json.loads(call(one, "GET", f"{url}/files/live.json", token)[1])
    for when in ("before", "during", "after"):
        assert live[when]["server"]["ranks"][0]["steps"]["decode"] > 0
    assert live["meanwhile"]["ranks"][0]["figures"]["decode"]["steps"] > 0
    kept = one.captures / done["id"]
    assert {path.name for path in kept.iterdir()} == names | {"capture.json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.iterdir())

    # Another one on the same server, from the shell, as on two nodes: here it is one agent, which takes one.
    info = agent_info(one.directory)
    assert info is not None
    target = ["--target", f"{info['address']}:{info['port']}"] * 2
    token_file = ["--token-file", str(one.directory / "token")]
    shell = capture_verb(one, tmp_path, "--steps", "20", *target, *token_file)
    assert shell.returncode == 1
    assert "one runs at a time" in shell.stderr
    fetched, refused = sorted(json.loads(shell.stdout), key=lambda found: found["error"] is not None)
    assert refused["capture"] is None
    folder = Path(fetched["folder"])
    assert {path.name for path in folder.iterdir()} == names - {"capture.nsys-rep"}
    assert not [path for path in folder.iterdir() if SECRET.encode() in path.read_bytes()]
    assert fetched["report"]["schema_version"] == 1
    # And one that is taken back while it records.
    url = one.begin(seconds=30)
    one.recording(url)
    assert one.ask("DELETE", url)[0] in (200, 202)
    until(lambda: one.ask("GET", url)[0] == 404, "end of it")
    assert not (one.captures / url.rpartition("/")[2]).exists()
    assert one.ask("GET", "/api/captures")[1]["tools"][fetched["capture"]["server"]]["nsys"] is None

    temporary = Path(one.session()["temporary"])
    assert SECRET not in "".join(path.read_text(errors="replace") for path in temporary.rglob("*.log"))
    one.process.terminate()
    assert one.process.wait(PATIENCE_SECONDS) == 7
    assert not temporary.exists()
    assert not list((one.directory / "nsys").iterdir())
    assert not [found for found in one.nsys_processes() if found.status() != psutil.STATUS_ZOMBIE]


def test_a_recording_goes_on_after_its_agent_was_killed(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped()
    url = one.begin(seconds=4)
    one.recording(url)
    info = agent_info(one.directory)
    assert info is not None
    os.kill(info["pid"], signal.SIGKILL)
    done = one.state(url, "done")
    assert agent_info(one.directory)["pid"] != info["pid"]  # type: ignore[index]
    assert done["times"]["importing"] - done["times"]["recording"] >= 4


def test_a_killed_nsys_fails_the_capture_with_its_words_and_leaves_the_server(
    wrapped: Callable[..., Wrapped],
) -> None:
    one = wrapped()
    target = one.target
    url = one.begin(seconds=3)
    one.recording(url)
    daemon = next(found for found in one.nsys_processes() if "--start-agent" in found.cmdline())
    daemon.kill()
    failed = one.state(url, "failed")
    assert "nsys" in failed["reason"]
    assert {path.name for path in (one.captures / failed["id"]).iterdir()} == {"capture.json"}
    assert target.is_running()
    assert one.ask("GET", f"{url}/report")[0] == 409
    steps = one.ask("GET", "/api/status")[1]["servers"][0]["ranks"][0]["steps"]["decode"]
    until(
        lambda: one.ask("GET", "/api/status")[1]["servers"][0]["ranks"][0]["steps"]["decode"] > steps,
        "further steps",
    )
    assert one.process.poll() is None
    one.process.terminate()
    assert one.process.wait(PATIENCE_SECONDS) == 1
    assert "its exit status is not known" in one.said()
    assert not target.is_running()


def test_a_capture_that_hangs_its_server_says_so_and_ends_all_the_same(
    wrapped: Callable[..., Wrapped],
) -> None:
    one = wrapped(options="--trace cuda,nvtx --cuda-graph-trace node")
    url = one.begin(seconds=6)
    one.recording(url)
    assert "--cuda-graph-trace node: a capture can hang the server for good" in one.said()
    assert "--cuda-graph-trace=node" in one.launch_line()
    one.hang()
    one.target.suspend()  # nsys waits 30 s for a process that does not answer
    try:
        done = one.state(url, "done")
    finally:
        one.target.resume()
    (hung,) = [note for note in done["notes"] if "has not got on" in note]
    assert re.search(r"rank 0 has been in step \d+ \(.*\) for \d+ s\. .*records them by node", hung)
    assert "capture.nsys-rep" in {file["name"] for file in done["files"]}
    assert one.ask("GET", "/api/captures")[1]["tools"][done["server"]]["nsys"] is None
    one.target.send_signal(signal.SIGUSR2)
    steps = one.rank()["steps"]["decode"]
    until(lambda: one.rank()["steps"]["decode"] > steps, "further steps")


def test_a_capture_that_fails_beside_a_hung_server_says_so_and_there_is_no_other(
    wrapped: Callable[..., Wrapped],
) -> None:
    one = wrapped(options="--trace cuda,nvtx")
    url = one.begin(seconds=6)
    one.recording(url)
    assert "can hang" not in one.said()
    assert "--cuda-graph-trace=graph" in one.launch_line()
    one.hang()
    next(found for found in one.nsys_processes() if "--start-agent" in found.cmdline()).kill()
    failed = one.state(url, "failed")
    assert re.search(
        r"nsys.*\. Since it was recorded the server has not got on: rank 0 has been in step .*start it anew$",
        failed["reason"],
    )
    said = {"kind": "capture", "capture": failed["id"], "tool": "nsys", "state": "failed"}
    until(lambda: [event for event in one.events() if said.items() <= event.items()], "event of its end")
    until(lambda: [event for event in one.events() if event["kind"] == "stall_begun"], "event of the stall")
    status, answer = one.ask("POST", "/api/captures", {"tool": "nsys"})
    assert (status, "start" in answer["detail"]) == (409, True), answer
    captures = one.ask("GET", "/api/status")[1]["agent"]["captures"]
    assert captures["nsys"][failed["server"]] == {"trace": ["cuda", "nvtx"], "cuda_graph_trace": "graph"}
    assert captures["tools"][failed["server"]]["nsys"] in answer["detail"]


def test_a_server_that_dies_fails_its_capture(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped()
    url = one.begin(seconds=60)
    one.recording(url)
    one.target.kill()
    assert one.process.wait(PATIENCE_SECONDS) == 137
    failed = one.state(url, "failed")
    assert "gone" in failed["reason"]
    assert {path.name for path in (one.captures / failed["id"]).iterdir()} == {"capture.json"}


def test_a_killed_wrapper_leaves_the_server_serving_and_capturable(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    one = wrapped()
    target = one.target
    session = one.session()
    one.process.kill()
    one.process.wait(PATIENCE_SECONDS)
    until(lambda: one.ask("GET", "/api/status")[1]["servers"], "server")
    shell = capture_verb(one, tmp_path, "--seconds", "0.5")
    assert shell.returncode == 0, shell.stderr
    assert json.loads(shell.stdout)[0]["capture"]["state"] == "done"
    assert target.is_running()
    assert one.nsys_processes()
    target.terminate()
    until(lambda: not [p for p in one.nsys_processes() if p.status() != psutil.STATUS_ZOMBIE], "end of nsys")
    assert Path(session["temporary"]).exists()
    shutil.rmtree(session["temporary"])


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 33), (signal.SIGUSR1, 34)])
def test_signals_reach_the_program_once_and_nothing_is_left(
    wrapped: Callable[..., Wrapped], number: signal.Signals, expected: int
) -> None:
    program = f"""
import os, signal, sys, time
seen = []
signal.signal({int(number)}, lambda *_: seen.append(1))
print("serving as", os.getpid(), flush=True)
while not seen:
    time.sleep(0.05)
time.sleep(0.5)
print("seen", len(seen), flush=True)
sys.exit({expected})
"""
    one = wrapped(sys.executable, "-c", program)
    target = one.target
    time.sleep(0.3)  # the wrapper looks for the program twenty times a second
    one.process.send_signal(number)
    assert one.process.wait(PATIENCE_SECONDS) == expected
    assert "seen 1" in one.said()
    assert not target.is_running()
    assert not [p for p in one.nsys_processes() if p.status() != psutil.STATUS_ZOMBIE]
    assert not list((one.directory / "nsys").iterdir())


def test_a_program_under_nsys_knows_that_cupti_is_held(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped(
        sys.executable,
        "-c",
        "from llmprobe.record import torch_trace; from llmprobe.record.cupti import injected\n"
        "print(torch_trace.unavailable(cuda=True))\n"
        "print(injected(), injected({}), sep=chr(10))",
    )
    assert one.process.wait(PATIENCE_SECONDS) == 0
    lines = [line for line in one.said().splitlines() if not line.startswith("llmprobe:")]
    assert "a profiler was injected into this process (NSYS_PROFILING_SESSION_ID is set)" in lines[0]
    assert lines[1:] == ["NSYS_PROFILING_SESSION_ID is set", "libToolsInjection64.so is loaded"]


def test_what_the_program_prints_and_inherits_is_as_without_nsys(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    one = wrapped("/bin/sh", "-c", 'echo "$TMPDIR"; umask; echo last >&2; exit 5')
    assert one.process.wait(PATIENCE_SECONDS) == 5
    lines = [line for line in one.said().splitlines() if not line.startswith("llmprobe:")]
    assert lines == [str(tmp_path / "tmp"), f"{umask:04o}", "last"]


def test_a_recording_that_no_agent_ends_is_ended_by_the_wrapper(
    wrapped: Callable[..., Wrapped], tmp_path: Path
) -> None:
    one = wrapped(
        sys.executable, "-c", "import os, time; print('serving as', os.getpid(), flush=True); time.sleep(60)"
    )
    assert one.target.is_running()
    session = Session(**{**one.session(), "trace": ("nvtx",)})
    Nsys(session).start(tmp_path)
    assert Nsys(session).recording()
    session.dead_man(one.directory).write_text('{"until": 1}')
    until(lambda: Nsys(session).state() == "Launched", "end of the recording")
    assert one.target.is_running()


def test_a_server_without_nsys_is_told_how(wrapped: Callable[..., Wrapped]) -> None:
    one = wrapped()
    until(lambda: one.ask("GET", "/api/status")[1]["servers"], "server")
    for note in (one.directory / "nsys").glob("*.json"):
        note.rename(note.with_suffix(".away"))
    status, answer = one.ask("POST", "/api/captures", {"tool": "nsys"})
    assert status == 409
    assert "llmprobe run --nsys" in answer["detail"]
    for note in (one.directory / "nsys").glob("*.away"):
        note.rename(note.with_suffix(".json"))
    for tool in ("torch", "kernels"):
        status, answer = one.ask("POST", "/api/captures", {"tool": tool})
        assert status == 409
        assert "has not said what can capture it" in answer["detail"]
