"""Files that are cut, bent or made up: one line and nothing else, whatever they hold."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmprobe.analysis import AnalysisError, analyze, read_trace
from llmprobe.analysis.names import BEYOND, NameTable
from llmprobe.capture.scrub import ScrubError, scrub

from .kineto_file import decoding
from .nsys_file import SCHEMA, NsysFile, serving

DATA = Path(__file__).parents[2] / "data"
_MANY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Whole files of each kind."""
    folder = tmp_path_factory.mktemp("good")
    return {
        "nsys": serving(folder / "a.sqlite", steps=4).read_bytes(),
        "real nsys": (DATA / "nsys" / "transformers_cpu.sqlite").read_bytes(),
        "kineto": decoding(4).write(folder / "a.json").read_bytes(),
        "gzip": decoding(4).write(folder / "a.json.gz").read_bytes(),
    }


def only_one_line(path: Path) -> None:
    """Analyse the file; it may be refused, in one line, and nothing else."""
    try:
        report = analyze(path)
    except AnalysisError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
        assert str(error).startswith(str(path))
    else:
        report.to_json()
        report.to_text()
        for gpu in report.gpus:
            assert 0 <= gpu.busy_ratio <= 1


KIND = st.sampled_from(["nsys", "real nsys", "kineto", "gzip"])


@_MANY
@given(kind=KIND, part=st.floats(0, 1))
def test_a_file_that_was_cut_off(good: dict[str, bytes], tmp_path: Path, kind: str, part: float) -> None:
    path = tmp_path / "cut"
    path.write_bytes(good[kind][: int(len(good[kind]) * part)])
    only_one_line(path)


@_MANY
@given(kind=KIND, edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=30)), max_size=12))
def test_a_file_with_other_bytes_in_it(
    good: dict[str, bytes], tmp_path: Path, kind: str, edits: list[tuple[float, bytes]]
) -> None:
    raw = bytearray(good[kind])
    for where, new in edits:
        at = int(where * (len(raw) - 1))
        raw[at : at + len(new)] = new
    path = tmp_path / "bent"
    path.write_bytes(raw)
    only_one_line(path)


@_MANY
@given(
    st.sampled_from([b"", b"SQLite format 3\0", b"{", b"[", b"\x1f\x8b", b'{"traceEvents": [']), st.binary()
)
def test_a_file_of_anything(tmp_path: Path, head: bytes, rest: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(head + rest)
    only_one_line(path)


CELL = (
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
)


@_MANY
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(set(SCHEMA) - {"StringIds"})),
            st.dictionaries(
                st.sampled_from(
                    [
                        "start",
                        "end",
                        "deviceId",
                        "globalPid",
                        "globalTid",
                        "correlationId",
                        "demangledName",
                        "nameId",
                        "copyKind",
                        "bytes",
                        "text",
                        "textId",
                        "domainId",
                        "eventType",
                        "int64Value",
                        "id",
                        "name",
                        "value",
                        "startTime",
                        "stopTime",
                        "gpuId",
                        "cudaId",
                        "pid",
                    ]
                ),
                CELL,
            ),
        ),
        max_size=12,
    )
)
def test_a_database_with_anything_in_its_cells(
    tmp_path: Path, rows: list[tuple[str, dict[str, object]]]
) -> None:
    path = tmp_path / "cells.sqlite"
    path.unlink(missing_ok=True)
    file = NsysFile(path)
    file.domain()
    for table, values in rows:
        try:
            file.row(table, **values)
        except (sqlite3.Error, UnicodeEncodeError):
            continue  # not even SQLite takes it
    only_one_line(file.close())


VALUE = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(), max_size=3)
)
CATEGORY = st.sampled_from(
    [
        "kernel",
        "gpu_memcpy",
        "gpu_memset",
        "cuda_runtime",
        "cuda_driver",
        "user_annotation",
        "cpu_op",
        "Trace",
    ]
)
NAME = st.sampled_from(
    ["nvjet", "Memcpy", "cudaGraphLaunch", "llmprobe:decode", "execute_context_1(9)_generation_2(2)", ""]
)
EVENT = st.fixed_dictionaries(
    {"ph": st.just("X"), "cat": CATEGORY, "name": NAME | VALUE},
    optional={
        "ts": st.floats(0, 1e6) | VALUE,
        "dur": st.floats(0, 1e5) | VALUE,
        "pid": VALUE,
        "tid": VALUE,
        "args": st.dictionaries(
            st.sampled_from(["device", "correlation", "bytes", "stream"]), st.integers(0, 3) | VALUE
        )
        | VALUE,
    },
)


