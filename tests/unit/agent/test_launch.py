"""How an engine starts an agent: with what environment, command and patience."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from llmprobe.agent import listen
from llmprobe.agent.main import parse
from llmprobe.record import agent_launch
from llmprobe.record.agent_launch import agent_command, agent_environment, agent_info, ensure_agent
from llmprobe.settings import Settings


def settings(tmp_path: Path, **values: str) -> Settings:
    return Settings.from_env({"LLMPROBE_DIR": str(tmp_path), **values})


def test_the_agent_inherits_nothing_that_is_the_engines_alone() -> None:
    kept = agent_environment(
        {
            "PATH": "/bin",
            "HOME": "/root",
            "CUDA_VISIBLE_DEVICES": "0",
            "CUDA_INJECTION64_PATH": "x",
            "NSYS_PROFILING_SESSION_ID": "1",
            "NVTX_INJECTION64_PATH": "x",
            "LD_PRELOAD": "x",
            "LLMPROBE": "1",
            "LLMPROBE_DIR": "/x",
            "LD_LIBRARY_PATH": "/lib",
        }
    )
    assert {"PATH", "HOME", "LD_LIBRARY_PATH"} <= set(kept)
    assert not [name for name in kept if name.startswith(("CUDA", "NSYS", "NVTX", "LLMPROBE", "LD_PRELOAD"))]


def test_relative_import_paths_survive_the_change_of_folder() -> None:
    path = agent_environment({"PYTHONPATH": "src::/abs"})["PYTHONPATH"].split(":")
    assert path[:2] == [str(Path("src").absolute()), "/abs"]


def test_the_command_line_says_what_the_settings_say(tmp_path: Path) -> None:
    given = settings(
        tmp_path, LLMPROBE_LISTEN="[::1]:9999", LLMPROBE_TOKEN_FILE="/t", LLMPROBE_LOG_LEVEL="debug"
    )
    command = agent_command(given)
    assert command[:3] == [sys.executable, "-m", "llmprobe.agent"]
    options = parse(command[3:], {})
    assert options.settings.directory == tmp_path
    assert options.settings.listen == ("::1", 9999)
    assert options.settings.token_file == Path("/t")
    assert options.settings.log_level == "DEBUG"
    assert not options.external
    assert not options.foreground


@pytest.mark.parametrize("bad", [["--listen", "nowhere"], ["--directory", "relative"], ["--what"]])
def test_a_wrong_option_is_said_with_status_2(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(bad, {})
    assert left.value.code == 2
    assert bad[-1] in capsys.readouterr().err


def test_an_agent_that_cannot_start_is_retried_ever_less_often_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    def cannot(command: list[str], **options: object) -> None:
        tried.append(command)
        raise OSError("no such program")

    now = [1000.0]
    monkeypatch.setattr(agent_launch._Attempts, "failures", 0)
    monkeypatch.setattr(agent_launch._Attempts, "not_before", 0.0)
    monkeypatch.setattr(agent_launch.subprocess, "Popen", cannot)
    monkeypatch.setattr(agent_launch.time, "monotonic", lambda: now[0])
    for _ in range(300):
        ensure_agent(settings(tmp_path))
        now[0] += 1
    assert 5 <= len(tried) <= 12


def test_an_agent_that_dies_as_it_starts_is_retried_ever_less_often_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds its lock before it has found out that it cannot serve."""
    now, begun = [1000.0], []

    class Started:
        def __init__(self, command: list[str], **options: object) -> None:
            begun.append(now[0])

        def wait(self, seconds: float) -> int:
            return 0

    monkeypatch.setattr(logging.getLogger("llmprobe"), "propagate", True)
    for name, value in (("failures", 0), ("not_before", 0.0), ("running_since", None)):
        monkeypatch.setattr(agent_launch._Attempts, name, value)
    monkeypatch.setattr(agent_launch.subprocess, "Popen", Started)
    monkeypatch.setattr(agent_launch.time, "monotonic", lambda: now[0])
    lives = [1.5]
    monkeypatch.setattr(
        agent_launch, "agent_running", lambda directory: bool(begun) and now[0] - begun[-1] < lives[0]
    )
    for _ in range(300):
        ensure_agent(settings(tmp_path))
        now[0] += 1
    assert 5 <= len(begun) <= 12
    assert sum("does not stay up" in record.getMessage() for record in caplog.records) == 1
    lives[0] = 100.0
    for _ in range(150):  # the next one stays, and its end is no reason for patience
        ensure_agent(settings(tmp_path))
        now[0] += 1
    assert now[0] - begun[-1] < lives[0] and begun[-1] - begun[-2] <= lives[0] + 2


def test_no_agent_no_info(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text('{"pid": 1}')
    assert agent_info(tmp_path) is None


@pytest.mark.parametrize(
    ("wanted", "said"), [("127.0.0.1:9999", True), ("127.0.0.1:9480", False), ("127.0.0.1:9555", False)]
)
def test_an_agent_that_listens_elsewhere_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: str, said: bool
) -> None:
    """The one that runs was asked for 9555 by another server of this directory."""
    monkeypatch.setattr(agent_launch._Attempts, "compared", False)
    monkeypatch.setattr(logging.getLogger("llmprobe"), "propagate", True)
    monkeypatch.setattr(agent_launch, "agent_running", lambda directory: True)
    listen.publish(tmp_path, listen.about(tmp_path, None, ("127.0.0.1", 9555)))
    for _ in range(2):
        ensure_agent(settings(tmp_path, LLMPROBE_LISTEN=wanted))
    lines = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(lines) == int(said)
