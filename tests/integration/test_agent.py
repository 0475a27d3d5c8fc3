"""A real agent process: started by an engine, found, replaced, and gone in the end."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import PATIENCE_SECONDS, until

from llmprobe.agent.client import AgentError, request
from llmprobe.record import agent_launch
from llmprobe.record.agent_launch import agent_info, agent_running, ensure_agent, exposition_path
from llmprobe.settings import Settings

pytestmark = pytest.mark.integration


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings() -> Iterator[Settings]:
    """Settings with a directory of their own; whatever agent serves it at the end is ended."""
    path = Path(f"/dev/shm/llmprobe-test-agent-{os.getpid()}")
    made = Settings.from_env({"LLMPROBE_DIR": str(path), "LLMPROBE_LISTEN": f"127.0.0.1:{free_port()}"})
    agent_launch._Attempts.failures, agent_launch._Attempts.not_before = 0, 0.0
    agent_launch._Attempts.running_since = None
    yield made
    if info := agent_info(path):
        os.kill(info["pid"], signal.SIGKILL)
        until(lambda: not agent_running(path), "end of the agent")
    shutil.rmtree(path)


@contextlib.contextmanager
def engine(directory: Path, *roles: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that write journals; they end with the block."""
    feeder = [sys.executable, str(Path(__file__).with_name("journal_feeder.py")), str(directory)]
    children = []
    for role in roles:
        child = subprocess.Popen([*feeder, role], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
    try:
        yield children
    finally:
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
            child.wait()


def servers(directory: Path) -> list[dict[str, Any]]:
    return list(request(directory, "GET", "/api/status")[1]["servers"])


def metric(directory: Path, pattern: str) -> float:
    """The sum of all samples whose line matches."""
    text = request(directory, "GET", "/metrics")[1]
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(pattern, line))


