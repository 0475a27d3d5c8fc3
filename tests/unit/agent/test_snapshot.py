"""Snapshots of real journals, with nobody there to ask."""

from __future__ import annotations

import gzip
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from export.views_for_tests import server
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmprobe.agent import snapshot
from llmprobe.agent.snapshot import SnapshotError, build, load, redact, save
from llmprobe.cli.app import app
from llmprobe.cli.snapshot import _phase
from llmprobe.export.summary import summarize
from llmprobe.record.layout import UNKNOWN_PHASE, Clock, Phase
from llmprobe.record.recorder import Recorder

SECOND = 10**9
#: A byte of the compressed stream is another: zlib refuses it.
_WHOLE = gzip.compress(json.dumps({"kind": "llmprobe-snapshot", "columns": list(range(2000))}).encode())
DAMAGED = _WHOLE[:10] + b"\xff" + _WHOLE[11:]
FACTS = {
    "group": "g",
    "role": "worker",
    "server": "vllm-8000",
    "model_name": "a/model",
    "engine": 0,
    "rank": 0,
    "started": 1.0,
    "flags": {"max_num_batched_tokens": 2048, "api_key": "abc"},
    "notes": ["loaded from https://me:s3cret@models.example.org/a"],
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory with one worker's journal: five steps long ago, twenty just now, and one that runs."""
    recorder = Recorder.open(tmp_path / "shared", "worker", FACTS)
    now = time.monotonic_ns()
    for number in range(25):
        begin = now - (900 * SECOND if number < 5 else 10 * SECOND) + number * 10_000_000
        step = recorder.begin(int(Phase.DECODE), 4, begin)
        times = (begin, begin + 3_000_000, begin + 3_000_000, begin + 4_000_000)
        counts = {"requests": 4, "prefill_requests": 0, "prompt_tokens": 0, "decode_tokens": 4}
        recorder.step(step, begin, int(Phase.DECODE), int(Clock.CUDA), 0, times, **counts)
    recorder.request(now, SECOND, ttft_ns=10**7, tpot_ns=10**7, prompt_tokens=8, generated_tokens=9)
    recorder.pending(now, 3)
    recorder.begin(int(Phase.PREFILL), 512, now)
    recorder.publish()
    yield tmp_path / "shared"
    recorder.close(remove=True)


def made(directory: Path, **changes: Any) -> dict[str, Any]:
    return build(directory, **{"no_status": "nobody answers", "host_seconds": 0, **changes})


def test_it_holds_steps_requests_counters_and_the_running_step(directory: Path) -> None:
    document = made(directory)
    (process,) = document["processes"]
    assert process["facts"]["server"] == "vllm-8000"
    assert process["steps"]["step"] == list(range(6, 26))  # those before ten minutes ago are left out
    assert process["steps"]["decode_tokens"] == [4] * 20
    assert process["counters"]["steps_decode"] == 25
    assert process["requests"]["generated_tokens"] == [9]
    assert process["pending"]["unfinished"] == [3]
    assert process["progress"] == {
        **process["progress"],
        "begun": 26,
        "ended": 25,
        "phase": int(Phase.PREFILL),
        "tokens": 512,
    }
    assert sum(process["histograms"]["step_decode"].values()) == 25
    assert document["clock"]["monotonic_ns"] > process["steps"]["e3"][-1]


def test_a_longer_time_takes_in_more(directory: Path) -> None:
    assert len(made(directory, seconds=3600)["processes"][0]["steps"]["step"]) == 25


def test_what_is_saved_is_what_is_read_back_and_only_its_owner_may(directory: Path, tmp_path: Path) -> None:
    document = made(directory, status={"servers": [], "time": 1.0})
    path = tmp_path / "s.json.gz"
    assert save(document, path) == path.stat().st_size
    assert load(path) == document
    assert path.stat().st_mode & 0o777 == 0o600
    provenance = load(path)["provenance"]
    assert {"llmprobe_version", "made", "kernel", "python"} <= set(provenance)


def test_it_never_overwrites(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.json.gz"
    path.write_text("mine")
    with pytest.raises(SnapshotError, match="exists"):
        save(made(directory), path)
    assert path.read_text() == "mine"


def test_a_disk_that_takes_no_more_leaves_no_part_behind(directory: Path, tmp_path: Path) -> None:
    document, path = made(directory), tmp_path / "s.json.gz"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        with pytest.raises(SnapshotError, match=r"cannot write .*s\.json\.gz.*--output"):
            save(document, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()


def test_one_that_is_broken_off_leaves_no_part_behind(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **options: Any) -> str:
        raise KeyboardInterrupt

    document = build(directory, host_seconds=0)
    monkeypatch.setattr(snapshot.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(document, tmp_path / "one.json.gz")
    assert not (tmp_path / "one.json.gz").exists()


def test_a_missing_folder_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"none/s\.json\.gz"):
        save(made(directory), tmp_path / "none" / "s.json.gz")


def test_secrets_are_removed_and_what_merely_counts_tokens_stays(directory: Path) -> None:
    os.environ["LLMPROBE_TEST_SECRET"] = "sk-test-0123456789abcdef0123"
    try:
        text = json.dumps(made(directory))
    finally:
        del os.environ["LLMPROBE_TEST_SECRET"]
    assert "s3cret" not in text
    assert '"abc"' not in text
    assert "sk-test" not in text
    assert "models.example.org/a" in text
    flags = made(directory)["processes"][0]["facts"]["flags"]
    assert flags == {"max_num_batched_tokens": 2048, "api_key": "[removed]"}


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrst",
        "sk-abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx.c2ln",
    ],
)
def test_what_has_the_form_of_a_secret_is_removed_wherever_it_stands(secret: str) -> None:
    found = redact({"notes": [f"started with {secret} by somebody"], "x": {"y": secret}})
    assert secret not in json.dumps(found)
    assert "started with" in found["notes"][0]
    assert redact({"a": f"Authorization: Bearer {secret}"})["a"] == "Authorization: Bearer [removed]"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("abc xyz/-.", max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
)


@settings(deadline=None)
@given(json_values)
def test_what_is_no_secret_is_left_as_it_is(value: Any) -> None:
    assert redact(value) == value


def test_a_damaged_journal_is_named_and_the_others_are_saved(directory: Path) -> None:
    (directory / "journals" / "worker-1-ffff.journal").write_bytes(b"LLMPROBE" + bytes(100))
    document = made(directory)
    assert len(document["processes"]) == 1
    assert "worker-1-ffff.journal" in document["unread"]


def test_with_nothing_to_save_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no journal"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no gzip", "not a snapshot"),
        (gzip.compress(b"{"), "not a snapshot"),
        (gzip.compress(b"{}" * 5000)[:20], "cut short"),
        (DAMAGED, "not a snapshot"),
        (gzip.compress(b"{}"), "not a snapshot of llmprobe"),
        (gzip.compress(b'{"kind": "llmprobe-snapshot", "schema_version": 9}'), "schema_version 9"),
    ],
)
def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "x.json.gz"
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=said) as error:
        load(path)
    assert "x.json.gz" in str(error.value)


