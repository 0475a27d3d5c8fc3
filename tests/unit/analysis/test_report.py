"""What the report says: fixed keys for programs, the conclusion first for people."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from llmprobe.analysis import Report, analyze
from llmprobe.analysis.wording import duration, short, told_apart

from .kineto_file import decoding
from .nsys_file import NsysFile, serving

DATA = Path(__file__).parents[2] / "data"


def test_the_keys_of_the_json_are_those_that_were_promised(tmp_path: Path) -> None:
    document = json.loads(json.dumps(analyze(serving(tmp_path / "a.sqlite")).to_json()))
    assert list(document) == [
        "schema_version",
        "source",
        "trust",
        "gpus",
        "phases",
        "operators",
        "kernels",
        "gaps",
        "findings",
        "host_operators",
    ]
    assert document["schema_version"] == 1
    gpu, phase = document["gpus"][0], document["phases"][0]
    assert {"name", "seconds", "busy_ratio", "idle_ratio", "back_to_back_idle_seconds"} <= set(gpu)
    assert {"name", "share", "count", "seconds"} <= set(document["operators"][0])
    assert {"name", "share", "count", "seconds", "mean_seconds", "operator"} <= set(document["kernels"][0])
    assert {"name", "part", "steps", "seconds", "busy_ratio", "idle_ratio"} <= set(phase)
    assert {"sync_gap_ratio", "cut_steps", "comparable_sync_gap_ratio"} <= set(phase)
    assert document["source"] == {
        "path": str(tmp_path / "a.sqlite"),
        "tool": "nsys",
        "format": "nsys-sqlite",
        "version": "2025.3.1.90",
    }


def test_shares_add_up_and_classes_hold_their_kernels(tmp_path: Path) -> None:
    report = analyze(decoding().write(tmp_path / "a.json"))
    assert sum(row.share for row in report.operators) == pytest.approx(1)
    for row in report.operators:
        mine = [kernel for kernel in report.kernels if kernel.operator == row.name]
        assert row.seconds == pytest.approx(sum(kernel.seconds for kernel in mine))
        assert row.count == sum(kernel.count for kernel in mine)


def test_the_longest_gap_comes_first_with_what_ended_it(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    file.range("decode", 2_000, 900_000)
    file.kernel("first", 1_000, 2_000, launched=0)
    file.kernel("second", 5_000, 6_000, launched=3_000)
    file.kernel("third", 500_000, 501_000, launched=400_000)
    gap = analyze(file.close()).gaps[0]
    assert (gap.before, gap.after, gap.phase) == ("second", "third", "decode")
    assert gap.seconds == pytest.approx(494e-6)
    assert gap.begin_seconds == pytest.approx(5e-6)
    assert gap.unlaunched_seconds == pytest.approx(394e-6)
    assert gap.in_step is True


def test_a_gap_inside_a_step_is_not_said_to_lie_before_it(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    for step in range(2):
        file.range("decode", step * 100_000, step * 100_000 + 50_000)
        for kernel in range(2):
            begin = step * 100_000 + 10_000 + kernel * (30_000 + step * 2_000)
            file.kernel(f"k{step}{kernel}", begin, begin + 1_000, launched=begin - 1_000)
    file.kernel("alone", 190_000, 191_000, launched=189_000)
    report = analyze(file.close())
    assert [(gap.before, gap.after, gap.phase, gap.in_step) for gap in report.gaps] == [
        ("k01", "k10", "decode", False),
        ("k11", "alone", None, None),
        ("k10", "k11", "decode", True),
        ("k00", "k01", "decode", True),
    ]
    said = [line for line in report.to_text().splitlines() if " on GPU 0" in line]
    assert ["in decode" in line for line in said] == [False, False, True, True]
    assert ["before decode" in line for line in said] == [True, False, False, False]


def build(path: Path, kernel_ns: int, gap_ns: int, lead_ns: int, count: int = 2000) -> Report:
    """Kernels with idle time between, each launched ``lead_ns`` before it runs."""
    file = NsysFile(path)
    for number in range(count):
        begin = 10_000_000 + number * (kernel_ns + gap_ns)
        file.kernel("nvjet", begin, begin + kernel_ns, launched=begin - lead_ns)
    return analyze(file.close())


@pytest.mark.parametrize(
    ("kernel_ns", "gap_ns", "lead_ns", "finding"),
    [
        (5_000, 15_000, 4_000, "launch_bubbles"),
        (5_000, 80_000, 4_000, "launch_bubbles"),
        (200_000, 400_000, 4_000, "host_bound"),
        (200_000, 400_000, 9_000_000, "idle_launched"),
        (200_000, 2_000, 4_000, "busy"),
        (200_000, 30_000, 4_000, None),
    ],
)
def test_the_finding_follows_from_the_gaps(
    tmp_path: Path, kernel_ns: int, gap_ns: int, lead_ns: int, finding: str | None
) -> None:
    report = build(tmp_path / "a.sqlite", kernel_ns, gap_ns, lead_ns, count=400)
    assert [one.name for one in report.findings] == ([finding] if finding else [])


def test_a_real_server_without_cuda_graphs_is_told_to_use_them(tmp_path: Path) -> None:
    """The host launches its kernels so slowly that many gaps are long; six of seven lie in the forward."""
    path = tmp_path / "a.sqlite"
    path.write_bytes(lzma.decompress((DATA / "nsys" / "vllm_h100_eager.sqlite.xz").read_bytes()))
    (finding,) = analyze(path).findings
    assert finding.name == "launch_bubbles"
    assert "inside a forward pass" in finding.text
    assert "CUDA graphs" in finding.next_step


@pytest.mark.parametrize("activities", ["cuda", "cpu_cuda"])
def test_a_program_without_marks_is_told_the_same_however_slow_its_profiler_makes_it(activities: str) -> None:
    """With operators recorded too, most gaps of the same program are longer than 50 µs."""
    (finding,) = analyze(DATA / "kineto" / f"transformers_h200_{activities}.json.gz").findings
    assert finding.name == "launch_bubbles"
    assert ("gaps below 50 µs" in finding.text) == (activities == "cuda")


def test_few_long_gaps_of_a_program_without_marks_are_the_hosts(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(400):
        begin = number * 10_000 + number // 10 * 90_000
        file.kernel("nvjet", begin, begin + 9_000, launched=begin - 4_000)
    assert [one.name for one in analyze(file.close()).findings] == ["host_bound"]


@pytest.mark.parametrize(("inside", "finding"), [(True, "launch_bubbles"), (False, "host_bound")])
@pytest.mark.parametrize("marked", ["forward", "decode"])
def test_long_gaps_inside_a_forward_pass_are_those_that_graphs_close(
    tmp_path: Path, inside: bool, finding: str, marked: str
) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    file.domain()
    for number in range(60):
        host = number * 1_000_000
        file.range("decode", host, host + 800_000)
        if marked == "forward":
            file.range("forward", host + 1_000, host + 799_000)
        for kernel in range(4):
            begin = host + 20_000 + kernel * (200_000 if inside else 3_000)
            file.kernel("nvjet", begin, begin + 3_000, launched=begin - 4_000)
    assert [one.name for one in analyze(file.close()).findings] == [finding]


def test_exposed_communication_is_found(tmp_path: Path) -> None:
    report = analyze(decoding().write(tmp_path / "a.json"))
    assert [one.name for one in report.findings] == ["exposed_communication"]
    assert report.findings[0].gain_ratio == pytest.approx(100 / 350, rel=0.01)


def test_exposed_transfers_are_found(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(100):
        begin = number * 1_000_000
        file.kernel("nvjet", begin, begin + 850_000, launched=begin)
        file.copy(1, begin + 850_000, begin + 950_000, 1 << 20)
    assert "exposed_transfer" in [one.name for one in analyze(file.close()).findings]


def test_gpus_that_are_busy_unevenly_are_told(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(100):
        begin = number * 1_000_000
        file.kernel("nvjet", begin, begin + 900_000, launched=begin)
        file.kernel("nvjet", begin, begin + 600_000, launched=begin, device=1)
    report = analyze(file.close())
    assert "uneven_gpus" in [one.name for one in report.findings]
    assert len(report.gpus) == 2
    assert "GPU 1" in report.to_text()


@pytest.mark.parametrize(("slower_ns", "found"), [(0, False), (150_000, True)])
def test_a_gpu_that_waits_for_another_in_collectives_is_told(
    tmp_path: Path, slower_ns: int, found: bool
) -> None:
    """Both are as busy: what the one computes, the other waits for in its all-reduce."""
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(100):
        begin = number * 1_000_000
        for device, computes in ((0, 600_000 + slower_ns), (1, 600_000)):
            file.kernel("nvjet", begin, begin + computes, launched=begin, device=device)
            reduced = begin + 900_000
            file.kernel("ncclDevKernel_AllReduce", begin + computes, reduced, launched=begin, device=device)
    findings = analyze(file.close()).findings
    uneven = [one for one in findings if one.name == "uneven_gpus"]
    links = ["faster link" in one.next_step for one in findings if one.name == "exposed_communication"]
    assert links == ([False, True] if found else [True])  # the largest first: it waits
    assert bool(uneven) is found
    if uneven:
        assert "compute unevenly, 60% to 75%" in uneven[0].text


@pytest.mark.parametrize(("count", "others"), [(2, "likewise GPU 1"), (8, "likewise 7 other GPUs")])
def test_what_is_so_on_several_gpus_is_told_once(tmp_path: Path, count: int, others: str) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(100):
        begin = number * 1_000_000
        for device in range(count):  # the first is idle a little longer
            ended = begin + 500_000 + (device > 0) * 1000
            file.kernel("nvjet", begin, ended, launched=begin - 5_000, device=device)
    (finding,) = analyze(file.close()).findings
    assert finding.name == "host_bound"
    assert finding.text.startswith("GPU 0 ")
    assert finding.text.endswith(others)


def test_a_gpu_that_never_communicates_is_not_waited_for_in_collectives(tmp_path: Path) -> None:
    file = NsysFile(tmp_path / "a.sqlite")
    for number in range(100):
        begin = number * 1_000_000
        file.kernel("nvjet", begin, begin + 900_000, launched=begin, device=0)
        file.kernel("nvjet", begin, begin + 600_000, launched=begin, device=1)
        file.kernel("ncclDevKernel_AllReduce", begin + 600_000, begin + 900_000, launched=begin, device=1)
    findings = analyze(file.close()).findings
    assert "uneven_gpus" not in [one.name for one in findings]
    (exposed,) = [one for one in findings if one.name == "exposed_communication"]
    assert "faster link" in exposed.next_step


def test_the_text_fits_a_terminal(tmp_path: Path) -> None:
    whole = NsysFile(tmp_path / "b.sqlite")
    whole.graph(5_000, 500_000, 1_000)
    whole.kernel("k" * 300, 900_000, 950_000, launched=880_000)
    for path in (serving(tmp_path / "a.sqlite"), decoding().write(tmp_path / "a.json"), whole.close()):
        text = analyze(path).to_text()
        lines = text.split("\n")[1:]  # the first holds the path, however long
        assert max(len(line) for line in lines) <= 110
        assert text == text.rstrip()


def test_lengths_are_shown_in_their_unit() -> None:
    assert [duration(seconds) for seconds in (2.5, 0.0123, 4.56e-6, 7e-9, 0.0)] == [
        "2.5 s",
        "12.3 ms",
        "4.56 µs",
        "7 ns",
        "0 ns",
    ]


def test_lengths_that_round_to_the_next_unit_are_shown_in_it() -> None:
    assert [duration(seconds) for seconds in (0.99951, 0.99949, 0.0009996, 999.7e-9, 999.7, 1234.5)] == [
        "1 s",
        "999 ms",
        "1 ms",
        "1 µs",
        "1000 s",
        "1234 s",
    ]


def test_long_names_lose_their_middle_not_their_ends() -> None:
    name = "void flash::kernel_" + "x" * 200 + "_end"
    assert short(name, 40).startswith("flash::kernel_")
    assert short(name, 40).endswith("_end")
    assert len(short(name, 40)) <= 40
    assert short(f"void k(int, float, {'y' * 99})", 40) == "k"
    assert short("memcpy (from a place to another place, and back)", 40).startswith("memcpy (from")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (
            "std::enable_if<T2>(int)0&&vllm::_typeConvert<T1>::exists, void>::type "
            "vllm::fused_add_rms_norm_kernel<c10::BFloat16, (int)8, (bool)1>(T1 *, long, T1 *, float)",
            "vllm::fused_add_rms_norm_kernel<c10::BFloat16, (int)8, (bool)1>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<(int)4, at::native::CUDAFunctor_add<int>, "
            "std::array<char *, (unsigned long)3>>(int, T2, T3)",
            "vectorized_elementwise_kernel<4, CUDAFunctor_add, array>",
        ),
        (
            "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, float, float, 7, false, false>"
            "(float*, c10::BFloat16 const*, int, int, int)",
            "softmax_warp_forward<c10::BFloat16, float, float, 7, false, false>",
        ),
    ],
)
def test_a_long_kernel_name_is_the_functions_with_its_arguments(name: str, shown: str) -> None:
    assert short(name) == shown


@pytest.mark.parametrize("recording", ["eager", "decode", "prefill"])
def test_different_kernels_of_a_real_server_are_shown_apart(tmp_path: Path, recording: str) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(lzma.decompress((DATA / "nsys" / f"vllm_h100_{recording}.sqlite.xz").read_bytes()))
    names = [row.name for row in analyze(path).kernels]
    for limit in (68, 42):
        shown = told_apart(names, limit)
        assert len(set(shown.values())) == len(set(names))
        assert max(len(text) for text in shown.values()) <= limit
        assert told_apart(reversed(names), limit) == shown
