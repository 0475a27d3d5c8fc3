"""Files of ``kernels`` captures: read as they were written, and one line for everything else."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmprobe.analysis import AnalysisError, analyze
from llmprobe.analysis.events import COPY, UNKNOWN, Activities, Source, Trace, no_spans
from llmprobe.analysis.kernel_file import read_kernels, write_kernels
from llmprobe.analysis.report import make_report
from llmprobe.analysis.together import together

ACTIVITY = np.dtype(
    [("begin", "<i8"), ("end", "<i8"), ("name", "<u4"), ("stream", "<u4"), ("device", "u1"), ("kind", "u1")]
)
STEP = np.dtype([("begin", "<i8"), ("end", "<i8"), ("name", "u1"), ("tokens", "<i8")])
DATA = Path(__file__).parents[2] / "data"
MS = 1_000_000


def header(**changes: Any) -> dict[str, Any]:
    return {
        "version": "0.1",
        "names": ["gemm", "memcpy HtoD"],
        "ranges": ["prefill", "decode", "forward"],
        "devices": {"0": "NVIDIA H100", "3": "NVIDIA H100"},
        "begin_ns": 0,
        "end_ns": 100 * MS,
        "dropped": 0,
        **changes,
    }


def rows(device: int = 0) -> np.ndarray:
    """Ten steps of 10 ms: a product for 6 ms from their begin on, 1 ms idle, a copy for 1 ms."""
    found = np.zeros(20, ACTIVITY)
    begin = np.arange(10) * 10 * MS
    found["begin"] = np.stack((begin, begin + 7 * MS), axis=1).ravel()
    found["end"] = np.stack((begin + 6 * MS, begin + 8 * MS), axis=1).ravel()
    found["name"] = found["kind"] = np.tile([0, COPY], 10)
    found["device"] = device
    return found


def steps() -> np.ndarray:
    found = np.zeros(20, STEP)
    begin = np.arange(10) * 10 * MS
    found["begin"], found["name"], found["tokens"] = np.tile(begin, 2), [0, *[1] * 9, *[2] * 10], 4
    found["end"] = np.concatenate((begin + 8 * MS, begin + 6 * MS))
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "kernels-rank0.npz"
    write_kernels(made, header(), rows(), steps())
    return made


def test_busy_time_and_phases_are_exact(path: Path) -> None:
    report = analyze(path)
    (gpu,) = report.gpus
    assert (gpu.name, gpu.kernels, gpu.copies) == ("GPU 0 (NVIDIA H100)", 10, 10)
    assert gpu.seconds == pytest.approx(0.098)
    assert gpu.busy_seconds == pytest.approx(0.070)
    assert gpu.exposed_transfer_seconds == pytest.approx(0.010)
    assert gpu.unlaunched_idle_seconds is None
    phases = {(row.name, row.part): row for row in report.phases}
    decode = phases[("decode", None)]
    assert (decode.steps, decode.tokens) == (9, 36)
    assert decode.seconds == pytest.approx(0.072)
    assert decode.busy_ratio == pytest.approx(7 / 8)
    assert decode.gap_seconds == pytest.approx(0.018)
    assert decode.sync_gap_ratio == pytest.approx((9 * 2 + 9 * 2) / (9 * 10))  # gaps, idle and copies alone
    assert phases[("prefill", None)].steps == 1
    assert phases[("decode", "forward")].busy_ratio == 1.0
    assert report.trust.verdict == "limited"  # few kernels
    assert report.gaps[0].phase in ("prefill", "decode")
    assert "late launches cannot be told" in report.to_text()
    assert not any(finding.name in ("launch_bubbles", "host_bound") for finding in report.findings)


def test_steps_in_which_the_recording_began_or_ended_are_cut(path: Path) -> None:
    assert [row.cut_steps for row in analyze(path).phases] == [0] * 4
    ran, longer = rows(), steps()
    for column in (ran["begin"], ran["end"], longer["begin"], longer["end"]):
        column += 10 * MS
    longer["begin"][0] -= 3 * MS  # the prefill, a part of which was there before
    longer["end"][9] += MS  # the last decode
    longer["begin"][1] -= 50_000  # as far as clocks may differ
    write_kernels(path, header(), ran, longer)
    found = {(row.name, row.part): row for row in analyze(path).phases}
    assert found["prefill", None].cut_steps == found["decode", None].cut_steps == 1
    assert found["prefill", None].comparable_sync_gap_ratio is None
    decode = found["decode", None]
    assert decode.steps == 9
    assert decode.comparable_sync_gap_ratio == pytest.approx((8 * 2 + 8 * 2) / (8 * 10))
    assert "1 decode, 1 prefill" in analyze(path).to_text()


def test_less_than_a_microsecond_between_two_is_no_idle_time(path: Path) -> None:
    close = rows()[:2]
    close["begin"], close["end"] = (
        [
            0,
            10_500,
        ],
        [10_000, 20_000],
    )
    write_kernels(path, header(), close, steps()[:0])
    assert analyze(path).gpus[0].busy_ratio == 1.0
    close["begin"][1] = 11_500
    write_kernels(path, header(), close, steps()[:0])
    assert analyze(path).gpus[0].busy_ratio == pytest.approx(18.5 / 20)


def test_captures_of_one_server_by_two_tools_agree() -> None:
    """On an H200, one after the other; see tests/data/PROVENANCE.md."""
    kernels = analyze(DATA / "kernels" / "vllm_h200_decode.npz")
    torch = analyze(DATA / "kineto" / "vllm_h200_decode.json.gz")
    (mine,), (theirs,) = ([row for row in one.phases if not row.part] for one in (kernels, torch))
    assert (mine.name, mine.steps, mine.cut_steps) == ("decode", 12, 0)
    assert mine.tokens == 12 * 4
    assert mine.comparable_sync_gap_ratio == pytest.approx(theirs.comparable_sync_gap_ratio, abs=0.02)
    large = [row for row in kernels.kernels if row.share > 0.02]
    other = {row.name: row for row in torch.kernels}
    assert len(large) > 5
    for row in large:
        assert row.mean_seconds == pytest.approx(other[row.name].mean_seconds, rel=0.02), row.name
        assert row.share == pytest.approx(other[row.name].share, abs=0.01), row.name
        assert row.operator == other[row.name].operator
    with np.load(DATA / "kernels" / "vllm_h200_decode.npz") as file:
        ran = file["activities"]
    assert sum(row.count for row in kernels.operators) == len(ran)
    assert sum(row.seconds for row in kernels.operators) == pytest.approx(
        int((ran["end"] - ran["begin"]).sum()) / 1e9
    )


def test_kernels_that_were_dropped_make_it_untrusted(path: Path) -> None:
    write_kernels(path, header(dropped=2), rows(), steps())
    assert analyze(path).trust.verdict == "untrusted"


def test_nothing_that_ran_is_said(path: Path) -> None:
    write_kernels(path, header(), rows()[:0], steps())
    report = analyze(path)
    assert report.trust.reasons[0].check == "no_kernels"
    assert [(row.name, row.seconds) for row in report.phases if row.part is None] == [
        ("decode", None),
        ("prefill", None),
    ]


def test_steps_belong_to_the_device_that_does_most(path: Path) -> None:
    both = np.concatenate((rows(3), rows(0)[:3]))
    write_kernels(path, header(), both, steps())
    trace = read_kernels(path)
    assert trace.devices == ["GPU 0 (NVIDIA H100)", "GPU 3 (NVIDIA H100)"]
    assert set(trace.device_ranges.thread.tolist()) == {1}
    assert {row.gpu for row in analyze(path).phases} == {"GPU 3 (NVIDIA H100)"}


def test_two_processes_together_are_both(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    write_kernels(other, header(names=["softmax", "gemm"], dropped=1), rows(), steps())
    one = read_kernels(path)
    trace = together([("rank0", one), ("rank1", read_kernels(other))])
    assert trace.devices == ["rank0: GPU 0 (NVIDIA H100)", "rank1: GPU 0 (NVIDIA H100)"]
    assert trace.lost == ["rank1: 1 records or more have no times, or found no room"]
    assert len(trace.activities) == 40
    assert (np.diff(trace.activities.begin_ns) >= 0).all()
    named = np.array(trace.names)[trace.activities.name]
    on_second = trace.activities.device == 1
    assert sorted(set(named[on_second].tolist())) == ["gemm", "softmax"]
    assert sorted(set(named[~on_second].tolist())) == ["gemm", "memcpy HtoD"]
    assert set(trace.activities.thread.tolist()) == {UNKNOWN}
    assert (trace.device_ranges.thread == 1).sum() == 20
    assert together([("rank0", one)]) is one


def test_how_idle_a_gpu_was_is_told_by_the_seconds_of_its_own_process(path: Path, tmp_path: Path) -> None:
    later = rows()
    shift = 300 * MS
    for name in ("begin", "end"):
        later[name] += shift
    other = tmp_path / "other.npz"
    times = {name: header()[name] + shift for name in ("begin_ns", "end_ns")}
    write_kernels(other, header(**times), later, steps())
    alone = make_report(read_kernels(path)).gpus[0]
    trace = together([("rank0", read_kernels(path)), ("rank1", read_kernels(other))])
    report = make_report(trace)
    assert [(gpu.seconds, gpu.idle_ratio) for gpu in report.gpus] == [(alone.seconds, alone.idle_ratio)] * 2
    assert "gpu_partly_seen" not in {reason.check for reason in report.trust.reasons}
    begins = {gap.gpu.partition(":")[0]: gap.begin_seconds for gap in report.gaps}
    assert begins["rank1"] > 0.3 > begins["rank0"]  # on one scale
    assert make_report(together([("rank0", read_kernels(path)), ("rank1", without_gpu())])).gpus[1:] == []


def test_a_process_that_fell_silent_was_idle(path: Path, tmp_path: Path) -> None:
    early = rows()[:4]
    other = tmp_path / "other.npz"
    write_kernels(other, header(), early, steps())
    report = make_report(together([("rank0", read_kernels(path)), ("rank1", read_kernels(other))]))
    assert report.gpus[1].seconds == report.gpus[0].seconds
    assert report.gpus[1].idle_ratio > 0.8
    assert "gpu_partly_seen" in {reason.check for reason in report.trust.reasons}
    assert "uneven_gpus" in {finding.name for finding in report.findings}


def test_short_recordings_far_apart_are_short(path: Path, tmp_path: Path) -> None:
    traces = []
    for rank in range(2):
        brief = np.tile(rows(), 3)
        brief["begin"] = rank * 300 * MS + np.arange(60) * 50_000
        brief["end"] = brief["begin"] + 40_000
        other = tmp_path / f"brief{rank}.npz"
        times = {"begin_ns": rank * 300 * MS, "end_ns": rank * 300 * MS + 4 * MS}
        write_kernels(other, header(**times), brief, steps()[:0])
        traces.append((f"rank{rank}", read_kernels(other)))
    for trace in (traces[0][1], together(traces)):
        assert "short" in {reason.check for reason in make_report(trace).trust.reasons}


def test_gpus_that_communicate_alike_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Though one process recorded for longer than the other."""
    traces = []
    for rank, count in enumerate((20, 17)):
        ran = rows()[:count]
        ran["kind"] = 0
        step = np.arange(count) // 2 * 10 * MS  # a product for 1 ms, an all-reduce for 8
        ran["begin"] = step + np.arange(count) % 2 * MS
        ran["end"] = ran["begin"] + np.where(np.arange(count) % 2, 8, 1) * MS
        other = tmp_path / f"rank{rank}.npz"
        write_kernels(other, header(names=["gemm", "ncclDevKernel_AllReduce"]), ran, steps())
        traces.append((f"rank{rank}", read_kernels(other)))
    report = make_report(together(traces))
    (found,) = [one for one in report.findings if one.name == "exposed_communication"]
    assert "than another GPU" not in found.next_step


