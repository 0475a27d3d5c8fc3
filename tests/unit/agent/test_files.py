"""The agent's small files are whole, private and readable by others of the same user only."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from llmprobe.agent.files import Token, read_switch, switch, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(OSError, match="folder"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_the_switch_says_what_engines_read(tmp_path: Path) -> None:
    before = time.time()
    switch(
        tmp_path, False, ["b", "a", "b"], [tmp_path / "worker-2-x.journal", tmp_path / "worker-1-y.journal"]
    )
    control = json.loads((tmp_path / "control.json").read_text())
    changed = control["changed"]
    assert control == {
        "schema": 1,
        "armed": False,
        "servers": ["a", "b"],
        "journals": ["worker-1-y.journal", "worker-2-x.journal"],
        "changed": changed,
    }
    assert before <= control["changed"] <= time.time()
    assert read_switch(tmp_path) == control
    switch(tmp_path, True)
    assert read_switch(tmp_path)["servers"] is None  # type: ignore[index]


def test_an_unreadable_switch_is_none(tmp_path: Path) -> None:
    assert read_switch(tmp_path) is None
    (tmp_path / "control.json").write_text("{")
    assert read_switch(tmp_path) is None


def test_a_token_is_long_private_and_kept(tmp_path: Path) -> None:
    token = Token.make(tmp_path)
    assert len(token.value()) >= 43
    assert mode(tmp_path / "token") == 0o600
    assert Token.make(tmp_path).value() == token.value()
    assert token.matches(token.value())
    assert not token.matches(token.value()[:-1])


def test_an_exchanged_token_counts_at_once(tmp_path: Path) -> None:
    token = Token.make(tmp_path)
    old = token.value()
    token.path.write_text("another")
    assert token.matches("another")
    assert not token.matches(old)


def test_without_a_file_nothing_matches(tmp_path: Path) -> None:
    assert not Token(tmp_path / "none").matches("")
