"""``llmprobe gate`` on reports that the product's own report builder made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from export.views_for_tests import engine, histogram, rank, server
from typer.testing import CliRunner

from llmprobe.cli.app import app
from llmprobe.export.report import report


def save(path: Path, tpot: float = 0.02, **changes: Any) -> Path:
    """A run whose TPOT was about ``tpot`` seconds."""
    view = server(
        engines=[
            engine(
                latency={
                    "time_to_first_token": histogram(0.1, 0.2),
                    "time_per_output_token": histogram(tpot, tpot, tpot),
                }
            )
        ],
        ranks=[rank(), rank(rank=1)],
        **changes,
    )
    document = {**report([view]), "exit_code": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def gate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


def test_within_the_limit_it_passes_and_above_it_exits_with_3(tmp_path: Path) -> None:
    base = save(tmp_path / "base.json", 0.020)
    assert (
        gate(base, save(tmp_path / "same.json", 0.0205), "--max-regression", "decode.tpot=5%").exit_code == 0
    )
    done = gate(base, save(tmp_path / "worse.json", 0.030), "--max-regression", "decode.tpot=5%")
    assert done.exit_code == 3
    assert "regression" in done.stdout
    assert "worse than allowed: decode.tpot" in done.stderr
    assert "noise between runs is unknown" in done.stderr


def test_directories_and_lists_of_files_are_repeats(tmp_path: Path) -> None:
    for number, tpot in enumerate((0.0200, 0.0230, 0.0180)):
        save(tmp_path / "base" / f"{number}.json", tpot)
    noisy = [
        save(tmp_path / f"new{number}.json", tpot) for number, tpot in enumerate((0.0222, 0.0245, 0.0195))
    ]
    side = ",".join(map(str, noisy))
    limit = ("--max-regression", "tpot=5%")
    done = gate(tmp_path / "base", side, *limit)
    assert done.exit_code == 0
    assert "inconclusive" in done.stdout
    assert gate(tmp_path / "base", side, *limit, "--strict").exit_code == 3
    far = [save(tmp_path / "far" / f"{number}.json", 0.04 + number * 1e-3) for number in range(3)]
    assert gate(tmp_path / "base", far[0].parent / "*.json", *limit).exit_code == 3


def test_json_has_every_figure(tmp_path: Path) -> None:
    base, new = save(tmp_path / "a.json", 0.02), save(tmp_path / "b.json", 0.03)
    done = gate(base, new, "--max-regression", "tpot=12ms", "--max-regression", "decode.mbu=0.1", "--json")
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["passed"] is True
    assert document["base"] == [str(base)]
    tpot = document["metrics"]["tpot"]
    assert tpot["worse"] == pytest.approx(0.01, rel=0.05)
    assert tpot["interval"] is None
    assert tpot["unit"] == "s"
    assert document["metrics"]["decode.mbu"]["worse"] == pytest.approx(0)


def test_junit_tells_failures_from_passes(tmp_path: Path) -> None:
    base, new = save(tmp_path / "a.json", 0.02), save(tmp_path / "b.json", 0.03)
    junit = tmp_path / "gate.xml"
    limits = ("--max-regression", "tpot=5%", "--max-regression", "ttft=5%")
    assert gate(base, new, *limits, "--junit", junit).exit_code == 3
    suite = ElementTree.parse(junit).getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "2", "1")
    failed = {case.get("name"): case.find("failure") is not None for case in suite.iter("testcase")}
    assert failed == {"tpot": True, "ttft": False}
    message = suite.find("testcase/failure").get("message")  # type: ignore[union-attr]
    assert message is not None
    assert "allowed 5.00 %" in message


def test_a_difference_in_the_setup_is_said(tmp_path: Path) -> None:
    base = save(tmp_path / "a.json")
    new = save(tmp_path / "b.json", flags={"max_num_seqs": 32})
    done = gate(base, new, "--max-regression", "tpot=5%")
    assert done.exit_code == 0
    assert "flag max_num_seqs differs: 16" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "ttft"),
        (["--max-regression", "decode.speed=5%"], "has no metric 'decode.speed'; it has: decode."),
        (["--max-regression", "tpot"], "is not METRIC=LIMIT"),
        (["--max-regression", "tpot=fast"], "'tpot=fast'"),
        (["--max-regression", "decode.mbu=5ms"], "decode.mbu is not a time"),
        (["--max-regression", "decode.mbu=5"], "decode.mbu is a ratio, and 5 would allow anything"),
        (["--max-regression", "decode.sync_gap=1"], "give 1%, or a number below 1"),
        (["--max-regression", "decode.tpot=5"], "is a time, and 5 has no unit; give 5%, 5ms, 5us or 5s"),
        (["--max-regression", "decode.elapsed=0.002"], "decode.elapsed is a time, and 0.002 has no unit"),
        (["--max-regression", "decode.speed=5"], "has no metric 'decode.speed'"),
        (["--max-regression", "tpot=5%", "--max-regression", "tpot=6%"], "twice"),
        (["--max-regression", "tpot=5%", "--server", "other"], "no server 'other'; it has: vllm-8000"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_value(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = gate(save(tmp_path / "a.json"), save(tmp_path / "b.json"), *arguments)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a report"),
        ('{"schema_version": 99, "servers": []}', "schema_version 99"),
        ('{"schema_version": 1, "servers": []}', "nothing was measured"),
        ('{"schema_version": 1, "servers": [{"server": "x"}]}', "is not a report"),
        ('{"schema_version": 1, "servers": ["x"]}', "one of its servers is no object"),
        ('{"schema_version": 1, "servers": [{"server": NaN}]}', "NaN is no number"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str, said: str) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(text)
    done = gate(save(tmp_path / "a.json"), wrong, "--max-regression", "tpot=5%")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "wrong.json" in done.stderr


def changed(path: Path, at: tuple[Any, ...], value: Any) -> Path:
    """A run in whose first server one value is another."""
    document = json.loads(save(path).read_text())
    *way, last = at
    holder = document["servers"][0]
    for step in way:
        holder = holder[step]
    assert last in holder
    holder[last] = value
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("ranks", 0, "phases", "decode", "steps"), "x", "is not a report"),
        (("ranks", 0, "phases", "decode", "seconds"), None, "is not a report"),
        (("engines", 0, "tpot_seconds", "p50"), float("inf"), "Infinity is no number"),
        (("engines", 0, "tpot_seconds", "p50"), 10**400, "is not a report"),
        (("engines", 0, "tpot_seconds", "count"), 0, "has no metric 'tpot'"),
    ],
)
def test_a_run_with_other_values_is_named(tmp_path: Path, at: tuple[Any, ...], value: Any, said: str) -> None:
    new = changed(tmp_path / "new.json", at, value)
    done = gate(save(tmp_path / "base.json"), new, "--max-regression", "tpot=5%")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "new.json" in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_a_phase_without_steps_has_no_metrics(tmp_path: Path) -> None:
    paths = []
    for name in ("a.json", "b.json"):
        paths.append(changed(tmp_path / name, ("ranks", 0, "phases", "decode", "steps"), 0))
    assert gate(*paths, "--max-regression", "decode.elapsed=5%").exit_code == 0  # of the other rank
    document = json.loads(paths[1].read_text())
    document["servers"][0]["ranks"][1]["phases"]["decode"]["steps"] = 0
    paths[1].write_text(json.dumps(document))
    done = gate(*paths, "--max-regression", "decode.elapsed=5%")
    assert done.exit_code == 2
    assert "has no metric 'decode.elapsed'" in done.stderr


def test_a_new_run_whose_command_failed_does_not_pass(tmp_path: Path) -> None:
    base, new = save(tmp_path / "base.json"), save(tmp_path / "new.json")
    new.write_text(json.dumps({**json.loads(new.read_text()), "exit_code": 137}))
    limit = ("--max-regression", "tpot=5%")
    junit = tmp_path / "gate.xml"
    done = gate(base, new, *limit, "--junit", junit)
    assert done.exit_code == 1
    assert "failed with exit status 137" in done.stderr
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "0", "1")
    assert suite.find("testcase/error") is not None
    said = json.loads(gate(base, new, *limit, "--json").stdout)
    assert (said["passed"], len(said["failed"])) == (False, 1)
    assert str(new) in said["failed"][0]
    assert gate(base, new, *limit, "--allow-failed").exit_code == 0
    assert json.loads(gate(base, new, *limit, "--allow-failed", "--json").stdout)["failed"] == []
    assert gate(new, base, *limit).exit_code == 0  # what it is compared with is only said
    worse = save(tmp_path / "worse.json", 0.03)
    worse.write_text(json.dumps({**json.loads(worse.read_text()), "exit_code": 1}))
    assert gate(base, worse, *limit).exit_code == 3


def test_a_missing_file_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    base = save(tmp_path / "a.json")
    (tmp_path / "empty").mkdir()
    assert "does not exist" in gate(base, tmp_path / "none.json", "--max-regression", "tpot=5%").stderr
    assert "holds no *.json" in gate(base, tmp_path / "empty", "--max-regression", "tpot=5%").stderr


@pytest.mark.parametrize("side", ["x" * 300, "a/**b"])
def test_a_side_that_cannot_be_looked_for_is_said(tmp_path: Path, side: str) -> None:
    result = gate(save(tmp_path / "a.json"), side, "--max-regression", "tpot=5%")
    assert result.exit_code == 2
    assert f"cannot look for {side!r}" in result.stderr


def test_several_servers_ask_for_one(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps(report([server("one"), server("two")])))
    done = gate(path, path, "--max-regression", "tpot=5%")
    assert done.exit_code == 2
    assert "one, two" in done.stderr
    assert gate(path, path, "--max-regression", "ttft=5%", "--server", "two").exit_code == 0