def run(directory: Path, *arguments: object) -> Any:
    return CliRunner(env={"LLMPROBE_DIR": str(directory)}).invoke(app, ["snapshot", *map(str, arguments)])


def test_the_command_saves_without_an_agent_and_shows_what_it_saved(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = run(directory)
    assert saved.exit_code == 0, saved.output
    assert "no agent serves" in saved.stderr
    (path,) = tmp_path.glob("llmprobe-*.json.gz")
    assert f"saved {path.name}: 1 processes, 20 steps" in saved.stdout
    shown = run(directory, "--show", path)
    assert shown.exit_code == 0, shown.output
    assert "vllm-8000 worker rank 0" in shown.stdout
    assert "it died in step 26 (prefill, 512 tokens), which began" in shown.stdout
    assert ["decode", "20", "4.00", "4.00", "4.0"] in [line.split() for line in shown.stdout.splitlines()]
    assert json.loads(run(directory, "--show", path, "--json").stdout) == load(path)


def test_no_name_in_a_snapshot_of_others_steers_the_terminal(directory: Path, tmp_path: Path) -> None:
    document = build(directory, status=summarize([server()]), host_seconds=0)
    text = json.dumps(document)
    assert "a/model" in text
    path = tmp_path / "theirs.json.gz"
    path.write_bytes(gzip.compress(text.replace("a/model", "evil\\u001b[2J").encode()))
    shown = run(directory, "--show", path)
    assert shown.exit_code == 0
    assert "evil" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_the_command_refuses_what_exists_and_contradicting_options(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json.gz"
    path.write_text("mine")
    refused = run(directory, "--output", path)
    assert refused.exit_code == 2
    assert "mine.json.gz exists" in refused.stderr
    assert run(directory, "--show", path, "--output", path).exit_code == 2
    assert run(directory, "--show", tmp_path / "none").exit_code == 1
    too_long = "x" * 300
    assert too_long in run(directory, "--output", too_long).stderr
    assert "File name too long" in run(tmp_path / too_long).stderr


def shown(path: Path, document: dict[str, Any]) -> tuple[int, str]:
    save(document, path)
    done = CliRunner().invoke(app, ["snapshot", "--show", str(path)], env={"COLUMNS": "100"})
    return done.exit_code, done.output


def test_what_is_shown_begins_with_the_verdict_and_names_are_no_markup(
    directory: Path, tmp_path: Path
) -> None:
    status = summarize([server("one", model_name="a[/b]", notes=["see [/x]"]), server("two")])
    code, text = shown(tmp_path / "a.json.gz", made(directory, status=status, no_status=""))
    assert code == 0
    headline = "one: Decode memory-bound, confidence 0.72"
    assert headline in text
    assert "two: Decode memory-bound" in text
    assert text.index(headline) < text.index("a[/b]")
    for part in (
        "under pressure: queueing",
        "try --max-num-seqs 32",
        "evidence on decode",
        "flags: max_num_seqs 16",
    ):
        assert part in text
    code, text = shown(tmp_path / "b.json.gz", made(directory))
    assert code == 0
    assert "max_num_batched_tokens 2048" in text  # the processes' own, where no agent told of any


@pytest.mark.parametrize(
    "damage",
    [
        {"status": {"servers": ["x"]}},
        {"status": {"servers": [{"headline": "x"}]}},
        {"processes": [None]},
        {"provenance": {"made": 1e300}},
        {"unread": []},
    ],
)
def test_a_snapshot_with_something_else_in_it_is_damaged(
    directory: Path, tmp_path: Path, damage: dict[str, Any]
) -> None:
    document = made(directory)
    if "provenance" in damage:
        damage = {"provenance": {**document["provenance"], **damage["provenance"]}}
    code, text = shown(tmp_path / "a.json.gz", {**document, **damage})
    assert code == 1
    assert "is damaged" in text


def test_default_names_sort_by_time() -> None:
    assert snapshot.default_name(0) == "llmprobe-19700101T000000Z.json.gz"
    assert snapshot.default_name(1.0e9) < snapshot.default_name(1.7e9)


def test_a_running_step_whose_batch_nobody_read_can_be_shown() -> None:
    assert _phase(int(Phase.MIXED)) == "mixed"
    assert _phase(UNKNOWN_PHASE) == "phase not known"
