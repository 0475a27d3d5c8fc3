"""nsys exports: old and new schemas, what is read from them, and nsys's own sums on the same files."""

from __future__ import annotations

import contextlib
import csv
import lzma
import re
import sqlite3
from pathlib import Path

import pytest

from llmprobe.analysis import AnalysisError, analyze, read_trace

from .nsys_file import PROCESS, THREAD, NsysFile, serving
from .oracle import find_nsys, nsys_report

DATA = Path(__file__).parents[2] / "data" / "nsys"


def test_a_server_that_decodes_is_told_by_phase(tmp_path: Path) -> None:
    report = analyze(serving(tmp_path / "a.sqlite", steps=60, step_ns=1_000_000, gap_ns=100_000))
    assert report.trust.verdict == "trusted"
    (gpu,) = report.gpus
    assert gpu.name == "GPU 0 (NVIDIA H100 80GB HBM3)"
    assert gpu.kernels == 600
    assert gpu.seconds == pytest.approx(0.0659)
    assert gpu.busy_seconds == pytest.approx(0.06)
    assert gpu.busy_ratio + gpu.idle_ratio == 1
    phases = {(row.name, row.part): row for row in report.phases}
    decode, prefill = phases["decode", None], phases["prefill", None]
    assert (decode.steps, prefill.steps) == (57, 3)
    assert (decode.tokens, prefill.tokens) == (57 * 4, 3 * 512)
    assert decode.seconds == pytest.approx(0.057)
    assert decode.gap_seconds == pytest.approx(0.0057)
    assert decode.sync_gap_ratio == pytest.approx(0.0057 / 0.0627)
    assert prefill.gap_seconds == pytest.approx(0.0002)  # the first has no step before it
    assert phases["decode", "sample"].seconds == pytest.approx(0.0057)
    assert phases["decode", "forward"].seconds == pytest.approx(0.0513)
    assert {row.name: row.count for row in report.operators} == {
        "gemm": 180,
        "attention": 180,
        "norm and elementwise": 180,
        "sampling": 60,
    }
    assert sum(row.share for row in report.kernels) == pytest.approx(1)


@pytest.mark.parametrize("recording", ["decode", "eager", "prefill"])
def test_parts_that_tell_no_tokens_have_none_not_zero(tmp_path: Path, recording: str) -> None:
    """A range of NVTX has a payload always: ours say 0 for the parts of a step."""
    path = tmp_path / "a.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"vllm_h100_{recording}.sqlite.xz").read_bytes()))
    phases = analyze(path).phases
    assert {row.tokens for row in phases if row.part} == {None}
    assert all(row.tokens for row in phases if not row.part)


