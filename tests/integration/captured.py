"""Programs under ``llmprobe run --nsys`` with the real nsys, and asking for captures of them."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import PATIENCE_SECONDS, until

from llmprobe.agent.client import LocalAgent
from llmprobe.record.agent_launch import agent_info, agent_running

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
    #: Of nsys's session, once `session` was asked for it: the note that names it goes with the program.
    name: str = ""

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

    def kill_agent(self) -> int:
        """Returns its process id."""
        info = agent_info(self.directory)
        assert info is not None
        os.kill(info["pid"], signal.SIGKILL)
        return int(info["pid"])

    def nsys_daemon(self) -> psutil.Process:
        """Without which there is no further recording."""
        return next(found for found in self.nsys_processes() if "--start-agent" in found.cmdline())

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
        found = dict(json.loads(note.read_text()))
        self.name = str(found["name"])
        return found

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
        if not self.name and list((self.directory / "nsys").glob("*.json")):
            self.session()
        mark = self.name or "llmprobe-nsys-"
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if line and "nsys" in Path(line[0]).name and any(mark in word for word in line):
                found.append(process)
        return found


_NUMBERS = itertools.count()


@contextlib.contextmanager
def programs(nsys: str, place: Path) -> Iterator[Callable[..., Wrapped]]:
    """Starts programs under ``llmprobe run --nsys``, each with an agent of its own; nothing of them is left
    afterwards but what lies in ``place``.
    """
    started: list[Wrapped] = []

    def start(
        *command: str, options: str = "--trace nvtx,osrt", program: str = nsys, **variables: str
    ) -> Wrapped:
        directory = Path(f"/dev/shm/llmprobe-test-captures-{os.getpid()}-{next(_NUMBERS)}")
        folder = place / f"node{len(started)}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "tmp").mkdir(parents=True)
        output = folder / "output"
        environment = {
            **os.environ,
            "LLMPROBE_DIR": str(directory),
            "LLMPROBE_LISTEN": f"127.0.0.1:{port}",
            "LLMPROBE_CAPTURE_DIR": str(folder / "captures"),
            "TMPDIR": str(folder / "tmp"),
            "PLANTED_SECRET": SECRET,
            **variables,
        }
        command = command or (sys.executable, str(Path(__file__).with_name("captured_program.py")))
        with output.open("w") as file:
            process = subprocess.Popen(
                [
                    str(BIN / "llmprobe"),
                    "run",
                    f"--nsys={program}",
                    *options.split(),
                    "--no-summary",
                    "--",
                    *command,
                ],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(Wrapped(process, directory, folder / "captures", output))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(PATIENCE_SECONDS)
        print(one.said())
        if (one.directory / "agent.log").exists():
            print((one.directory / "agent.log").read_text())
        if agent_info(one.directory):
            one.kill_agent()
            until(lambda one=one: not agent_running(one.directory), "end of the agent")  # type: ignore[misc]
        shutil.rmtree(one.directory, ignore_errors=True)


@pytest.fixture
def wrapped(nsys: str, tmp_path: Path) -> Iterator[Callable[..., Wrapped]]:
    """`programs` of one test."""
    with programs(nsys, tmp_path) as start:
        yield start


@dataclass
class Gate:
    """Holds a state: what belongs to it waits while the gate is closed, in a process that may be killed."""

    path: Path

    def close(self) -> None:
        self.path.touch()

    def open(self) -> None:
        self.path.unlink(missing_ok=True)

    def held(self, *words: str) -> list[psutil.Process]:
        """The processes that belong to this test and have these words on their command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            ours = any(str(self.path.parent.parent) in word for word in line)
            if ours and set(words) <= set(line) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@dataclass
class Gates:
    """The real nsys and the real analysis, either of which can be held; ``start`` starts a program with
    them.
    """

    importing: Gate
    analysing: Gate
    start: Callable[[], Wrapped]

    def open(self) -> None:
        for gate in (self.importing, self.analysing):
            gate.open()

    def importers(self) -> list[psutil.Process]:
        """What imports, held or not."""
        return self.importing.held("export")

    def analysers(self) -> list[psutil.Process]:
        """What analyses."""
        return self.analysing.held("llmprobe.capture.work")


@contextlib.contextmanager
def gated(nsys: str, place: Path) -> Iterator[Gates]:
    """`Gates` of the programs in ``place``."""
    folder = place / "gates"
    folder.mkdir()
    importing, analysing = Gate(folder / "importing"), Gate(folder / "analysing")
    program = folder / "nsys"
    program.write_text(
        f'#!/bin/sh\nwhile [ "$1" = export -a -e {importing.path} ]; do sleep 0.05; done\nexec {nsys} "$@"\n'
    )
    program.chmod(0o700)
    # After the analysis has begun to watch over the agent that it must not outlive.
    (folder / "sitecustomize.py").write_text(
        f"""import os, sys, time
def hold(event, arguments):
    while event == "sqlite3.connect" and os.path.exists({str(analysing.path)!r}):
        time.sleep(0.05)
if "llmprobe.capture.work" in sys.orig_argv:
    sys.addaudithook(hold)
"""
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with programs(nsys, place) as start:
        gates = Gates(importing, analysing, lambda: start(program=str(program), PYTHONPATH=path))
        yield gates
        gates.open()


@pytest.fixture
def gates(nsys: str, tmp_path: Path) -> Iterator[Gates]:
    """`gated` of one test."""
    with gated(nsys, tmp_path) as found:
        yield found


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
