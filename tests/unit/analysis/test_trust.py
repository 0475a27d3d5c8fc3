"""Recordings that mislead are told as such, with the reason."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from llmprobe.analysis import Report, analyze

from .kineto_file import KinetoFile
from .nsys_file import THREAD, NsysFile, serving

DATA = Path(__file__).parents[2] / "data"
Build = Callable[[NsysFile], None]


def decode(file: NsysFile, steps: int = 100, begin: int = 1_000_000_000) -> None:
    """Steps of one millisecond, each one kernel."""
    for number in range(steps):
        at = begin + number * 1_000_000
        file.kernel("nvjet", at, at + 900_000, launched=at - 10_000)


def nothing(file: NsysFile) -> None:
    file.domain()


def launches_only(file: NsysFile) -> None:
    for number in range(20):
        file.call("cudaLaunchKernel_v7000", number * 1000)


def copies_only(file: NsysFile) -> None:
    file.copy(1, 0, 100, 10)


def lost(file: NsysFile) -> None:
    decode(file)
    file.row("DIAGNOSTIC_EVENT", text="CUPTI: 1234 events were dropped because of insufficient buffer space.")


def starting(file: NsysFile) -> None:
    decode(file)
    for number in range(5):
        file.call("cudaGraphInstantiateWithFlags_v11040", number)


def loading(file: NsysFile) -> None:
    decode(file)
    file.copy(1, 1_000_000_000, 1_080_000_000, 16 << 30)


def graphs_without_kernels(file: NsysFile) -> None:
    decode(file)
    for number in range(100):
        file.call("cudaGraphLaunch_v10000", 1_000_000_000 + number * 1_000_000)


def kernels_without_trace(file: NsysFile) -> None:
    decode(file)
    for number in range(30):
        file.call("cuLaunchKernelEx", 1_000_000_000 + number * 1_000_000)


def whole_graphs(file: NsysFile) -> None:
    for number in range(100):
        file.graph(1_000_000 + number * 1_000_000, 1_900_000 + number * 1_000_000, number * 1_000_000)


def impossible_times(file: NsysFile) -> None:
    decode(file)
    for number in range(20):
        file.kernel("nvjet", 1_000_000_000 + number, 0, launched=number)


def short(file: NsysFile) -> None:
    decode(file, steps=3)


def marked_late(file: NsysFile) -> None:
    decode(file)
    file.domain()
    file.range("decode", 1_080_000_000, 1_090_000_000)


def one_gpu_late(file: NsysFile) -> None:
    decode(file)
    file.kernel("nvjet", 1_090_000_000, 1_091_000_000, launched=1_089_000_000, device=1)


@pytest.mark.parametrize(
    ("build", "verdict", "check"),
    [
        (nothing, "untrusted", "no_kernels"),
        (launches_only, "untrusted", "no_kernels"),
        (copies_only, "untrusted", "no_kernels"),
        (lost, "untrusted", "lost_events"),
        (starting, "untrusted", "startup"),
        (loading, "untrusted", "model_loading"),
        (graphs_without_kernels, "untrusted", "missing_graphs"),
        (kernels_without_trace, "untrusted", "missing_kernels"),
        (impossible_times, "untrusted", "implausible_times"),
        (whole_graphs, "limited", "graphs_unseen"),
        (short, "limited", "short"),
        (marked_late, "limited", "unmarked_start"),
        (one_gpu_late, "limited", "gpu_partly_seen"),
    ],
)
def test_what_misleads_is_said(tmp_path: Path, build: Build, verdict: str, check: str) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    build(file)
    report = analyze(file.close())
    assert report.trust.verdict == verdict
    assert check in [reason.check for reason in report.trust.reasons if reason.level == verdict]
    text = report.to_text()
    assert ("DO NOT TRUST" in text) == (verdict == "untrusted")
    if verdict == "untrusted":
        assert report.findings == []  # nothing is concluded from it


def test_another_tool_that_held_cupti_is_named(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    launches_only(file)
    assert "another tool held CUPTI" in analyze(file.close()).to_text()


def test_a_sane_recording_is_trusted_without_a_word(tmp_path: Path) -> None:
    report = analyze(serving(tmp_path / "a.sqlite"))
    assert report.trust.verdict == "trusted"
    assert report.trust.reasons == []


def test_a_few_launches_whose_work_lies_behind_the_end_are_normal(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    decode(file, steps=200)
    for number in range(6):
        file.call("cudaLaunchKernel_v7000", 1_200_000_000 + number)
    assert analyze(file.close()).trust.verdict == "trusted"


@pytest.mark.parametrize("what", ["cudaLaunchKernel_v7000", "cudaGraphLaunch_v10000"])
def test_what_the_host_launched_ahead_of_the_device_is_not_lost(tmp_path: Path, what: str) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    decode(file)
    for number in range(300):
        file.call(what, 1_099_000_000 + number)
    report = analyze(file.close())
    assert report.trust.verdict == "trusted"
    (reason,) = report.trust.reasons
    assert (reason.check, reason.level) == ("queued_launches", "note")
    assert "300 launches had yet to run" in reason.text


def test_launches_before_something_that_ran_are_lost(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    decode(file)
    for number in range(300):
        file.call("cudaLaunchKernel_v7000", 1_099_000_000 + number)
    file.copy(1, 1_099_950_000, 1_099_960_000, 8, launched=1_099_100_000)
    (reason,) = analyze(file.close()).trust.reasons
    assert (reason.check, reason.level) == ("missing_kernels", "untrusted")


@pytest.mark.parametrize(("apart_ns", "lost"), [(1_000_000, True), (1_000, False)])
def test_a_process_that_goes_on_launching_and_is_not_seen_to_run_lost_it(
    tmp_path: Path, apart_ns: int, lost: bool
) -> None:
    """And one that launched ahead and was recorded for less long than another one did not."""
    other = (1 << 56) | (5000 << 24) | 1
    file = NsysFile(tmp_path / "a.sqlite")
    decode(file)
    for number in range(60):
        at = 1_000_000_000 + number * 1_000_000
        file.kernel("nvjet", at, at + 900_000, launched=at - 10_000, device=1, thread=other)
    for number in range(30):
        file.call("cudaLaunchKernel_v7000", 1_060_000_000 + number * apart_ns, thread=other)
    (reason,) = analyze(file.close()).trust.reasons
    expected = ("missing_kernels", "untrusted") if lost else ("queued_launches", "note")
    assert (reason.check, reason.level) == expected


@pytest.mark.parametrize(
    ("recording", "queued"),
    [
        ("nsys/vllm_h200_eager_prefill.sqlite.xz", 707),
        ("nsys/vllm_h200_graphs_prefill.sqlite.xz", 310),
        ("kineto/vllm_h200_decode.json.gz", 31),
        ("kineto/vllm_h200_prefill.json.gz", 323),
    ],
)
def test_a_real_server_runs_ahead_of_its_device_as_a_capture_ends(
    tmp_path: Path, recording: str, queued: int
) -> None:
    path, raw = tmp_path / "a", (DATA / recording).read_bytes()
    path.write_bytes(lzma.decompress(raw) if recording.endswith(".xz") else raw)
    report = analyze(path)
    assert report.trust.verdict == ("limited" if "graphs" in recording else "trusted")  # recorded whole
    (reason,) = [reason for reason in report.trust.reasons if reason.check == "queued_launches"]
    assert reason.text.startswith(f"{queued} launches had yet to run")


def test_what_ran_when_a_server_was_no_longer_recorded_is_no_loss(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    decode(file, steps=200)
    # In every recording of a program that goes on: nsys 2025.3 on an H100.
    file.row(
        "DIAGNOSTIC_EVENT",
        text="Number of incomplete CUPTI events dropped: 757. Incomplete events appear when GPU timestamp "
        "information have not been retrieved at the time the profiling session was stopped.",
    )
    assert analyze(file.close()).trust.verdict == "trusted"


def test_driver_calls_below_runtime_calls_are_not_missing(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(100):
        at = 1_000_000_000 + number * 1_000_000
        correlation = file.call("cudaLaunchKernel_v7000", at - 10_000)
        file.row(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=at - 9_000,
            end=at - 8_000,
            globalTid=THREAD,
            correlationId=correlation,
            nameId=file.string("cuLaunchKernel"),
        )
        file.kernel("nvjet", at, at + 900_000, correlation=correlation)
    assert analyze(file.close()).trust.verdict == "trusted"


def test_work_launched_before_the_recording_is_noted(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(20):
        file.kernel("nvjet", number * 1_000_000, number * 1_000_000 + 900_000, correlation=10_000 + number)
    decode(file)
    report = analyze(file.close())
    assert [reason.check for reason in report.trust.reasons] == ["unknown_launches"]
    assert report.trust.verdict == "trusted"


def of_torch(tmp_path: Path, calls: int, kernels: int) -> Report:
    file = KinetoFile()
    for number in range(calls):
        file.launch("cudaLaunchKernel", number * 100.0)
    for number in range(kernels):
        file.kernel("nvjet", 50_000.0 + number * 1000.0, 900.0, 49_000.0 + number * 1000.0)
    return analyze(file.write(tmp_path / "a.json"))


def test_a_torch_profile_under_nsys_without_kernels_is_told(tmp_path: Path) -> None:
    report = of_torch(tmp_path, calls=50, kernels=0)
    assert report.trust.reasons[0].check == "no_kernels"
    assert "50 launches and not one kernel" in report.trust.reasons[0].text


def test_a_torch_profile_with_copies_alone_says_what_may_have_kept_its_kernels(tmp_path: Path) -> None:
    file = KinetoFile()
    for number in range(50):
        file.launch("cudaLaunchKernel", number * 100.0)
        file.event("gpu_memcpy", "Memcpy HtoD", number * 100.0, 2.0, 7, device=0, stream=7, bytes=8)
    reason = analyze(file.write(tmp_path / "a.json")).trust.reasons[0]
    assert (reason.check, reason.level) == ("no_kernels", "untrusted")
    assert "take a kernels capture" in reason.text


def test_a_torch_profile_that_lost_kernels_is_told(tmp_path: Path) -> None:
    report = of_torch(tmp_path, calls=50, kernels=100)
    assert report.trust.reasons[0].check == "missing_kernels"
