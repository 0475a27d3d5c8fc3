"""Torch profiler traces: read piece by piece, with the same sums as PyTorch's own."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.analysis import AnalysisError, analyze, json_stream
from llmprobe.analysis.json_stream import Document
from llmprobe.analysis.kineto import RECORDED_UNTIL
from llmprobe.analysis.text import render
from llmprobe.capture.scrub import scrub

from .kineto_file import KinetoFile, decoding

DATA = Path(__file__).parents[2] / "data" / "kineto"


def test_host_operators_of_a_real_trace_are_those_of_key_averages() -> None:
    report = analyze(DATA / "transformers_cpu.json.gz")
    ours = {row.name: row for row in report.host_operators}
    truth = json.loads((DATA / "transformers_cpu.key_averages.json").read_text())
    assert len(truth) == len(ours) > 50
    for name, count, total_us, own_us in truth:
        assert ours[name].count == count, name
        assert ours[name].seconds == pytest.approx(total_us / 1e6, rel=1e-3), name
        assert ours[name].self_seconds == pytest.approx(own_us / 1e6, rel=1e-3, abs=1e-9), name
    assert report.gpus == []
    assert report.trust.verdict == "untrusted"
    text = render(report)
    assert "Nothing about a GPU can be told" in text
    assert "DO NOT TRUST" not in text  # what the host did may be


def ours(name: str) -> str:
    """What `analyze` calls an activity that is named so in a trace: copies of one direction are one kind."""
    words = name.split()
    return {"Memcpy": " ".join(words[:2]).replace("M", "m", 1), "Memset": "memset"}.get(words[0], name)


@pytest.mark.parametrize("activities", ["cuda", "cpu_cuda"])
def test_work_on_a_gpu_is_that_of_key_averages(activities: str) -> None:
    report = analyze(DATA / f"transformers_h200_{activities}.json.gz")
    truth = json.loads((DATA / f"transformers_h200_{activities}.key_averages.json").read_text())["gpu"]
    assert report.trust.verdict == "trusted"
    assert [gpu.name for gpu in report.gpus] == ["GPU 0 (NVIDIA H200)"]
    sums: dict[str, tuple[int, float]] = {}
    for name, count, us in truth:
        known = sums.get(ours(name), (0, 0.0))
        sums[ours(name)] = (known[0] + count, known[1] + us)
    assert len(sums) == len(report.kernels) > 50
    for row in report.kernels:
        count, us = sums[row.name]
        assert row.count == count, row.name
        assert row.seconds == pytest.approx(us / 1e6, rel=1e-3), row.name
    (gpu,) = report.gpus
    moved = {"memcpy": 0, "memset": 0}
    for name, (count, _) in sums.items():
        if (kind := name.split()[0]) in moved:
            moved[kind] += count
    assert (gpu.copies, gpu.sets) == (moved["memcpy"], moved["memset"])
    assert gpu.kernels == sum(count for count, _ in sums.values()) - gpu.copies - gpu.sets
    whole = sum(us for _, us in sums.values()) / 1e6
    assert sum(row.seconds for row in report.operators) == pytest.approx(whole, rel=1e-3)
    assert gpu.busy_seconds == pytest.approx(whole, rel=1e-3)  # one stream: nothing runs beside another


def test_what_calls_into_cuda_cost_an_operator_is_no_own_time_of_it() -> None:
    report = analyze(DATA / "transformers_h200_cpu_cuda.json.gz")
    truth = json.loads((DATA / "transformers_h200_cpu_cuda.key_averages.json").read_text())["host"]
    rows = {row.name: row for row in report.host_operators}
    seen = {name: values for name, *values in truth}
    # CUPTI's own, in whose time key_averages sees no operator; the trace does not say in which it fell.
    (_, _, buffers) = seen.pop("Activity Buffer Request")
    assert rows.keys() == seen.keys()
    for name, (count, total_us, own_us) in seen.items():
        assert rows[name].count == count, name
        assert rows[name].seconds == pytest.approx(total_us / 1e6, rel=1e-3), name
        own_us += buffers if name == "aten::copy_" else 0
        assert rows[name].self_seconds == pytest.approx(own_us / 1e6, rel=1e-3, abs=1e-9), name
    assert rows["cudaLaunchKernel"].count > 1000
    assert analyze(DATA / "transformers_h200_cuda.json.gz").host_operators == []  # none was recorded


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_sums_of_a_capture_of_a_server_are_those_of_its_events(name: str) -> None:
    """Read as a whole by a JSON parser, and added up."""
    report = analyze(DATA / f"vllm_h200_{name}.json.gz")
    events = json.loads(gzip.decompress((DATA / f"vllm_h200_{name}.json.gz").read_bytes()))["traceEvents"]
    ran = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    sums: dict[str, list[float]] = {}
    for event in ran:
        sums.setdefault(ours(event["name"]), []).append(event["dur"] / 1e6)
    assert {row.name: row.count for row in report.kernels} == {name: len(row) for name, row in sums.items()}
    for row in report.kernels:
        assert row.seconds == pytest.approx(sum(sums[row.name]), rel=1e-3)
    whole = sum(sum(row) for row in sums.values())
    assert sum(row.seconds for row in report.operators) == pytest.approx(whole, rel=1e-3)
    (gpu,) = report.gpus
    assert gpu.busy_seconds <= whole * 1.001


def test_steps_of_a_server_that_a_capture_has_in_part_are_told() -> None:
    (decode,) = [row for row in analyze(DATA / "vllm_h200_decode.json.gz").phases if not row.part]
    assert (decode.steps, decode.cut_steps) == (6, 2)  # the first of them ends 6 µs into the recording
    assert decode.sync_gap_ratio == pytest.approx(0.053, abs=0.001)
    # Most of it are half microseconds between kernels, as in windows: 0.004 live, 0.015 by `kernels`
    assert decode.comparable_sync_gap_ratio == pytest.approx(0.012, abs=0.001)
    rows = {row.name: row for row in analyze(DATA / "vllm_h200_prefill.json.gz").phases}
    # 51 of its 190 ms
    assert (rows["prefill"].steps, rows["prefill"].cut_steps) == (1, 1)
    assert rows["prefill"].comparable_sync_gap_ratio is None
    assert (rows["decode"].steps, rows["decode"].cut_steps) == (3, 1)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_trace_is_told_by_phase(tmp_path: Path, name: str) -> None:
    report = analyze(decoding().write(tmp_path / name))
    assert report.trust.verdict == "trusted"
    (gpu,) = report.gpus
    assert gpu.name == "GPU 0 (NVIDIA H100 80GB HBM3)"
    assert gpu.busy_ratio == pytest.approx(300 / 350, rel=0.01)
    assert gpu.exposed_communication_seconds == pytest.approx(60 * 100e-6)
    (decode,) = report.phases
    assert (decode.name, decode.steps, decode.tokens) == ("decode", 60, 120)
    assert decode.seconds == pytest.approx(60 * 300e-6)
    # 59 gaps of 50 µs and the time that only communicates
    assert decode.sync_gap_ratio == pytest.approx((59 * 50 + 60 * 100) / (59 * 50 + 60 * 300))
    assert {row.name: row.count for row in report.operators} == {
        "attention": 60,
        "gemm": 60,
        "communication": 60,
    }


@pytest.mark.parametrize(
    ("mark", "phase", "tokens"),
    [
        ("execute_context_2(600)_generation_0(0)", "prefill", 600),
        ("execute_context_1(512)_generation_3(3)", "mixed", 515),
        ("execute_context_0(0)_generation_4(4)", "decode", 4),
        ("execute_4_context_0(sq0sk0sqsq0sqsk0)_generation_4(sq4sk99sqsq4sqsk99)", "decode", 4),
        ("llmprobe:prefill", "prefill", None),
    ],
)
def test_steps_marked_by_vllm_or_by_us_are_phases(
    tmp_path: Path, mark: str, phase: str, tokens: int | None
) -> None:
    (row,) = analyze(decoding(2, mark).write(tmp_path / "a.json")).phases
    assert row.name == phase
    assert row.tokens == (None if tokens is None else 2 * tokens)


def test_a_trace_of_torch_without_phases_is_not_told_of_nvtx(tmp_path: Path) -> None:
    text = analyze(decoding(3, "something").write(tmp_path / "a.json")).to_text()
    assert "no phases marked" in text
    assert "NVTX" not in text


def test_operators_end_where_the_recording_did(tmp_path: Path) -> None:
    """torch gives what is still open then as its end when it put the trace together, long after."""
    file = decoding(3, "llmprobe:decode")
    for name, begin, length in (
        ("aten::whole", 100.0, 50.0),
        ("aten::cut", 180.0, 700_000.0),
        ("aten::inside", 190.0, 5.0),
        ("aten::later", 210.0, 600_000.0),
    ):
        file.event("cpu_op", name, begin, length, 101)
    file.event("cpu_op", RECORDED_UNTIL, 0.0, 1.0, 102)
    mark = file.events.pop()
    without = analyze(file.write(tmp_path / "a.json"))
    file.events.append(
        {key: mark[key] for key in ("name", "pid", "tid")} | {"ph": "i", "ts": mark["ts"] + 200.0}
    )
    found = analyze(file.write(tmp_path / "b.json"))
    mine = {row.name: (row.count, row.seconds, row.self_seconds) for row in found.host_operators}
    near = pytest.approx
    assert mine["aten::whole"] == (1, near(50e-6), near(50e-6))
    assert mine["aten::cut"] == (1, near(20e-6), near(15e-6))
    assert "aten::later" not in mine
    assert max(row.seconds for row in without.host_operators) > 0.6
    assert found.phases == without.phases
    scrub(tmp_path / "b.json", tmp_path / "c.json.gz")
    assert analyze(tmp_path / "c.json.gz").host_operators == found.host_operators


def test_where_both_mark_our_own_ranges_count(tmp_path: Path) -> None:
    file = decoding(3)
    for event in [event for event in file.events if event["cat"] == "user_annotation"]:
        file.events.append({**event, "name": "llmprobe:prefill"})
    assert [row.name for row in analyze(file.write(tmp_path / "a.json")).phases] == ["prefill"]


def test_what_kineto_repeats_of_a_range_for_each_stream_is_no_step(tmp_path: Path) -> None:
    file = decoding(3, "llmprobe:decode")
    expected = analyze(file.write(tmp_path / "a.json")).phases
    for event in [event for event in file.events if event["cat"] == "user_annotation"]:
        for stream in (7, 20):
            copy = {"cat": "gpu_user_annotation", "pid": 0, "tid": stream, "ts": event["ts"] + 200.0}
            file.events.append({**event, **copy, "dur": 250.0, "args": {"External id": 4}})
    assert analyze(file.write(tmp_path / "b.json")).phases == expected


def test_a_round_of_vllm_in_which_nothing_was_scheduled_is_no_step(tmp_path: Path) -> None:
    file = decoding(3)
    for number in range(5):
        file.mark("execute_context_0(0)_generation_0(0)", 5000.0 + number * 50, 20.0)
        file.kernel("k", 5010.0 + number * 50, 5.0, 5005.0 + number * 50)
    (row,) = analyze(file.write(tmp_path / "a.json")).phases
    assert (row.name, row.steps, row.tokens) == ("decode", 3, 6)


def test_nanoseconds_of_a_clock_that_runs_for_months_are_kept(tmp_path: Path) -> None:
    file = KinetoFile(base=4572473136056.528)
    file.kernel("k", 0.0, 1.001, None)
    file.kernel("k", 2.003, 1.0, None)
    report = analyze(file.write(tmp_path / "a.json"))
    assert report.gpus[0].busy_seconds == pytest.approx(2.001e-6, abs=2e-9)


def test_a_bare_list_of_events_is_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(decoding(2).events))
    assert analyze(path).gpus[0].kernels == 6


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello", "not a trace"),
        (b"{}", "no list traceEvents"),
        (b'{"traceEvents": 3}', "no list traceEvents"),
        (b'{"traceEvents": [{"ph": "X"', "damaged JSON, or cut off"),
        (b'{"traceEvents": [1, 2', "damaged JSON, or cut off"),
        (b'{"traceEvents": [}', "damaged JSON, or cut off"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 20_000 + b', "traceEvents": []}', "damaged"),
        (gzip.compress(b'{"traceEvents": []}')[:-9], "cannot be read to its end"),
        (b"\x1f\x8bnot gzip", "cannot be read to its end"),
    ],
)
def test_what_is_no_trace_gets_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match=says) as raised:
        analyze(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_events_that_make_no_sense_are_passed_over(tmp_path: Path) -> None:
    good = decoding(2).events
    kernel = next(event for event in good if event["cat"] == "kernel")
    bad: list[Any] = [
        None,
        3,
        "x",
        [],
        {},
        {"ph": "X"},
        {**kernel, "ts": "soon"},
        {**kernel, "ts": 1e300},
        {**kernel, "ts": True},
        {**kernel, "dur": None},
        {**kernel, "name": 7},
        {**kernel, "cat": ["kernel"]},
        {"ph": "X", "cat": "cpu_op", "name": "n", "ts": 1, "dur": 1, "pid": {}, "tid": []},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"traceEvents": bad + good}))
    text = path.read_text().replace("null", "NaN", 1)
    path.write_text(text)
    assert analyze(path).gpus[0].kernels == 6


def test_a_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_BYTES", 4 << 20)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": [' + b" " * (5 << 20)))
    with pytest.raises(AnalysisError, match="unpacks to more than"):
        analyze(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    before=st.dictionaries(st.text().filter("traceEvents".__ne__), JSON, max_size=3),
    events=st.lists(JSON, max_size=6),
    after=st.dictionaries(st.text().filter("traceEvents".__ne__), JSON, max_size=2),
    chunk=st.integers(1, 64),
    ascii_only=st.booleans(),
)
def test_any_document_is_read_as_a_json_parser_reads_it(
    before: dict[str, Any], events: list[Any], after: dict[str, Any], chunk: int, ascii_only: bool
) -> None:
    document = {**before, "traceEvents": events}
    document.update({key: value for key, value in after.items() if key not in document})
    raw = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    others: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK_BYTES", chunk)  # every value is cut somewhere
        found = list(Document(io.BytesIO(raw), Path("x"), others.__setitem__).events())
    expected = json.loads(raw.decode("utf-8", "replace"))
    assert found == expected.pop("traceEvents")
    assert others == expected


def test_memory_does_not_grow_with_the_document() -> None:
    event = json.dumps({"ph": "i", "name": "x" * 2000, "args": {"a": [1, 2, 3]}}).encode()
    raw = b'{"traceEvents": [' + b",".join([event] * 12_000) + b"]}"
    stream = io.BytesIO(raw)
    tracemalloc.start()
    try:
        count = sum(1 for _ in Document(stream, Path("x"), lambda key, value: None).events())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 12_000
    assert len(raw) > 23 << 20
    assert peak < 8 << 20