def without_gpu() -> Trace:
    nothing = np.empty(0, dtype=np.int64)
    return Trace(Source("x", "torch", "f"), [], [], Activities(*[nothing] * 8), no_spans(), no_spans())


def repacked(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, **{f"{key}.npy": data for key, data in members.items()}}.items():
            archive.writestr(name, data)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def said(**changes: Any) -> bytes:
    content = {"schema": 1, **header(**changes)}
    return npy(np.frombuffer(json.dumps(content).encode(), dtype=np.uint8))


def declared(shape: tuple[int, ...], kind: str) -> bytes:
    """A member that says it holds more than it does."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": kind})
    return buffer.getvalue() + bytes(100)


@pytest.mark.parametrize(
    "members",
    [
        {"header": b""},
        {"header": npy(np.zeros(3, np.uint8))},
        {"header": said(schema=2)},
        {"header": said(names=[])},
        {"header": said(ranges="x")},
        {"header": said(devices=[])},
        {"header": said(dropped="many")},
        {"header": said(begin_ns=None)},
        {"header": said(end_ns=1 << 80)},
        {"activities": npy(np.zeros(3))},
        {"activities": npy(np.zeros((2, 2), ACTIVITY))},
        {"activities": npy(np.array([{"a": 1}], dtype=object))},
        {"activities": npy(rows()[["begin", "end"]])},
        {"steps": b"\x93NUMPY"},
        {"steps": npy(rows())},
        {"header": declared((1 << 46,), "|u1")},
        {"activities": declared((1 << 47,), "|u1")},
        {"steps": declared((1 << 46,), "<i8")},
        {"further": npy(np.zeros(1))},
    ],
)
def test_a_foreign_member_is_one_line(path: Path, members: dict[str, bytes]) -> None:
    repacked(path, **members)
    with pytest.raises(AnalysisError) as caught:
        analyze(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_unpacks_without_end_is_refused(path: Path) -> None:
    draft = io.BytesIO()
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("header.npy", "steps.npy"):
            archive.writestr(name, b"")
        with archive.open("activities.npy", "w", force_zip64=True) as member:
            for _ in range(1100):
                member.write(bytes(1 << 20))
    path.write_bytes(draft.getvalue())
    with pytest.raises(AnalysisError, match="holds more than"):
        analyze(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 3000), st.integers(0, 255), st.booleans())
def test_no_damage_is_a_stack_trace(path: Path, at: int, byte: int, cut: bool) -> None:
    content = bytearray(path.read_bytes())
    content[min(at, len(content) - 1)] = byte
    damaged = path.with_name("damaged.npz")
    damaged.write_bytes(content[:at] if cut else content)
    try:
        analyze(damaged)
    except AnalysisError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_members_packed_in_another_way_are_refused(path: Path, method: int) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(AnalysisError, match="packed in another way"):
        analyze(path)


def test_an_encrypted_member_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match="encrypted"):
        analyze(path)


def test_texts_of_the_head_are_short_and_printable(path: Path) -> None:
    shown = {"0": "\ud800\x1b[2J" + "x" * 5_000_000}
    write_kernels(path, header(devices=shown, version="\x1b]0;x\x07", names=["\ud800", "b"]), rows(), steps())
    report = analyze(path)
    text = report.to_text()
    text.encode("utf-8")
    assert "\x1b" not in text
    assert len(text) < 10_000
    assert "\x1b" not in report.source.version


def test_what_a_kernels_capture_cannot_tell_is_not_asked_of_it(path: Path) -> None:
    apart = rows()
    apart["begin"] = np.arange(len(apart)) * 10_000_000
    apart["end"] = apart["begin"] + 1_000_000
    write_kernels(path, header(), apart, steps()[:0])
    report = analyze(path)
    (finding,) = [one for one in report.findings if one.name == "idle"]
    assert "CUDA API calls" not in finding.next_step
    assert "`torch` or nsys capture" in finding.next_step
    assert "NVTX" not in report.to_text()
    assert "no phases marked (no step ended" in report.to_text()
