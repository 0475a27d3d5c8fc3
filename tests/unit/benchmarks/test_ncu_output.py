"""What ncu prints is read as it means it, and what it refuses to say is never taken for a figure."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "benchmarks"))

from support.ncu_output import Kernel, NcuFailed, most_passes, read_kernels, steps_of  # noqa: E402

#: Printed by ncu itself; see tests/data/PROVENANCE.md.
PRINTED = (ROOT / "tests/data/ncu/raw_page.csv").read_text()
RANGE = "llmprobe:decode"
#: As ncu's own program names it.
PUSHED = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"


def with_ranges(*ranges: str) -> str:
    """The same lines with one cell more before the kernel's name, as with ``--nvtx``."""
    rows = list(csv.reader(PRINTED.splitlines()))
    written = io.StringIO()
    for row, cell in zip(rows, [PUSHED, "", *ranges], strict=True):
        csv.writer(written, quoting=csv.QUOTE_ALL).writerow([*row[:4], cell, *row[4:]])
    return written.getvalue()


def test_launches_with_their_bytes_in_order() -> None:
    assert read_kernels(PRINTED, RANGE) == [
        Kernel("void Sobel<float>(uchar4 *, uchar4 *, int, int)", 4195712, 69376, None),
        Kernel("addConstDouble3(int, double3 *, double, double3 *)", 25172480, 22920320, None),
        Kernel("transposeCoalesced(float *, float *, int, int)", 268457472, 265940992, None),
    ]


def test_messages_around_the_lines_and_commas_in_numbers_change_nothing() -> None:
    said = "==PROF== Connected to process 4711 (/usr/bin/python3.12)\n"
    said += '==PROF== Profiling "Sobel" - 0: 0%....50%....100% - 1 pass\n'
    text = said + PRINTED.replace("268457472", "268,457,472") + "==PROF== Disconnected from process 4711\n"
    assert read_kernels(text, RANGE) == read_kernels(PRINTED, RANGE)


def test_units_are_those_of_the_second_line() -> None:
    scaled = PRINTED.replace('"byte","byte"', '"Mbyte","Kbyte"').replace("4195712", "4.195712", 1)
    (first, *_) = read_kernels(scaled, RANGE)
    assert first.read_bytes == pytest.approx(4195712)
    assert first.written_bytes == 69376e3


def test_launches_inside_of_the_range_asked_for() -> None:
    text = with_ranges(
        '4711  "llmprobe:decode:uint64:32:none:none:REGISTERED:decode"  "llmprobe:forward:none:none:none" ',
        '4711  "<default domain>:decode:none:none:none:none:none:none" ',
        "",
    )
    assert [kernel.in_range for kernel in read_kernels(text, RANGE)] == [True, False, False]
    assert [kernel.name for kernel in read_kernels(text, RANGE)] == [
        kernel.name for kernel in read_kernels(PRINTED, RANGE)
    ]


@pytest.mark.parametrize("value", ["n/a", "", "(!) nan", "nan"])
def test_a_launch_without_a_figure_is_no_launch_of_no_bytes(value: str) -> None:
    text = PRINTED.replace("22920320", value) + "==WARNING== Could not be collected\n"
    with pytest.raises(
        NcuFailed, match=r"(?s)launch 0 \(addConst.*dram__bytes_write.*Could not be collected"
    ):
        read_kernels(text, RANGE)


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(NcuFailed, match="'sector'"):
        read_kernels(PRINTED.replace('"byte","byte"', '"sector","byte"'), RANGE)


def test_a_metric_that_was_not_collected_is_named() -> None:
    with pytest.raises(NcuFailed, match=r"no dram__bytes_read\.sum"):
        read_kernels(PRINTED.replace("dram__bytes_read.sum", "gpu__time_duration.sum"), RANGE)


def test_why_nothing_was_profiled_is_said() -> None:
    said = (
        "==PROF== Connected to process 4711\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"
    )
    with pytest.raises(NcuFailed, match="ERR_NVGPUCTRPERM") as error:
        read_kernels(said + "==WARNING== No kernels were profiled.\n", RANGE)
    assert "No kernels were profiled" in str(error.value)
    assert "Connected" not in str(error.value)


def test_passes_are_those_of_the_launch_with_most() -> None:
    said = '==PROF== Profiling "gemm" - 0: 0%....50%....100% - 1 pass\n'
    said += '==PROF== Profiling "void Sobel<float>(uchar4 *)" - 1: 0%....50%....100% - 12 passes\n'
    assert most_passes(said + PRINTED) == 12
    assert most_passes(PRINTED) is None


def test_steps_lie_between_marks() -> None:
    names = ["before", "at::cuda::spin_kernel(long)", "a", "b", "at::cuda::spin_kernel(long)", "c"]
    steps = steps_of([Kernel(name, 1, 1, None) for name in names], "spin_kernel")
    assert [[kernel.name for kernel in step] for step in steps] == [["a", "b"], ["c"]]
