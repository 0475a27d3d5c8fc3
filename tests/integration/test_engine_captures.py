"""Captures that engines make themselves, with the real ones: from a request to what can be downloaded."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine import Load
from waiting import PATIENCE_SECONDS, until

from llmprobe.agent.client import AgentError, LocalAgent
from llmprobe.demo.server import VllmServer
from llmprobe.record.agent_launch import agent_info, agent_running

pytestmark = pytest.mark.integration

SECRET = "planted-5ecret-never-to-be-seen"
BIN = Path(sys.executable).parent
FINAL = ("done", "failed", "cancelled")


@dataclass
class Captured:
    """An agent, and the captures that it keeps."""

    directory: Path

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return LocalAgent(self.directory).request(method, path, body, timeout=PATIENCE_SECONDS)

    def begin(self, **wanted: Any) -> str:
        """Begin a capture; returns its URL."""
        status, answer = self.ask("POST", "/api/captures", wanted)
        assert status == 202, answer
        return str(answer["url"])

    def state(self, url: str, *states: str) -> dict[str, Any]:
        """The capture once it is in one of these states."""

        def ready() -> dict[str, Any] | None:
            with contextlib.suppress(AgentError):  # one that is killed is replaced
                status, answer = self.ask("GET", url)
                assert status == 200, answer
                assert answer["state"] in states or answer["state"] not in FINAL, answer
                return answer if answer["state"] in states else None
            return None

        return dict(until(ready, f"state {states}"))

    def tools(self) -> dict[str, str | None]:
        """What can capture the one server."""
        ((_, found),) = self.ask("GET", "/api/captures")[1]["tools"].items()
        return dict(found)

    def steps(self) -> int:
        """Of the one rank, so far."""
        (server,) = self.ask("GET", "/api/status")[1]["servers"]
        return sum(server["ranks"][0]["steps"].values())

    def fetch(self, capture: dict[str, Any], folder: Path) -> dict[str, bytes]:
        """Every file that it offers."""
        folder.mkdir()
        for file in capture["files"]:
            LocalAgent(self.directory).download(file["url"], folder / file["name"], timeout=PATIENCE_SECONDS)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_serving_vllm_is_captured_by_torch_while_it_serves(server: VllmServer, tmp_path: Path) -> None:
    captured = Captured(server.directory)
    with Load(server, 40):
        until(lambda: captured.tools()["torch"] is None, "a worker that says what can capture it")
        assert "CUDA" in (captured.tools()["kernels"] or "")
        url = captured.begin(steps=40, when="next decode", label="vLLM")
        captured.state(url, "analysing", "done")
    # Analysed on the idle processor, of which this load leaves none.
    done = captured.state(url, "done")
    assert done["request"]["tool"] == "torch"  # `auto`, where there is no nsys and no GPU
    files = captured.fetch(done, tmp_path / "files")
    assert set(files) == {"report.json", "report.txt", "live.json", "torch-rank0.json.gz"}
    report = json.loads(files["report.json"])
    assert report["source"]["path"] == "torch-rank0.json.gz"
    steps = {row["name"]: row for row in report["phases"] if row["part"] is None}
    assert steps["decode"]["steps"] >= 10
    assert sum(row["steps"] for row in steps.values()) >= 40
    (rank,) = json.loads(files["live.json"])["meanwhile"]["ranks"]
    # Of the steps that were recorded whole: it began and ended in one each.
    whole = {phase: row["steps"] for phase, row in rank["figures"].items()}
    recorded = {phase: row["steps"] for phase, row in steps.items()}
    assert whole.keys() <= recorded.keys()
    assert all(count <= recorded[phase] for phase, count in whole.items())
    assert 0 <= sum(recorded.values()) - sum(whole.values()) <= 2
    assert {"forward", "sample"} <= {row["part"] for row in report["phases"]}
    # Of the engine's thread: ours calls no operator.
    assert sum(row["count"] for row in report["host_operators"]) >= 10 * 40
    assert captured.ask("DELETE", url)[0] == 200


def test_vllms_own_profiler_refuses_ours_while_it_runs(tmp_path: Path) -> None:
    """vLLM's profiler of a worker, started and stopped as ``/start_profile`` and ``/stop_profile`` do."""
    script = """
import sys, time, weakref
from pathlib import Path
from types import SimpleNamespace
from vllm.config import ProfilerConfig
from vllm.profiler.wrapper import TorchProfilerWrapper
from llmprobe.hooks.vllm.worker import _profiler_of
from llmprobe.record.asked import Ask, Paths, read_said, write
from llmprobe.record.asked_capture import AskedCaptures
from llmprobe.record.recorder import Recorder

class Worker:
    profiler = None

folder = Path(sys.argv[1])
config = ProfilerConfig(profiler="torch", torch_profiler_dir=str(folder / "theirs"))
worker = Worker()
recorder = Recorder.open(folder / "shared", "worker", {"role": "worker", "clock": "host"})
captures = AskedCaptures(
    recorder, profiler=_profiler_of(weakref.ref(worker)), failed=lambda where, error: print(where, error)
)
paths = Paths.of(recorder.writer.path)

def said(number):
    name = f"20261126-10450{number}-abcdef"
    write(paths.ask, Ask(name, "torch", 0.2, None, False, False, time.monotonic_ns()))
    until = time.monotonic() + 300
    while time.monotonic() < until:
        captures.look()
        found = read_said(paths.said)
        if found is not None and found.id == name and found.state in ("done", "failed"):
            paths.remove()
            return found.state, found.reason
        time.sleep(0.05)

captures.look()
print(recorder.facts["captures"]["torch"])
worker.profiler = TorchProfilerWrapper(config, "worker", 0, ["CPU"])
captures.look()
print(recorder.facts["captures"]["torch"])
worker.profiler.start()
captures.look()
print(recorder.facts["captures"]["torch"])
print(said(0))
worker.profiler.stop()
captures.look()
print(recorder.facts["captures"]["torch"])
print(said(1))
recorder.close(remove=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    runs = "vLLM's own profiler runs: POST /stop_profile ends it"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("None", "vLLM's own", "('"))]
    assert lines == ["None", "None", runs, str(("failed", runs)), "None", str(("done", ""))], done.stdout


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], Captured]]]:
    """Starts a transformers program under LLMPROBE=1; nothing of it is left afterwards."""
    directory = Path(f"/dev/shm/llmprobe-test-engine-captures-{os.getpid()}")
    output = tmp_path / "output"
    started: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[subprocess.Popen[bytes], Captured]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "LLMPROBE": "1",
            "LLMPROBE_DIR": str(directory),
            "LLMPROBE_LISTEN": f"127.0.0.1:{port}",
            "LLMPROBE_CAPTURE_DIR": str(tmp_path / "captures"),
            "PLANTED_SECRET": SECRET,
        }
        with output.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("generating_program.py"))],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
        captured = Captured(directory)

        def ready() -> bool:
            with contextlib.suppress(AgentError, ValueError, IndexError):
                return captured.tools()["torch"] is None and captured.steps() > 0
            return False

        until(ready, "a program that generates")
        return started[-1], captured

    yield start
    for one in started:
        one.kill()
        one.wait()
    print(output.read_text())
    if (directory / "agent.log").exists():
        print((directory / "agent.log").read_text())
    if info := agent_info(directory):
        os.kill(info["pid"], signal.SIGKILL)
        until(lambda: not agent_running(directory), "the end of the agent")
    shutil.rmtree(directory, ignore_errors=True)


def test_a_transformers_program_and_every_end_that_its_capture_can_have(
    program: Callable[[], tuple[subprocess.Popen[bytes], Captured]], tmp_path: Path
) -> None:
    process, captured = program()
    folder = captured.directory / "captures"

    # From the shell, with Python's calls: the one file that holds them is not among those that are scrubbed.
    shell = subprocess.run(
        [
            *(str(BIN / "llmprobe"), "capture", "--json", "--output", str(tmp_path / "fetched")),
            *("--tool", "torch", "--torch-stacks", "--steps", "20", "--raw"),
        ],
        env={**os.environ, "LLMPROBE_DIR": str(captured.directory)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert shell.returncode == 0, shell.stderr
    (found,) = json.loads(shell.stdout)
    files = {path.name: path.read_bytes() for path in Path(found["folder"]).iterdir()}
    raw = files.pop("torch-rank0.raw.json.gz")
    assert b"python_function" in gzip.decompress(raw)
    assert set(files) == {"report.json", "report.txt", "live.json", "torch-rank0.json.gz"}
    files["torch-rank0.json.gz"] = gzip.decompress(files["torch-rank0.json.gz"])
    for name, content in {**files, "raw": gzip.decompress(raw)}.items():
        assert SECRET.encode() not in content, name
    for name, content in files.items():
        assert b"generating_program" not in content or name == "live.json", name
        assert socket.gethostname().encode() not in content or name == "live.json", name
    phases = {row["name"]: row["steps"] for row in found["report"]["phases"] if row["part"] is None}
    assert phases["decode"] >= 15
    capture = found["capture"]
    url = f"{capture['url']}/files/torch-rank0.raw.json.gz"
    assert captured.ask("GET", url)[0] == 403
    assert captured.ask("GET", f"/api/captures/{capture['id']}/files/raw-rank0.torch")[0] == 404

    # What cannot be done is refused with the reason, and leaves nothing.
    status, answer = captured.ask("POST", "/api/captures", {"tool": "kernels"})
    assert (status, "CUDA" in answer["detail"]) == (409, True)
    status, answer = captured.ask("POST", "/api/captures", {"tool": "torch", "ranks": [3]})
    assert (status, "ranks" in answer["detail"]) == (422, True)

    # Taken back while it records.
    url = captured.begin(tool="torch", seconds=50)
    captured.state(url, "recording")
    until(lambda: list(folder.glob("*.said")), "the program's answer")
    assert captured.ask("DELETE", url)[0] in (200, 202)
    until(lambda: captured.ask("GET", url)[0] == 404, "the end of the capture")
    until(lambda: not list(folder.iterdir()), "an empty folder")

    # The agent dies: the next one goes on.
    url = captured.begin(tool="torch", seconds=2)
    until(lambda: list(folder.glob("*.said")), "the program's answer")
    info = agent_info(captured.directory)
    assert info is not None
    os.kill(info["pid"], signal.SIGKILL)
    done = captured.state(url, "done")
    assert agent_info(captured.directory)["pid"] != info["pid"]  # type: ignore[index]
    assert {file["name"] for file in done["files"]} >= {"torch-rank0.json.gz", "report.json"}

    # The program goes on all the time; when it dies, so does its capture.
    before = captured.steps()
    until(lambda: captured.steps() > before, "further steps")
    url = captured.begin(tool="torch", seconds=50)
    until(lambda: list(folder.glob("*.said")), "the program's answer")
    process.kill()
    failed = captured.state(url, "failed")
    assert "gone" in failed["reason"] or "ended" in failed["reason"]
    kept = tmp_path / "captures" / failed["id"]
    assert {path.name for path in kept.iterdir()} == {"capture.json"}
