"""A report as plain text: the conclusion first, then the tables."""

from __future__ import annotations

import textwrap

from llmprobe.analysis.content import Content
from llmprobe.analysis.wording import duration, short, told_apart

_WIDTH = 110
_NAME_CHARS = 68
_TOP = 15
_TOP_GAPS = 8
_GAP_CHARS = 42
_WORTH_SAYING = 0.01
#: By tool, who marks phases for it.
_UNMARKED = {
    "nsys": "llmprobe marks them where LLMPROBE=1 and nsys records NVTX",
    "torch": "`llmprobe capture` and vLLM's own profiler mark them; torch's profiler alone does not",
    "kernels": "no step ended while it was recorded",
}


def render(report: Content) -> str:
    """The report, at most 110 characters wide, without a line break at its end."""
    lines = [f"{report.source.path}  ({report.source.tool} {report.source.version})".replace(" )", ")"), ""]
    lines += _trust(report)
    for finding in report.findings:
        lines += [*_wrapped("• ", finding.text), *_wrapped("  next: ", finding.next_step)]
    if report.findings:
        lines.append("")
    if report.gpus:
        lines += _gpus(report)
    if report.gpus or report.phases:
        lines += _phases(report)
    if report.gpus:
        lines += _kernels(report)
        lines += _gaps(report)
    if report.host_operators:
        lines += _host(report)
    return "\n".join(lines).rstrip()


def _wrapped(mark: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark), break_long_words=False
    )


def _trust(report: Content) -> list[str]:
    words = {
        "trusted": "",
        "limited": "Trust this only in part:",
        "untrusted": "DO NOT TRUST THIS RECORDING:",
    }
    if {one.check for one in report.trust.reasons if one.level == "untrusted"} == {"cuda_not_traced"}:
        words["untrusted"] = "Nothing about a GPU can be told from this:"  # what the host did can
    lines = [words[report.trust.verdict]] if words[report.trust.verdict] else []
    for reason in report.trust.reasons:
        lines += _wrapped("  note: " if reason.level == "note" else "  - ", reason.text)
    return [*lines, ""] if lines else []


def _gpus(report: Content) -> list[str]:
    lines = []
    for gpu in report.gpus:
        idle = gpu.seconds - gpu.busy_seconds
        line = (
            f"{gpu.name}: busy {gpu.busy_ratio:.1%}, idle {gpu.idle_ratio:.1%} of {duration(gpu.seconds)}"
            f" ({gpu.kernels} kernels, {gpu.copies} copies, {gpu.sets} sets"
            f"{f', {gpu.graphs} whole graphs' if gpu.graphs else ''})"
        )
        lines.append(line)
        parts = []
        if gpu.unlaunched_idle_seconds is not None and idle > 0:
            parts.append(
                f"next work not launched in {gpu.unlaunched_idle_seconds / idle:.0%} of the idle time"
            )
        if gpu.back_to_back_idle_seconds >= _WORTH_SAYING * gpu.seconds > 0:
            parts.append(f"gaps below 1 µs {duration(gpu.back_to_back_idle_seconds)}")
        if gpu.exposed_communication_seconds:
            parts.append(f"exposed communication {duration(gpu.exposed_communication_seconds)}")
        if gpu.exposed_transfer_seconds:
            parts.append(f"exposed transfers {duration(gpu.exposed_transfer_seconds)}")
        if parts:
            lines.append(f"  {', '.join(parts)}")
    return [*lines, ""]


def _phases(report: Content) -> list[str]:
    if not report.phases:
        return [f"no phases marked ({_UNMARKED[report.source.tool]})", ""]
    lines = [
        f"{'phase':<24}{'steps':>7}{'tokens':>9}{'host time':>11}{'device time':>13}{'busy':>8}"
        f"{'gaps before':>13}{'sync gap':>10}"
    ]
    several = len(report.gpus) > 1
    for row in report.phases:
        name = f"  {row.name}/{row.part}" if row.part else row.name
        if several and row.gpu:
            name += f" · {row.gpu.split(' (')[0]}"
        cells = (
            (f"{row.steps}", 7),
            ("" if row.tokens is None else f"{row.tokens}", 9),
            (duration(row.host_seconds), 11),
            ("" if row.seconds is None else duration(row.seconds), 13),
            ("" if row.busy_ratio is None else f"{row.busy_ratio:.1%}", 8),
            ("" if row.gap_seconds is None else duration(row.gap_seconds), 13),
            ("" if row.sync_gap_ratio is None else f"{row.sync_gap_ratio:.1%}", 10),
        )
        lines.append(f"{name:<24}" + "".join(f"{text:>{width}}" for text, width in cells))
    cut = [
        f"{row.cut_steps} {row.name}" + (f" on {row.gpu.split(' (')[0]}" if several and row.gpu else "")
        for row in report.phases
        if row.cut_steps
    ]
    if cut:
        lines += _wrapped(
            "  ", f"of these in part only, for the recording began or ended in them: {', '.join(cut)}"
        )
    return [*lines, ""]


def _kernels(report: Content) -> list[str]:
    lines = [f"{'share':>7} {'time':>10} {'count':>9} {'mean':>10}  class"]
    for row in report.operators:
        lines.append(
            f"{row.share:>7.1%} {duration(row.seconds):>10} {row.count:>9} "
            f"{duration(row.mean_seconds):>10}  {row.name}"
        )
    lines += ["", f"{'share':>7} {'time':>10} {'count':>9} {'mean':>10}  kernel"]
    shown = told_apart(kernel.name for kernel in report.kernels[:_TOP])
    for kernel in report.kernels[:_TOP]:
        lines.append(
            f"{kernel.share:>7.1%} {duration(kernel.seconds):>10} {kernel.count:>9} "
            f"{duration(kernel.mean_seconds):>10}  {shown[kernel.name]}"
        )
    return [*lines, ""]


def _gaps(report: Content) -> list[str]:
    if not report.gaps:
        return []
    lines = ["longest gaps"]
    around = [name for gap in report.gaps[:_TOP_GAPS] for name in (gap.before, gap.after)]
    shown = told_apart(around, _GAP_CHARS)
    for gap in report.gaps[:_TOP_GAPS]:
        late = ""
        if gap.unlaunched_seconds is not None:
            waited = gap.unlaunched_seconds
            late = f", not launched for {duration(waited)}" if waited else ", launched in time"
        where = f" {'in' if gap.in_step else 'before'} {gap.phase}" if gap.phase else ""
        lines.append(
            f"{duration(gap.seconds):>10}  at {gap.begin_seconds:.6f} s on {gap.gpu.split(' (')[0]}"
            f"{where}{late}"
        )
        lines.append(f"{'':>12}{shown[gap.before]} → {shown[gap.after]}")
    return [*lines, ""]


def _host(report: Content) -> list[str]:
    whole = sum(row.self_seconds for row in report.host_operators) or 1.0
    lines = [f"{'share':>7} {'own time':>10} {'with calls':>11} {'count':>9}  operator on the host"]
    for row in report.host_operators[:_TOP]:
        lines.append(
            f"{row.self_seconds / whole:>7.1%} {duration(row.self_seconds):>10} {duration(row.seconds):>11} "
            f"{row.count:>9}  {short(row.name)}"
        )
    return [*lines, ""]