def test_kernels_under_a_graph_share_its_launch(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    file.range("decode", 900, 2000)
    launch = file.call("cudaGraphLaunch_v10000", 1000)
    for begin in range(5000, 65_000, 1000):
        file.kernel("nvjet", begin, begin + 900, correlation=launch)
    report = analyze(file.close())
    (decode,) = report.phases
    assert decode.seconds == pytest.approx(59_900e-9)
    assert decode.busy_ratio == pytest.approx(54_000 / 59_900)
    assert report.gpus[0].unlaunched_idle_seconds == 0


def test_a_runtime_call_and_the_driver_call_below_it_are_one_launch(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    file.range("prefill", 900, 1100)  # ends before the driver call begins
    correlation = file.call("cudaLaunchKernel_v7000", 1000, 1500)
    file.row(
        "CUPTI_ACTIVITY_KIND_RUNTIME",
        start=1200,
        end=1300,
        globalTid=THREAD,
        correlationId=correlation,
        nameId=file.string("cuLaunchKernel"),
    )
    file.kernel("k", 5000, 6000, correlation=correlation)
    trace = read_trace(file.close())
    assert trace.activities.launched_ns.tolist() == [1000]


def test_correlation_ids_are_those_of_their_process(tmp_path: Path) -> None:
    other = (2 << 56) | (77 << 24)
    file = NsysFile(tmp_path / "a.sqlite")
    for process, begin in ((PROCESS, 100), (other, 200)):
        file.row(
            "CUPTI_ACTIVITY_KIND_RUNTIME", start=begin, end=begin + 10, globalTid=process | 1, correlationId=5
        )
    file.kernel("a", 1000, 1100, correlation=5, thread=PROCESS | 1)
    file.kernel("b", 2000, 2100, correlation=5, thread=other | 1)
    file.kernel("c", 3000, 3100, correlation=6, thread=other | 1)
    trace = read_trace(file.close())
    assert trace.activities.launched_ns.tolist() == [100, 200, -1]
    assert trace.activities.thread.tolist() == [PROCESS | 1, other | 1, -1]


def test_two_processes_that_each_see_one_gpu_are_two_gpus(tmp_path: Path) -> None:
    other = (1 << 56) | (5000 << 24)
    file = NsysFile(tmp_path / "a.sqlite")
    file.gpu(0, "NVIDIA L4")
    file.gpu(3, "NVIDIA L40S")
    file.row("TARGET_INFO_CUDA_DEVICE", gpuId=0, cudaId=0, pid=4321)
    file.row("TARGET_INFO_CUDA_DEVICE", gpuId=3, cudaId=0, pid=5000)
    file.kernel("a", 0, 600, launched=0)
    file.kernel("b", 500, 1000, launched=0, thread=other | 1)
    report = analyze(file.close())
    assert [gpu.name for gpu in report.gpus] == ["GPU 0 (NVIDIA L4)", "GPU 3 (NVIDIA L40S)"]
    assert [gpu.busy_ratio for gpu in report.gpus] == pytest.approx([0.6, 0.5])


def test_gpus_are_numbered_as_their_process_numbers_them(tmp_path: Path) -> None:
    """As in captures by other tools of the same server; nsys numbers the GPUs of a machine in another way."""
    file = NsysFile(tmp_path / "a.sqlite")
    for number, name in ((0, "NVIDIA L4"), (2, "NVIDIA L40S"), (3, "NVIDIA T4")):
        file.gpu(number, name)
    for gpu, mine in ((2, 0), (0, 1), (3, 3)):
        file.row("TARGET_INFO_CUDA_DEVICE", gpuId=gpu, cudaId=mine, pid=4321)
    file.kernel("a", 0, 600, launched=0)
    file.kernel("b", 500, 1000, launched=0, device=1)
    assert [gpu.name for gpu in analyze(file.close()).gpus] == ["GPU 0 (NVIDIA L40S)", "GPU 1 (NVIDIA L4)"]


def test_a_gpu_that_two_processes_number_differently_is_one(tmp_path: Path) -> None:
    other = (1 << 56) | (5000 << 24)
    file = NsysFile(tmp_path / "a.sqlite")
    file.gpu(3, "NVIDIA L4")
    file.row("TARGET_INFO_CUDA_DEVICE", gpuId=3, cudaId=1, pid=4321)
    file.row("TARGET_INFO_CUDA_DEVICE", gpuId=3, cudaId=0, pid=5000)
    file.kernel("a", 0, 600, launched=0, device=1)
    file.kernel("b", 500, 1000, launched=0, thread=other | 1)
    (gpu,) = analyze(file.close()).gpus
    assert (gpu.name, gpu.busy_ratio) == ("GPU 3 (NVIDIA L4)", 1.0)


@pytest.mark.parametrize(
    "missing",
    [
        "CUPTI_ACTIVITY_KIND_KERNEL.globalPid",
        "CUPTI_ACTIVITY_KIND_KERNEL.greenContextId",
        "CUPTI_ACTIVITY_KIND_KERNEL.graphNodeId",
        "CUPTI_ACTIVITY_KIND_KERNEL.demangledName",
        "NVTX_EVENTS.int64Value",
    ],
)
def test_columns_that_a_version_lacks_are_done_without(tmp_path: Path, missing: str) -> None:
    file = NsysFile(tmp_path / "a.sqlite", without=(missing,))
    file.domain()
    file.range("decode", 0, 100, tokens=3)
    file.kernel("nvjet<1>", 1000, 2000, launched=50)
    report = analyze(file.close())
    assert report.gpus[0].busy_seconds == pytest.approx(1e-6)
    assert report.kernels[0].operator == "gemm"
    assert [row.name for row in report.phases] == ["decode"]


def test_a_missing_column_that_matters_is_said(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite", without=("CUPTI_ACTIVITY_KIND_KERNEL.end",))
    file.kernel("k", 0, 1)
    with pytest.raises(AnalysisError, match="no column end"):
        analyze(file.close())


def test_ranges_of_other_domains_are_no_phases(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain("somebody", number=2)
    file.range("decode", 0, 100, domain=2)
    file.range("decode", 0, 100, domain=0)
    file.kernel("k", 1000, 2000, launched=50)
    report = analyze(file.close())
    assert report.phases == []
    assert "no phases marked" in report.to_text()


def test_names_in_the_row_and_registered_ones_are_the_same(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    file.range("decode", 0, 100, registered=True)
    file.range("decode", 100, 200, registered=False)
    file.kernel("k", 1000, 2000, launched=50)
    file.kernel("k", 3000, 4000, launched=150)
    (row,) = analyze(file.close()).phases
    assert (row.name, row.steps) == ("decode", 2)


def test_copies_and_sets_are_seen_by_kind(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.kernel("k", 0, 100)
    file.copy(1, 200, 300, 4096)
    file.copy(10, 50, 120, 4096)
    file.copy(99, 400, 401, 1)
    file.set(600, 700)
    report = analyze(file.close())
    (gpu,) = report.gpus
    assert (gpu.kernels, gpu.copies, gpu.sets) == (1, 3, 1)
    assert {row.name for row in report.kernels} == {"k", "memcpy HtoD", "memcpy PtoP", "memcpy", "memset"}
    # 200..300, 400..401, 600..700 and what of 50..120 lies behind the kernel
    assert gpu.exposed_transfer_seconds == pytest.approx(221e-9)


def test_control_characters_in_names_do_not_reach_a_terminal(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.kernel("evil\x1b[2Jname\nx", 0, 100)
    text = analyze(file.close()).to_text()
    assert "\x1b" not in text
    assert "evil" in text


def test_a_view_that_pretends_to_be_a_table_is_not_read(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "a.sqlite"
    data = sqlite3.connect(path)
    data.execute("CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT)")
    data.execute(
        "CREATE VIEW CUPTI_ACTIVITY_KIND_KERNEL AS WITH RECURSIVE n(start) AS "
        "(SELECT 1 UNION ALL SELECT start + 1 FROM n) SELECT start, start AS end, 0 AS deviceId FROM n"
    )
    data.commit()
    data.close()
    assert analyze(path).gpus == []


def test_the_file_is_not_written_to_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = serving(tmp_path / "a.sqlite", steps=2)
    before = path.read_bytes()
    path.chmod(0o400)
    analyze(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_nsys_rep_without_nsys_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "a.nsys-rep"
    path.write_bytes(b"NVIDIA Tegra Profiler Report 2023@4")
    with pytest.raises(AnalysisError, match="nsys export --type sqlite"):
        analyze(path)
    with pytest.raises(AnalysisError, match="cannot run"):
        analyze(path, nsys=tmp_path / "absent")


@pytest.mark.integration
def test_a_damaged_nsys_rep_ends_with_nsys_own_words(tmp_path: Path) -> None:
    path = tmp_path / "a.nsys-rep"
    path.write_bytes(b"NVIDIA Tegra Profiler Report 2023@4@4@54-234433681190v0.\n" + b"\0" * 1000)
    with pytest.raises(AnalysisError, match="nsys export failed") as raised:
        analyze(path, nsys=find_nsys())
    assert "\n" not in str(raised.value)


def test_a_real_capture_holds_the_phases_that_llmprobe_marked() -> None:
    report = analyze(DATA / "transformers_cpu.sqlite")
    with (DATA / "transformers_cpu.nvtx_sum.csv").open() as stream:
        truth = {row["Range"]: row for row in csv.DictReader(stream)}
    assert len(report.phases) == len(truth) == 2
    for row in report.phases:
        same = truth[f"llmprobe:{row.name}"]
        assert row.steps == int(same["Instances"])
        assert row.host_seconds == pytest.approx(int(same["Total Time:dur_ns"]) / 1e9, rel=1e-3)
        assert row.seconds is None
    assert {row.name: row.tokens for row in report.phases} == {"prefill": 2 * 7 + 2 * 23, "decode": 46 * 2}
    assert report.source.version == "2023.4.4.54"
    assert [reason.check for reason in report.trust.reasons] == ["cuda_not_traced"]


@pytest.mark.integration
def test_kernel_sums_are_those_of_nsys(tmp_path: Path) -> None:
    path = serving(tmp_path / "a.sqlite", steps=40, step_ns=1_234_560, gap_ns=77_777)
    report = analyze(path)
    truth = {row["Name"]: row for row in nsys_report(path, "cuda_gpu_kern_sum", tmp_path)}
    assert len(truth) == len(report.kernels) == 4
    for row in report.kernels:
        assert row.count == int(truth[row.name]["Instances"])
        assert row.seconds == pytest.approx(int(truth[row.name]["Total Time"]) / 1e9, rel=1e-3)


@pytest.mark.integration
def test_phases_on_the_device_are_nsys_own_projection(tmp_path: Path) -> None:
    path = serving(tmp_path / "a.sqlite", steps=40, step_ns=1_234_560, gap_ns=77_777)
    phases = {row.name: row for row in analyze(path).phases if row.part is None}
    truth = {row["Range"]: row for row in nsys_report(path, "nvtx_gpu_proj_sum", tmp_path)}
    for name, row in phases.items():
        same = truth[f"llmprobe:{name}"]
        assert row.seconds == pytest.approx(int(same["Total Proj Time"]) / 1e9, rel=1e-3)
        assert row.host_seconds == pytest.approx(int(same["Total Range Time"]) / 1e9, rel=1e-3)
        assert row.steps == int(same["Range Instances"])


@pytest.fixture(params=["decode", "prefill", "eager"])
def h100(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Some steps of vLLM on an H100; see tests/data/PROVENANCE.md."""
    path = tmp_path / f"{request.param}.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"vllm_h100_{request.param}.sqlite.xz").read_bytes()))
    return path


@pytest.mark.integration
def test_sums_of_a_gpus_recording_are_those_of_nsys(h100: Path, tmp_path: Path) -> None:
    report = analyze(h100)
    truth = nsys_report(h100, "cuda_gpu_sum", tmp_path)
    assert sum(row.count for row in report.operators) == sum(int(row["Instances"]) for row in truth)
    seconds = [int(row["Total Time"]) / 1e9 for row in truth]
    assert sum(row.seconds for row in report.operators) == pytest.approx(sum(seconds), rel=1e-3)
    largest = sorted(seconds, reverse=True)[:5]
    assert [row.seconds for row in report.kernels[:5]] == pytest.approx(largest, rel=1e-3)


@pytest.mark.integration
def test_phases_of_a_gpus_recording_are_nsys_own_projection(h100: Path, tmp_path: Path) -> None:
    phases = {row.name: row for row in analyze(h100).phases if row.part is None}
    truth = {row["Range"]: row for row in nsys_report(h100, "nvtx_gpu_proj_sum", tmp_path)}
    assert phases
    for name, row in phases.items():
        same = truth[f"llmprobe:{name}"]
        assert row.steps == int(same["Range Instances"])
        assert row.seconds == pytest.approx(int(same["Total Proj Time"]) / 1e9, rel=1e-3)


@pytest.fixture(params=["graphs_decode", "graphs_prefill", "eager_prefill"])
def h200(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A capture of llmprobe's of vLLM on an H200, as it was made; see tests/data/PROVENANCE.md."""
    path = tmp_path / f"{request.param}.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"vllm_h200_{request.param}.sqlite.xz").read_bytes()))
    return path


def graphs_as_kernels(path: Path, folder: Path) -> Path:
    """A copy in which whole graphs are kernels: the reports of nsys 2023.4 leave graphs out."""
    copy = folder / "graphs-as-kernels.sqlite"
    copy.write_bytes(path.read_bytes())
    columns = "start, end, deviceId, contextId, streamId, correlationId, globalPid"
    with contextlib.closing(sqlite3.connect(copy)) as data:
        if data.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'CUPTI_ACTIVITY_KIND_GRAPH_TRACE'"
        ).fetchone():
            data.execute(
                "INSERT INTO StringIds SELECT DISTINCT 1000000 + graphId, 'CUDA graph ' || graphId "
                "FROM CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
            )
            data.execute(
                f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL ({columns}, demangledName, shortName) "
                f"SELECT {columns}, 1000000 + graphId, 1000000 + graphId FROM CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
            )
            data.commit()
    return copy


def ours(name: str) -> str:
    """What `analyze` calls a row of nsys's reports, such as ``[CUDA memcpy Host-to-Device]``."""
    found = re.fullmatch(r"\[CUDA (memcpy|memset)(?: (\w)\w+-to-(\w)\w+)?\]", name)
    if not found:
        return name
    return found[1] + (f" {found[2]}to{found[3]}" if found[2] else "")


@pytest.mark.integration
def test_sums_of_a_capture_are_those_of_nsys_by_name(h200: Path, tmp_path: Path) -> None:
    report = analyze(h200)
    rows = nsys_report(graphs_as_kernels(h200, tmp_path), "cuda_gpu_sum", tmp_path)
    truth = {ours(row["Operation"]): (int(row["Instances"]), int(row["Total Time"]) / 1e9) for row in rows}
    assert {row.name: row.count for row in report.kernels} == {name: row[0] for name, row in truth.items()}
    assert len(rows) == len(truth) > 30
    for row in report.kernels:
        assert row.seconds == pytest.approx(truth[row.name][1], rel=1e-3), row.name
    counted = {
        kind: sum(count for name, (count, _) in truth.items() if name.startswith(kind))
        for kind in ("memcpy", "memset", "CUDA graph", "")
    }
    (gpu,) = report.gpus
    assert (gpu.copies, gpu.sets, gpu.graphs) == tuple(counted.values())[:3]
    assert gpu.kernels + gpu.copies + gpu.sets + gpu.graphs == counted[""]
    assert (gpu.graphs > 0) == ("graphs" in h200.stem)
    whole = sum(seconds for _, seconds in truth.values())
    assert sum(row.seconds for row in report.operators) == pytest.approx(whole, rel=1e-3)


def test_graphs_from_before_the_recording_count_and_the_time_between_them_does_not(h200: Path) -> None:
    """nsys gives 8 of one capture, the first from before its session, and nothing that ran between them."""
    report = analyze(h200)
    assert "implausible_times" not in [reason.check for reason in report.trust.reasons]
    (gpu,) = report.gpus
    assert gpu.name == "GPU 0 (NVIDIA H200)"
    assert gpu.graphs == {"graphs_decode": 70, "graphs_prefill": 6, "eager_prefill": 0}[h200.stem]
    assert [
        gap for gap in report.gaps if gap.before.startswith("CUDA graph") and gap.before == gap.after
    ] == []
    if h200.stem == "graphs_decode":
        assert gpu.seconds == pytest.approx(0.411, abs=0.001)


@pytest.mark.integration
def test_phases_of_a_capture_are_nsys_own_projection(h200: Path, tmp_path: Path) -> None:
    rows = nsys_report(graphs_as_kernels(h200, tmp_path), "nvtx_gpu_proj_sum", tmp_path)
    sums: dict[str, list[float]] = {}
    for row in analyze(h200).phases:
        found = sums.setdefault(row.part or row.name, [0, 0.0, 0.0])
        for index, value in enumerate((row.steps, row.seconds or 0.0, row.host_seconds)):
            found[index] += value
    assert {f"llmprobe:{name}" for name in sums} == {row["Range"] for row in rows}
    for same in rows:
        steps, seconds, host = sums[same["Range"].removeprefix("llmprobe:")]
        assert steps == int(same["Range Instances"])
        assert seconds == pytest.approx(int(same["Total Proj Time"]) / 1e9, rel=1e-3)
        assert host == pytest.approx(int(same["Total Range Time"]) / 1e9, rel=1e-3)


def whole_graphs(path: Path) -> Path:
    """The same recording as of ``--cuda-graph-trace=graph``: one row for each launch of a graph."""
    columns = "start, end, deviceId, contextId, streamId, correlationId, globalPid"
    tables = [f"CUPTI_ACTIVITY_KIND_{name}" for name in ("KERNEL", "MEMCPY", "MEMSET")]
    inside = " UNION ALL ".join(f"SELECT {columns} FROM {t} WHERE graphNodeId IS NOT NULL" for t in tables)
    with contextlib.closing(sqlite3.connect(path)) as data:
        data.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE AS SELECT min(start) AS start, max(end) AS end, "
            "deviceId, contextId, streamId, correlationId, globalPid, 1 AS graphId, 1 AS graphExecId "
            f"FROM ({inside}) GROUP BY correlationId"
        )
        for table in tables:
            data.execute(f"DELETE FROM {table} WHERE graphNodeId IS NOT NULL")
        data.commit()
    return path


@pytest.mark.parametrize(("name", "graphs", "largest"), [("decode", 6, "graph"), ("prefill", 1, "gemm")])
def test_with_graphs_recorded_whole_phases_stay_and_what_is_unseen_is_said(
    tmp_path: Path, name: str, graphs: int, largest: str
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"vllm_h100_{name}.sqlite.xz").read_bytes()))
    seen, unseen = analyze(path), analyze(whole_graphs(path))
    assert unseen.trust.verdict == "limited"
    (reason,) = [reason for reason in unseen.trust.reasons if reason.level == "limited"]
    assert reason.check == "graphs_unseen"
    assert "`kernels` or `torch` capture" in reason.text
    assert unseen.gpus[0].graphs == graphs
    for before, after in zip(seen.phases, unseen.phases, strict=True):
        same = (before.name, before.part, before.steps, before.tokens, before.seconds, before.gap_seconds)
        assert (after.name, after.part, after.steps, after.tokens, after.seconds, after.gap_seconds) == same
        assert (after.sync_gap_ratio or 0) <= (before.sync_gap_ratio or 0)
    rows = {row.name: row for row in unseen.operators}
    assert rows["graph"].count == graphs
    assert unseen.operators[0].name == largest
    (finding,) = unseen.findings
    assert ("recorded whole" in finding.text) == (largest == "graph")
    assert "recorded whole" not in seen.findings[0].text


@pytest.mark.parametrize(("name", "least", "most"), [("decode", 0.01, 0.02), ("eager", 0.7, 0.8)])
def test_launch_bubbles_of_a_real_server_are_seen(
    tmp_path: Path, name: str, least: float, most: float
) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(lzma.decompress((DATA / f"vllm_h100_{name}.sqlite.xz").read_bytes()))
    report = analyze(path)
    assert report.trust.verdict == "trusted"
    (gpu,) = report.gpus
    assert least < gpu.idle_ratio < most
