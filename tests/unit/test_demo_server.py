"""Where the demo and the benchmarks find vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmprobe.demo.server import ServerFailed, vllm_command


def test_the_command_beside_this_python_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3"
    monkeypatch.setattr(sys, "executable", str(python))
    (tmp_path / "vllm").touch()
    assert vllm_command() == [str(tmp_path / "vllm")]


def test_without_it_the_module_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert vllm_command() == [str(tmp_path / "python3"), "-m", "vllm.entrypoints.cli.main"]


def test_neither_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(ServerFailed, match="install vLLM there"):
        vllm_command()
