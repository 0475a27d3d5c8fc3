"""A checkpoint that cannot be read is none, whatever is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprobe.collect import checkpoint


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"schema": 99}', "[" * 200_000, "\ud800"])
def test_what_cannot_be_read_is_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state"
    path.write_bytes(text.encode(errors="surrogatepass"))
    assert checkpoint.load(path) == {}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state"
    checkpoint.write(path, checkpoint.dump(ranks={"a": 1}))
    assert checkpoint.load(path)["ranks"] == {"a": 1}
    assert checkpoint.load(None) == checkpoint.load(tmp_path / "none") == {}