def descendants(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def test_an_engine_starts_one_agent_outside_its_tree_and_environment(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LLMPROBE", "1")
    with engine(settings.directory, "worker"):
        ensure_agent(settings)
        info = until(lambda: agent_info(settings.directory), "agent")
        assert info["pid"] not in descendants(os.getpid())
        assert os.getpgid(info["pid"]) != os.getpgrp()
        assert os.getsid(info["pid"]) == os.getsid(0), "priorities count within a session alone"
        environment = Path(f"/proc/{info['pid']}/environ").read_bytes()
        assert b"CUDA_VISIBLE_DEVICES" not in environment
        assert b"LLMPROBE" not in environment
        ensure_agent(settings)
        assert agent_info(settings.directory)["pid"] == info["pid"]  # type: ignore[index]
        command = agent_launch.agent_command(settings)
        second = subprocess.run(
            [*command, "--foreground"], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert second.returncode == 0
        assert "already serves" in second.stderr


def test_two_that_start_together_leave_one(settings: Settings) -> None:
    with engine(settings.directory, "worker"):
        command = [*agent_launch.agent_command(settings), "--foreground"]
        both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
        until(lambda: [child for child in both if child.poll() is not None], "loser")
        assert sorted(str(child.poll()) for child in both) == ["0", "None"]
        winner = next(child for child in both if child.poll() is None)
        assert until(lambda: agent_info(settings.directory), "agent")["pid"] == winner.pid
        winner.send_signal(signal.SIGTERM)
        assert winner.wait(PATIENCE_SECONDS) == 0


def test_counters_go_on_after_the_agent_was_killed(settings: Settings) -> None:
    directory = settings.directory
    tokens = r"llmprobe_tokens_total\{"
    seconds = r"llmprobe_device_time_seconds_total\{"
    with engine(directory, "frontend", "worker"):
        ensure_agent(settings)
        first = until(lambda: agent_info(directory), "agent")
        until(lambda: (directory / "checkpoint.json").read_text().count("device_time") or None, "checkpoint")
        before = [until(lambda p=p: metric(directory, p), "figures") for p in (tokens, seconds)]  # type: ignore[misc]
        os.kill(first["pid"], signal.SIGKILL)
        until(lambda: not agent_running(directory), "end of the agent")

        def another() -> dict[str, Any] | None:
            ensure_agent(settings)
            return agent_info(directory)

        assert until(another, "new agent")["pid"] != first["pid"]
        until(lambda: metric(directory, tokens), "figures")
        after = [until(lambda p=p: metric(directory, p), "figures") for p in (tokens, seconds)]  # type: ignore[misc]
        assert all(new >= old for new, old in zip(after, before, strict=True)), (before, after)


def test_a_dead_engines_series_go_and_another_server_stays(settings: Settings) -> None:
    directory = settings.directory
    with engine(directory, "frontend", "worker") as dying:
        other = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("journal_feeder.py")),
                str(directory),
                "worker",
                "b",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        ensure_agent(settings)
        until(lambda: len(servers(directory)) == 2, "two servers")
        text = exposition_path(directory, "a", "fed-a")
        until(text.exists, "text for vLLM's own /metrics")
        assert '"server":"fed-a"' in text.read_text()
        for child in dying:
            child.kill()
        until(lambda: [view["server"] for view in servers(directory)] == ["fed-b"], "one server")
        until(lambda: not text.exists(), "end of that text")
        assert metric(directory, r'llmprobe_.*server="fed-a"') == 0
        assert other.stdin is not None
        other.stdin.close()
        other.wait()


def test_a_taken_port_is_left_alone_and_the_next_one_published(settings: Settings) -> None:
    with socket.socket() as taken, engine(settings.directory, "worker"):
        taken.bind(settings.listen)
        taken.listen()
        ensure_agent(settings)
        info = until(lambda: agent_info(settings.directory), "agent")
        assert info["port"] > settings.listen[1]
        assert info["requested"] == "{}:{}".format(*settings.listen)
        log = (settings.directory / "agent.log").read_text()
        assert log.count(f"port {settings.listen[1]} is taken") == 1


def test_it_leaves_after_the_last_engine_and_takes_its_files_along(settings: Settings) -> None:
    directory = settings.directory
    command = [*agent_launch.agent_command(settings), "--foreground", "--linger-seconds", "1"]
    with engine(directory, "worker"):
        agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: servers(directory), "server")
        assert request(directory, "POST", "/api/probe", {"armed": False})[0] == 200
        assert agent.poll() is None
    assert "no engine for 1 s" in agent.communicate(timeout=PATIENCE_SECONDS)[1]
    assert agent.returncode == 0
    left = {path.name for path in directory.iterdir()}
    assert not left & {"agent.json", "agent.sock", "exposition", "control.json"}, left


def test_it_serves_where_nothing_can_be_written_and_makes_up_for_it(settings: Settings) -> None:
    """As on a full disk, of the directory and of the log."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with engine(settings.directory, "worker"):
        agent = subprocess.Popen(
            [*agent_launch.agent_command(settings), "--foreground"],
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited)),
        )

        def served() -> bool:
            assert agent.poll() is None
            with contextlib.suppress(AgentError):
                return bool(servers(settings.directory))
            return False

        until(served, "answer")
        assert agent_info(settings.directory) is None
        resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        until(lambda: agent_info(settings.directory), "note of where it is")
        assert (settings.directory / "token").read_text().strip()
        agent.terminate()
        assert agent.wait(PATIENCE_SECONDS) == 0


def test_an_external_agent_stays_without_engines(settings: Settings) -> None:
    command = [*agent_launch.agent_command(settings), "--foreground", "--external", "--linger-seconds", "0"]
    agent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: request(settings.directory, "GET", "/healthz")[0] == 200, "agent")
        time.sleep(2.5)  # two looks at whether anything is left to do
        assert agent.poll() is None
    finally:
        agent.terminate()
        assert agent.wait(PATIENCE_SECONDS) == 0


def test_a_removed_directory_ends_its_agent(settings: Settings) -> None:
    with engine(settings.directory, "worker"):
        command = [*agent_launch.agent_command(settings), "--foreground"]
        agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        until(lambda: agent_info(settings.directory), "agent")
        shutil.rmtree(settings.directory)
        assert "was removed" in agent.communicate(timeout=PATIENCE_SECONDS)[1]
    settings.directory.mkdir()


def test_its_memory_stays_small(settings: Settings) -> None:
    with engine(settings.directory, "frontend", "worker"):
        ensure_agent(settings)
        until(lambda: servers(settings.directory), "server")
        assert metric(settings.directory, "process_resident_memory_bytes") < 100 << 20
