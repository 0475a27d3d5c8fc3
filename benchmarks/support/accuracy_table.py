"""One load on a server that nsys records: what was measured, its bars, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from support.step_agreement import Agreement
from support.table import Results, bar, command

_HEADER = (
    "server",
    "load",
    "steps",
    "span, nsys",
    "error",
    "with the launch call",
    "bar",
    "gap ratio, nsys",
    "less the launch call",
    "of it between steps",
    "llmprobe",
    "bar",
    "slower while recorded",
    "sum of components",
    "bar",
    "MBU",
    "DRAM counter − MBU",
    "bar",
)
#: For how long the sum of components is held against the wall clock, and the MBU against the DRAM counter.
ELAPSED_SECONDS, COUNTED_SECONDS = 10.0, 4.0
_GAP_GRAPHS, _ELAPSED = 0.02, 0.01
_DRAM_LEAST, _DRAM_MOST = -0.02, 0.08


@dataclass(frozen=True)
class Shape:
    """A steady load: so many requests at a time. With ``prefill``, prompts follow each other."""

    batch: int
    context: int
    prefill: bool = False

    @property
    def label(self) -> str:
        """For tables."""
        return f"{'prefill' if self.prefill else 'decode'} {self.batch} x {self.context}"

    @property
    def file(self) -> str:
        """The label in a file's name."""
        return self.label.replace(" ", "-")


@dataclass(frozen=True)
class Measured:
    """One server under one load."""

    server: str
    shape: Shape
    eager: bool
    agreement: Agreement
    elapsed_error: float | None  # (sum of components / wall clock) - 1
    mbu: float | None  # traffic / elapsed / nominal bandwidth ...
    dram: float | None  # ... and the hardware's counter of the same seconds

    @property
    def graphs(self) -> bool:
        """Whether the steps are replays of CUDA graphs, and not launched kernel by kernel."""
        return not self.eager and not self.shape.prefill


def table(runs: Sequence[Measured], machine: str, failed: Sequence[str], graphs: str) -> Results:
    """All loads.

    Args:
        failed: those that gave nothing, a line each.
        graphs: how nsys recorded CUDA graphs, one of `support.nsys_server.GRAPHS`.
    """
    by_node = graphs == "node"
    notes = [
        "Bars: the median error of the span within 1 % or 20 µs; the gap ratio within "
        f"{_GAP_GRAPHS} with CUDA graphs; the sum of components within 1 % over {ELAPSED_SECONDS:g} s; the "
        f"DRAM counter less the MBU of the same {COUNTED_SECONDS:g} s from {_DRAM_LEAST} to +{_DRAM_MOST}.",
        "The launch call: the device is idle and the host in the call that launches a step's first kernel. "
        "It belongs to the step clock's span. The bars leave it out"
        + (
            ", because recording graphs by node makes the launch of one take some hundred microseconds."
            if by_node
            else "."
        ),
        "Graphs were recorded "
        + ("by node: what lies idle between the kernels of one counts." if by_node else "as one each."),
        "Slower while recorded: the spans by the step clock, beside those right before. What a recording "
        "adds to steps is idle time in it, and none of the server's.",
        "Where kernels are launched one by one (no CUDA graphs, and prefill), the gap ratio of the step "
        "clock is a lower bound: it cannot see launch bubbles. Kernel windows can.",
        *failed,
    ]
    return Results(
        "llmprobe against nsys", command("accuracy.py"), machine, _HEADER, [_row(run) for run in runs], notes
    )


def _row(run: Measured) -> list[str]:
    found = run.agreement
    error, most = found.span_error_without_launch_seconds, found.span_most_seconds
    return [
        run.server,
        run.shape.label,
        str(found.steps),
        f"{found.span_truth_seconds * 1e3:.3f} ms",
        f"{found.span_error_seconds * 1e6:.1f} µs",
        f"{error * 1e6:.1f} µs",
        bar(error * 1e6, most * 1e6, "µs"),
        f"{found.gap_truth:.4f}",
        f"{found.gap_truth - found.launch:.4f}",
        f"{found.gap_between:.4f}",
        f"{found.gap_ours:.4f}",
        f"± {_GAP_GRAPHS}: {'held' if _gap_holds(run) else 'MISSED'}" if run.graphs else "lower bound",
        "" if found.slower is None else f"{found.slower:+.1%}",
        "" if run.elapsed_error is None else f"{run.elapsed_error:+.2%}",
        "" if run.elapsed_error is None else bar(abs(run.elapsed_error) * 100, _ELAPSED * 100, "%"),
        *_dram(run),
    ]


def _dram(run: Measured) -> list[str]:
    if run.mbu is None:
        return ["", "", ""]
    if run.dram is None:
        return [f"{run.mbu:.3f}", "no counter", ""]
    return [f"{run.mbu:.3f}", f"{run.dram - run.mbu:+.3f}", counter_bar(run.dram - run.mbu)]


def counter_bar(over: float) -> str:
    """The bar of what the DRAM counter says beyond the MBU, and whether ``over`` holds it."""
    return f"{_DRAM_LEAST} … +{_DRAM_MOST}: {'held' if _DRAM_LEAST <= over <= _DRAM_MOST else 'MISSED'}"


def _dram_holds(run: Measured) -> bool:
    return run.mbu is None or run.dram is None or _DRAM_LEAST <= run.dram - run.mbu <= _DRAM_MOST


def _gap_holds(run: Measured) -> bool:
    found = run.agreement
    return abs(found.gap_ours - (found.gap_truth - found.launch)) <= _GAP_GRAPHS


def holds(run: Measured) -> bool:
    """Whether every bar of it is held."""
    found = run.agreement
    span = found.span_error_without_launch_seconds <= found.span_most_seconds
    elapsed = run.elapsed_error is None or abs(run.elapsed_error) <= _ELAPSED
    return span and elapsed and _dram_holds(run) and (not run.graphs or _gap_holds(run))
