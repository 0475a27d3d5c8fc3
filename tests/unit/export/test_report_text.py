"""The report of a run as people read it in a terminal."""

from __future__ import annotations

import dataclasses

import pytest

from llmprobe.export.report import report, text

from .views_for_tests import rank, server


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
def test_it_fits_the_terminal_and_cuts_no_word_or_figure(width: int) -> None:
    lines = text(report([server()]), width).splitlines()
    long = [line for line in lines if len(line) > width]
    assert all("next look:" in line for line in long)  # a command, to be copied
    assert not any("…" in line for line in lines)
    assert not set("".join(lines)) & set("┏┃┡│└─━")


def test_every_column_has_a_name_of_its_own_and_of_many_the_telling_stay() -> None:
    def columns(width: int) -> list[str]:
        lines = text(report([server()]), width).splitlines()
        return next(line for line in lines if line.strip().startswith("phase ")).split("  ")

    found = [name.strip() for name in columns(100) if name.strip()]
    assert found == ["phase", "steps", "p50 ms", "p99 ms", "floor ms", "at floor", "sync gap", "MBU", "MFU"]
    narrow = [name.strip() for name in columns(60) if name.strip()]
    assert set(narrow) < set(found)
    assert {"phase", "p50 ms", "sync gap", "MBU"} <= set(narrow)


def test_the_terminal_says_how_wide_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    document = report([server(notes=["word " * 60])])
    monkeypatch.setenv("COLUMNS", "64")
    assert max(map(len, text(document).splitlines())) <= 64
    assert text(document) == text(document, 64)


@pytest.mark.parametrize("name", ["a/[model]", "a[/b]", "[bold]", ":smile:"])
def test_names_and_notes_are_shown_as_they_are(name: str) -> None:
    view = dataclasses.replace(
        server(notes=[f"see {name}"], missing={"x": name}, ranks=[rank(facts={"device": {"name": name}})]),
        model_name=name,
    )
    shown = text(report([view]), 100)
    assert f"vllm-8000  {name}" in shown
    assert f"note: see {name}" in shown
    assert f"not measured: x ({name})" in shown
    assert f"rank 0: {name}," in shown
