"""Runs are saved a line as they end, and what was saved makes the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.labels import Client, Label
from support.outcomes import HEADER, Outcome, Run, append, line, read, status, table_rows
from support.watching import Said, Trace, score


@dataclass(frozen=True)
class SomeFacts:
    client: Client
    bandwidth: float = float("inf")


def run(name: str = "decode", said: str = "memory_bound", holds: bool = True) -> Run:
    label = Label(("memory_bound",), "a rule", holds)
    verdict: dict[str, Any] = {"bottleneck": said, "cause": None, "confidence": 0.71, "evidence": []}
    trace = Trace([Said(second, {"decode": verdict}, "Decode.", {}) for second in (1.0, 2.0, 61.0)])
    facts = SomeFacts(Client(3, 0.1, 0.01))
    return Outcome(name, facts, label, score(trace, label, "decode", {}), trace).as_run("a machine")


def test_what_was_saved_is_there_whatever_comes_after(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    append(path, run("one", said="unknown"))
    append(path, run("two"))
    append(path, run("one"))
    with path.open("a") as file:
        file.write('{"name": "three", "fac')  # as a process leaves it that is killed while it writes
    found = read([path, tmp_path / "missing"])
    assert [item["name"] for item in found] == ["two", "one"]
    assert table_rows(found) == table_rows([run("two"), run("one")])
    assert Client(**found[0]["facts"]["client"]) == Client(3, 0.1, 0.01)


def test_a_row_and_a_line_say_all_that_is_asked() -> None:
    row = dict(zip(HEADER, table_rows([run()])[0], strict=True))
    assert row == {
        "scenario": "decode", "label": "memory_bound", "its rule": "a rule", "holds": "yes",
        "verdict": "memory_bound", "confidence": "0.71", "headline": "Decode.", "right after": "1 s",
        "flips": "0 in 60 s", "": "right",
    }  # fmt: skip
    assert line(run()) == (
        "decode: label memory_bound (holds), verdict memory_bound, confidence 0.71, right after 1 s, "
        "flips 0 in 60 s: right"
    )
    assert line(run(holds=False)).endswith(": not scored")
    assert line({"name": "x", "machine": "m", "error": "LoadFailed: why"}) == "x: failed: LoadFailed: why"


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run()], 0),
        ([run(), run(holds=False)], 2),
        ([run(said="compute_bound", holds=False)], 2),
        ([run(said="compute_bound"), run(holds=False)], 1),
        ([run(), {"name": "x", "machine": "m", "error": "why"}], 1),
    ],
)
def test_the_exit_status_tells_wrong_from_not_scored(runs: list[Run], expected: int) -> None:
    assert status(runs) == expected