@_MANY
@given(st.lists(EVENT, max_size=10), st.dictionaries(st.sampled_from(["deviceProperties"]), VALUE))
def test_a_trace_with_anything_in_its_events(
    tmp_path: Path, events: list[dict[str, object]], beside: dict[str, object]
) -> None:
    path = tmp_path / "events.json"
    path.write_text(json.dumps({**beside, "traceEvents": events}))
    only_one_line(path)
    copy = tmp_path / "copy.json"
    copy.unlink(missing_ok=True)
    scrub(path, copy)
    json.loads(copy.read_text(), parse_constant=pytest.fail)  # what was written is JSON without NaN
    only_one_line(copy)


@pytest.mark.parametrize("make", ["folder", "absent", "fifo", "socket path"])
def test_what_is_no_file(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)  # reading it would wait for ever
    elif make == "socket path":
        path = Path("/proc/self/mem\0")
    with pytest.raises(AnalysisError):
        analyze(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AnalysisError, match="Permission denied"):
        analyze(path)


def test_sqlite_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    data = sqlite3.connect(path)
    data.execute("CREATE TABLE moz_places (id INTEGER)")
    data.commit()
    data.close()
    with pytest.raises(AnalysisError, match="not an nsys export"):
        analyze(path)


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    for name in (b"bad\xff\n.sqlite", b"bad\xff\n.json"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        if name.endswith(b".json"):
            decoding(4).write(path)
        else:
            serving(tmp_path / "a.sqlite", steps=4).rename(path)
        report = analyze(path)
        assert report.gpus
        assert "\n" not in report.source.path
        report.to_text().encode("utf-8")
        scrub(path, tmp_path / f"copy-{path.suffix}")
        path.write_bytes(b"{")
        for refuse in (analyze, lambda path: scrub(path, path.with_suffix(".copy"))):
            with pytest.raises((AnalysisError, ScrubError)) as raised:
                refuse(path)
            assert "\n" not in str(raised.value)
            str(raised.value).encode("utf-8")


@pytest.mark.parametrize("number", ["9" * 4000, "-" + "9" * 4000])
@pytest.mark.parametrize("where", ["ts", "dur", "pid", "id", "base"])
def test_a_number_of_thousands_of_digits(tmp_path: Path, number: str, where: str) -> None:
    fields = {"ts": "1", "dur": "2", "pid": "3", "id": "4", "base": "5", where: number}
    path = tmp_path / "a.json"
    path.write_text(
        f'{{"baseTimeNanoseconds": {fields["base"]}, "deviceProperties": [{{"id": {fields["id"]}}}], '
        f'"traceEvents": [{{"ph": "X", "cat": "cpu_op", "name": "a", "ts": {fields["ts"]}, '
        f'"dur": {fields["dur"]}, "pid": {fields["pid"]}, "tid": 1}}]}}'
    )
    only_one_line(path)
    scrub(path, tmp_path / "copy.json", further=lambda base_ns: [{"ts": (1 - base_ns) / 1000}])


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{[1]: 2, "traceEvents": []}')
    with pytest.raises(AnalysisError, match="damaged JSON"):
        analyze(path)
    with pytest.raises(ScrubError, match="damaged JSON"):
        scrub(path, tmp_path / "copy.json")


def test_names_without_end_are_held_once_and_cut() -> None:
    table = NameTable()
    long = "x" * 1_000_000
    numbers = [table.add(f"{long}{number}") for number in range(3)]
    assert len(set(numbers)) == 3
    assert table.add(f"{long}1") == numbers[1]
    assert sum(map(len, table._index)) < 20_000  # what is kept, not what is shown
    for number in range(20_000):
        table.add(f"{number}{'y' * 4000}")
    assert len(table.names) < 20_000
    assert table.names[table.add("z" * 5000)] == BEYOND
    assert table.add(f"{long}1") == numbers[1]


def test_threads_without_end_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprobe.analysis.kineto._MOST_THREADS", 10)
    event = {"ph": "X", "cat": "user_annotation", "name": "llmprobe:decode", "ts": 1, "dur": 1}
    path = tmp_path / "a.json.gz"
    events = [{**event, "pid": "p" * 1000, "tid": number} for number in range(100)]
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert set(read_trace(path).ranges.thread.tolist()) == set(range(11))
