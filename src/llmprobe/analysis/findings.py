"""What stands out in a recording, with the numbers that say so and the next step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmprobe.analysis.busy import Occupation, length_ns
from llmprobe.analysis.events import GRAPH, KERNEL, UNKNOWN, Ints, Trace
from llmprobe.analysis.phases import PhaseTimes, in_one_forward
from llmprobe.analysis.trust import UNTRUSTED, Trust
from llmprobe.analysis.wording import duration
from llmprobe.compute.steps import Bools

#: Idle share of a GPU from which it is worth words; the verdict's own threshold for ``sync_bound``.
IDLE_RATIO = 0.20
#: Above it, what limits lies inside the kernels.
BUSY_RATIO = 0.90
#: From this share of whole graphs on it is not known whether what counts as busy is.
_UNSEEN_RATIO = 0.10
_EXPOSED_COMMUNICATION_RATIO = 0.10
_EXPOSED_TRANSFER_RATIO = 0.05
_UNEVEN_RATIO = 0.10
#: Most of the idle time has this cause.
_MOST = 0.6
_BUBBLE_NS = 50_000
#: A launch takes no longer, with a profiler that looks on.
_LAUNCH_NS = 100_000
_MOST_NAMED = 3
#: Gaps of one kind are at most so many times as long as the one in the middle.
_USUAL = 4


@dataclass(frozen=True)
class Finding:
    """One statement; ``gain_ratio`` is the most that mending it can save of the recorded time."""

    name: str
    text: str
    next_step: str
    gain_ratio: float = 0.0


def find(
    trace: Trace, trust: Trust, occupations: list[Occupation], phases: list[PhaseTimes]
) -> list[Finding]:
    """The largest gain first; from an untrusted recording nothing is concluded."""
    if trust.verdict == UNTRUSTED or not occupations:
        return []
    found: list[tuple[str, Finding]] = []
    communicate = [
        length_ns(one.exposed_communication) / 1e9 / one.seconds for one in occupations if one.seconds
    ]
    # One that never does is none of those that the others could wait for in it.
    least_communication = min((one for one in communicate if one), default=0.0)
    for occupation in occupations:
        label = trace.devices[occupation.device]
        about = _about_gpu(trace, label, occupation, phases, least_communication)
        found += [(label, finding) for finding in about]
    uneven = _uneven([one for one in occupations if one.seconds])
    return sorted([*_told_once(found), *uneven], key=lambda finding: -finding.gain_ratio)


def _told_once(found: list[tuple[str, Finding]]) -> list[Finding]:
    """What is so on several GPUs, with one next step: of the one where it weighs most, naming the others."""
    alike: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for label, finding in found:
        alike.setdefault((finding.name, finding.next_step), []).append((label, finding))
    told = []
    for group in alike.values():
        label, most = max(group, key=lambda one: one[1].gain_ratio)
        others = [other for other, _ in group if other != label]
        named = ", ".join(others) if len(others) <= _MOST_NAMED else f"{len(others)} other GPUs"
        told.append(replace(most, text=f"{most.text}; likewise {named}") if others else most)
    return told


def _uneven(occupations: list[Occupation]) -> list[Finding]:
    busy = [one.busy_ns / 1e9 / one.seconds for one in occupations]
    if busy and max(busy) - min(busy) > _UNEVEN_RATIO:
        return [
            Finding(
                "uneven_gpus",
                f"the GPUs are busy unevenly: {min(busy):.0%} to {max(busy):.0%}",
                "compare their longest gaps: the least busy GPU waits for something that the others do not",
            )
        ]
    # One that waits for another inside a collective is as busy as that.
    alone = [length_ns(one.exposed_communication) / 1e9 / one.seconds for one in occupations]
    computing = [ratio - waits for ratio, waits in zip(busy, alone, strict=True) if waits]
    if computing and max(computing) - min(computing) > _UNEVEN_RATIO:
        return [
            Finding(
                "uneven_gpus",
                f"the GPUs compute unevenly, {min(computing):.0%} to {max(computing):.0%} of the time: those "
                "that compute less wait for the others in their communication",
                "see what the GPU that computes most does: it has more work, or is slower (clocks, others)",
                max(computing) - sum(computing) / len(computing),
            )
        ]
    return []


def _about_gpu(
    trace: Trace, label: str, occupation: Occupation, phases: list[PhaseTimes], least_communication: float
) -> list[Finding]:
    window = occupation.window_ns[1] - occupation.window_ns[0]
    if not window:
        return []
    found = []
    idle = 1 - occupation.busy_ns / window
    if idle >= IDLE_RATIO:
        found.append(_idle(trace, label, occupation, idle, phases))
    elif 1 - idle >= BUSY_RATIO:
        found.append(_busy(label, occupation, 1 - idle))
    communication = length_ns(occupation.exposed_communication) / window
    if communication >= _EXPOSED_COMMUNICATION_RATIO:
        how = "fewer GPUs a replica if the model fits, a faster link, or another all-reduce"
        waited = communication - least_communication
        if waited > _UNEVEN_RATIO:
            how = f"{waited:.1%} more than another GPU, for which it waits: see why the GPUs are uneven first"
        found.append(
            Finding(
                "exposed_communication",
                f"{label} only communicates {communication:.1%} of the time: nothing computes meanwhile",
                how,
                communication,
            )
        )
    transfer = length_ns(occupation.exposed_transfer) / window
    if transfer >= _EXPOSED_TRANSFER_RATIO:
        found.append(
            Finding(
                "exposed_transfer",
                f"{label} only copies or sets memory {transfer:.1%} of the time: no kernel runs meanwhile",
                "see in the list which copies these are: KV offloading, or tensors made on the host",
                transfer,
            )
        )
    return found


def _busy(label: str, occupation: Occupation, busy: float) -> Finding:
    activities = occupation.activities
    length = (activities.end_ns - activities.begin_ns).astype(np.float64)
    whole = float(length[activities.kind == GRAPH].sum() / max(1.0, length.sum()))
    if whole >= _UNSEEN_RATIO:
        return Finding(
            "busy",
            f"{label} is busy {busy:.1%} of the time, as far as can be seen: {whole:.0%} of that is "
            "CUDA graphs recorded whole",
            "for what runs and waits inside them: a `kernels` or `torch` capture of a server without nsys",
        )
    return Finding(
        "busy",
        f"{label} is busy {busy:.1%} of the time: what limits it lies inside its kernels",
        "look at the classes with the largest share; llmprobe status tells memory from compute",
    )


def _idle(trace: Trace, label: str, occupation: Occupation, idle: float, phases: list[PhaseTimes]) -> Finding:
    gaps = occupation.gaps
    length = gaps.length_ns
    text = f"{label} is idle {idle:.1%} of the time"
    worst = max(
        (one for one in phases if one.device == occupation.device and not one.part),
        key=lambda one: one.span_ns + one.gap_ns - one.busy_ns,
        default=None,
    )
    if worst is not None:
        lost = (worst.span_ns + worst.gap_ns - worst.busy_ns) / 1e9
        text += f", {duration(lost)} of it in and before {worst.phase} steps"
    known = gaps.launched_late != UNKNOWN
    total = int(length[known].sum())
    late = int(gaps.launched_late[known].sum())
    if not total:
        how = "record with CUDA API calls"
        if trace.source.tool == "kernels":
            how = "take a `torch` or nsys capture, which has the launches,"
        return Finding("idle", text, f"{how} to see what the device waits for", idle)
    text += f"; in {late / total:.0%} of its gaps' time, the host had not launched what ran next"
    if late < _MOST * total:
        return Finding(
            "idle_launched",
            text,
            "work is launched in time and starts late: look for streams that wait, and small copies",
            idle,
        )
    activities = occupation.activities
    kernels = activities.kind == KERNEL
    lasted = (activities.end_ns - activities.begin_ns)[kernels]
    mean = float(np.mean(lasted)) / 1e3 if len(lasted) else 0.0
    brief = known & (length < _BUBBLE_NS)
    # However long: the host launches one kernel after the other, under a profiler all the more slowly.
    if worst is not None:
        inside = in_one_forward(trace, activities.where(gaps.before), activities.where(gaps.after))
    else:  # nothing marks a forward pass
        inside = _from_kernel_to_kernel(length, int(kernels.sum()))
    if int(length[brief | (inside & known)].sum()) >= _MOST * total:
        which = "gaps below 50 µs"
        if int(length[brief].sum()) < _MOST * total:
            which = "gaps inside a forward pass," if worst else "gaps from each to the next,"
        return Finding(
            "launch_bubbles",
            f"{text}; most are {which} between kernels of {mean:.3g} µs on average",
            "let CUDA graphs cover these steps (vLLM: no --enforce-eager, capture sizes up to the batch)",
            idle,
        )
    return Finding(
        "host_bound",
        f"{text}; most are gaps of 50 µs and more",
        "the host prepares steps too slowly: async scheduling, less work per token, a faster or freer core",
        idle,
    )


def _from_kernel_to_kernel(length: Ints, kernels: int) -> Bools:
    """Which gaps come of kernels that the host launches one by one: those that follow most kernels.

    Gaps between passes are fewer, and longer than any launch.
    """
    middle = float(np.median(length))
    usual = length <= _USUAL * middle
    often = middle <= _LAUNCH_NS and int(usual.sum()) >= _MOST * kernels
    return usual if often else np.zeros_like(usual)
