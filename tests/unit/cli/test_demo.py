"""``llmprobe demo`` where it cannot begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmprobe.cli.app import app


@pytest.mark.parametrize("program", [[], ["--transformers"]])
def test_a_cache_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = CliRunner().invoke(app, ["demo", *program])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("llmprobe: the model cannot be kept in ")
    assert "set XDG_CACHE_HOME" in line
