"""Several calls make one table, if they measured the same thing on the same machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import side_by_side

    monkeypatch.setattr(side_by_side, "machine_line", lambda: "a GPU; load before 0.3")
    return side_by_side


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model=None, concurrency=4, prompt_tokens=8, output_tokens=8, flags=[], json=tmp_path / "side.json"
    )


def run(name: str, tpot: float) -> dict[str, object]:
    return {
        "name": name,
        "seconds": 30.0,
        "requests": 9,
        "tpot_seconds": tpot,
        "ttft_seconds": 0.05,
        "tokens_per_second": 4 / tpot,
    }


def kept(script: ModuleType, options: argparse.Namespace, **changes: object) -> dict[str, object]:
    """What a call before this one left in the file."""
    options.json.unlink(missing_ok=True)
    saved = {**script._saved(options), "runs": [run("vLLM alone", 0.010)], **changes}
    options.json.write_text(json.dumps(saved))
    return saved


def test_a_second_call_adds_to_the_first(script: ModuleType, options: argparse.Namespace) -> None:
    before = kept(script, options, machine="a GPU; load before 7.5")
    assert script._saved(options) == before


def test_another_machine_or_load_needs_another_file(script: ModuleType, options: argparse.Namespace) -> None:
    kept(script, options, machine="another GPU; load before 0.3")
    with pytest.raises(SystemExit, match="another machine"):
        script._saved(options)
    kept(script, options, shape={})
    with pytest.raises(SystemExit, match="other settings"):
        script._saved(options)


def test_changes_are_against_the_median_of_vllm_alone(
    script: ModuleType, options: argparse.Namespace
) -> None:
    runs = [run("vLLM alone", 0.008), run("LLMPROBE=1", 0.0101), run("vLLM alone", 0.012)]
    table = script._table({"machine": "a GPU", "runs": runs}, options, ["nsys: broke"])
    alone, probed = table.rows
    assert alone[:4] == ["vLLM alone", "2", "10.000 ms", "–"]
    assert probed[:4] == ["LLMPROBE=1", "1", "10.100 ms", "+1.0%"]
    assert "2 starts of vLLM alone were up to 50.0% apart in time per token." in table.notes
    assert "FAILED: nsys: broke" in table.notes


def test_without_vllm_alone_there_are_no_changes(script: ModuleType, options: argparse.Namespace) -> None:
    table = script._table({"machine": "a GPU", "runs": [run("LLMPROBE=1", 0.01)]}, options, [])
    assert [row[3] for row in table.rows] == ["–"]
