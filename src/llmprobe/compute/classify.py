"""From figures to a verdict: one phase of one rank over one window, by the rules in docs/verdicts.md."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprobe.compute import attributes
from llmprobe.compute.confidence import CALIBRATED_FACTOR, HOST_CLOCK_LIMIT, Vote, confidence, margin
from llmprobe.compute.counted_idle import bubble_seconds, idle_ratio
from llmprobe.compute.counter_roofs import CounterRoofs, of_phase
from llmprobe.compute.evidence import Evidence, Source
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.sampled import seen_of
from llmprobe.compute.signs import Sign, signs
from llmprobe.compute.stall import RunningStep
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import (
    BALANCED,
    CAUSES,
    COMPUTE,
    IDLE,
    INEFFICIENT,
    MEMORY,
    SYNC,
    UNKNOWN,
    Observation,
    Verdict,
)

_CAUSE_WORDS = {
    "host_between_steps": "the host between steps",
    "launch_bubbles": "launch bubbles inside steps",
    "sampling": "the host before sampling",
    "communication": "communication",
    "transfers": "copies between host and device",
}
#: Causes of waits in which the GPU has nothing to run.
_NOTHING_RUNS = ("host_between_steps", "launch_bubbles", "sampling")
_WORTH_A_WORD = 0.5  # weight of uneven routing


def classify(
    seen: Observation, limits: Thresholds, current: str | None = None, idle_steps: float | None = None
) -> Verdict:
    """The verdict on what was seen.

    Args:
        seen: one window.
        limits: thresholds.
        current: the class that stands; thresholds move a little in its favour.
        idle_steps: instead of ``limits.idle_steps``, for a shorter window.
    """
    figures = seen.figures
    least = limits.idle_steps if idle_steps is None else idle_steps
    if figures is None or _idle(figures, seen.window_seconds, least, limits):
        steps = figures.steps if figures else 0
        ended = f"{steps} {'step' if steps == 1 else 'steps'} in {seen.window_seconds:.3g} s"
        if (running := seen.running) is not None and _hides_idleness(running, seen, limits):
            why = f"{ended}, and one has been running for {running.seconds:.0f} s"
            found = Verdict(seen.phase, UNKNOWN, "step_running", 0.0, why, missing=(why,))
            return _with_load(found, seen, running.pending_seconds)
        return _with_load(Verdict(seen.phase, IDLE, None, 1.0, ended), seen)
    case = _Case(seen, figures, limits, limits.favouring(current))
    return _with_load(case.verdict(), seen)


def _idle(figures: PhaseFigures, window_seconds: float, least: float, limits: Thresholds) -> bool:
    share = figures.seconds / window_seconds if window_seconds > 0 else 0.0
    return figures.steps == 0 or (figures.steps < least and share < limits.idle_share_ratio)


def _hides_idleness(running: RunningStep, seen: Observation, limits: Thresholds) -> bool:
    """Whether a step that has not ended makes a phase busy: it is in no figure yet."""
    ended = seen.figures.seconds if seen.figures else 0.0
    least = limits.idle_share_ratio * seen.window_seconds
    return running.pending_seconds > 0 and ended + running.pending_seconds >= least


def _with_load(verdict: Verdict, seen: Observation, running_seconds: float = 0.0) -> Verdict:
    figures = seen.figures
    seconds = (figures.seconds if figures else 0.0) + running_seconds
    return replace(
        verdict,
        clock=seen.clock,
        steps_per_second=figures.steps_per_second if figures else 0.0,
        share_ratio=min(seconds / seen.window_seconds, 1.0) if seen.window_seconds > 0 else 0.0,
    )


@dataclass(frozen=True)
class _Stall:
    """Waiting in seconds, by cause."""

    by_cause: dict[str, float]
    ratio: float

    @property
    def cause(self) -> str:
        return max(self.by_cause, key=lambda name: self.by_cause[name])


class _Case:
    """One phase with steps enough to be judged."""

    def __init__(
        self, seen: Observation, figures: PhaseFigures, limits: Thresholds, moved: Thresholds
    ) -> None:
        self._seen, self._figures, self._limits, self._moved = seen, figures, limits, moved
        self._old_kernels = seen.kernels is not None and seen.kernels.age_seconds > limits.kernel_age_seconds
        self._kernels = None if self._old_kernels or seen.kernels is None else seen_of(figures, seen.kernels)
        self._counters = of_phase(seen.counters, figures.seconds, seen.window_seconds, limits)
        self._counted_roofs = CounterRoofs(self._counters, limits, moved)
        # Without a queue of kernels nothing can run dry: on a CPU an operator runs where it is called.
        self._device_queue = seen.clock != "host"
        self._bubbles_possible = self._device_queue and not seen.one_graph
        unseen = self._kernels is None and self._device_queue
        self._idle = idle_ratio(figures, seen.window_seconds, self._counters)
        self._counted = bubble_seconds(figures, seen.window_seconds, self._counters) if unseen else 0.0
        self._stall = self._waiting()
        found = signs(
            seen.host, limits, self._stall.cause if self._stall.ratio >= moved.sync_gap_ratio else None
        )
        self._signs: tuple[Sign, ...] = tuple(sign for sign in found if sign.explains)
        self._circumstances: tuple[Sign, ...] = tuple(sign for sign in found if not sign.explains)
        # Of the bubbles that the windows saw, accounting may have taken some out of busy time already.
        applied = figures.components.get("launch_gap", 0.0)
        busy = figures.span_seconds - figures.components.get("sample_gap", 0.0) - applied
        inside = figures.span_seconds * self._kernels.stall_ratio if self._kernels else self._counted
        hidden = max(inside - applied, 0.0)
        correction = busy / (busy - hidden) if busy > hidden else 1.0
        self._mbu, self._mfu = _times(figures.mbu_busy, correction), _times(figures.mfu_busy, correction)
        of_span = busy / figures.span_seconds if figures.span_seconds > 0 else 0.0
        self._mbu_span, self._mfu_span = _times(figures.mbu_busy, of_span), _times(figures.mfu_busy, of_span)

    def verdict(self) -> Verdict:
        if self._seen.counters is not None and self._seen.counters.shared:
            return self._unknown("shared_gpu", ("another process uses this GPU",))
        if missing := (*self._seen.problems, *self._contradictions()):
            return self._unknown("contradiction", missing)
        if self._figures.sync_gap_ratio is None:
            why = "no front end is recorded, so waiting cannot be told from having no work"
            return self._unknown("no_front_end", (why,))
        if self._stall.ratio >= self._moved.sync_gap_ratio:
            return self._sync()
        if self._mbu is None or self._mfu is None:
            cause = "no_peaks" if self._seen.peaks is None and not self._seen.no_model else "no_model"
            why = self._seen.no_model or (
                self._seen.no_peaks or "no peak rates for this device: run `llmprobe calibrate`"
                if cause == "no_peaks"
                else f"the work of {self._seen.phase} steps is not modelled"
            )
            return self._unknown(cause, (why,))
        unseen = self._bubbles_possible and self._kernels is None
        if unseen and not self._near_a_roof() and not self._never_idle():
            return self._unknown("no_kernel_windows", (self._room_for_bubbles(),))
        return self._roofs()

    # What is missing

    def _contradictions(self) -> tuple[str, ...]:
        found, limits, figures = [], self._limits, self._figures
        # Without the bubbles that lie in busy time, as everything below takes them. Where waiting decides, no
        # rate does, and the little that windows saw would be held against all other steps.
        waits = self._stall.ratio >= self._moved.sync_gap_ratio
        mbu, mfu = (figures.mbu_busy, figures.mfu_busy) if waits else (self._mbu, self._mfu)
        for name, value in (("MBU", mbu), ("MFU", mfu)):
            if value is not None and value > limits.above_peak_ratio:
                other = ", or the weights fit a cache" if name == "MBU" else ""
                if name == "MBU" and self._seen.experts is not None:
                    other += ", or its steps reach fewer experts than even routing would"
                found.append(f"{name} {value:.2f} is above the peak: the clock or the peak is wrong{other}")
        counters, step = self._counters, figures.mbu_step
        if counters and step and step - counters.dram_active_ratio > limits.counter_disagreement_ratio:
            found.append(
                f"MBU {step:.2f} by the model, but the DRAM counter reads {counters.dram_active_ratio:.2f}"
            )
        ratio = self._kernels.clock_ratio if self._kernels else None
        if ratio is not None and abs(ratio - 1) > limits.clock_disagreement_ratio:
            found.append(f"kernels took {ratio:.2f} times what the step clock says")
        return tuple(found)

    def _room_for_bubbles(self) -> str:
        why = "kernel windows are off"
        if self._seen.windows_on:
            why = "kernel windows have seen too few of its steps"
        if self._old_kernels and self._seen.kernels:
            why = f"the last kernel window is {self._seen.kernels.age_seconds:.0f} s old"
        near = f"MBU {self._mbu_span or 0:.2f} and MFU {self._mfu_span or 0:.2f} of the span"
        return f"{near} leave room for launch bubbles, and {why}{self._routed()}"

    def _routed(self) -> str:
        """What bytes of experts were put right by, as the end of a reason; empty where that is not much."""
        routing = self._seen.routing
        return f"; {routing.said()}" if routing is not None and routing.weight >= _WORTH_A_WORD else ""

    def _near_a_roof(self) -> bool:
        """Whether so much of the span is accounted for that bubbles cannot be what it consists of."""
        # What stands may make a roof easier to reach here, never harder: a phase that is found to be near
        # neither roof, yet without room for bubbles, would have room for them once that class stands.
        mbu, mfu = (
            min(getattr(limits, name) for limits in (self._limits, self._moved))
            for name in ("memory_mbu_ratio", "compute_mfu_ratio")
        )
        return (
            (self._mbu_span or 0) >= mbu
            or (self._mfu_span or 0) >= mfu
            or self._counted_roofs.reached is not None
        )

    def _never_idle(self) -> bool:
        """Whether the counter of activity leaves no room for bubbles that would make a phase sync-bound.

        It stays up in part of the gaps between small kernels: of 0.38 idle time it left 0.24 over between
        kernels of 5 us (benchmarks/counter_gaps.py), so a quarter of what would be too much has to do.
        """
        return self._idle is not None and self._idle <= self._moved.sync_gap_ratio / 4

    def _unknown(self, cause: str, missing: tuple[str, ...]) -> Verdict:
        shown = self._shown(self._signs)
        return Verdict(self._seen.phase, UNKNOWN, cause, 0.0, missing[0], missing=missing, evidence=shown)

    # Waiting

    def _waiting(self) -> _Stall:
        figures, kernels = self._figures, self._kernels
        parts = {cause: figures.components.get(name, 0.0) for cause, name in CAUSES.items()}
        if kernels is not None and figures.sync_gap_is_lower_bound:  # not all of it has windows applied
            prepared = (kernels.gap_busy_seconds or 0.0) * figures.steps
            parts["host_between_steps"] = max(figures.gap_seconds - prepared, 0.0)
            parts["launch_bubbles"] = kernels.launch_gap_ratio * figures.span_seconds
            parts["communication"] = kernels.communication_ratio * figures.span_seconds
            parts["transfers"] = kernels.transfer_ratio * figures.span_seconds
        elif self._counted:
            parts["launch_bubbles"] = max(parts["launch_bubbles"], self._counted)
        total = figures.span_seconds + figures.gap_seconds
        return _Stall(parts, min(sum(parts.values()) / total, 1.0) if total > 0 else 0.0)

    def _sync(self) -> Verdict:
        stall, limits = self._stall, self._limits
        cause, seen = stall.cause, ("launch_bubbles", "communication", "transfers")
        votes = [] if cause in seen else [Vote("step clock", True)]
        if self._kernels is not None:
            votes.append(Vote("kernel windows", True))
        if self._counters is not None:
            roof = self._counted_roofs.reached
            idle = self._idle
            # Active while the clock says it waited: kernels that belong to no step, or a wrong clock. What
            # communicates is active too, and copies may be.
            total = sum(stall.by_cause.values())
            quiet = sum(seconds for name, seconds in stall.by_cause.items() if name in _NOTHING_RUNS)
            nothing = stall.ratio * quiet / total if total else 0.0
            refuted = idle is not None and cause in _NOTHING_RUNS and idle < nothing / 2
            sure = roof is not None or refuted or (idle is not None and idle >= limits.sync_gap_ratio)
            votes.append(Vote("hardware counters", roof is None and not refuted, 1.0 if sure else 0.5))
        of_host = cause in ("host_between_steps", "launch_bubbles", "sampling")
        explained = self._signs if of_host else ()
        if explained:
            votes.append(Vote("host signals", True))
        bound = "" if self._kernels or not self._bubbles_possible else "at least "
        counted = cause == "launch_bubbles" and self._counted > 0
        reason = (
            f"the device waits {bound}{stall.ratio:.0%} of the time, mostly for {_CAUSE_WORDS[cause]}"
            f"{' (or copies)' if counted else ''} "
            f"({stall.by_cause[cause] / self._figures.steps * 1e3:.2f} ms a step)"
        )
        if counted and self._counters is not None:
            reason += (
                f"; the GPU had something to compute {self._counters.graphics_active_ratio:.0%} of the time"
            )
        if explained:
            reason += f"; {explained[0].text}"
        told = self._signs + (self._circumstances if of_host else ())
        found = self._judged(SYNC, cause, votes, margin(stall.ratio, limits.sync_gap_ratio), reason, told)
        waits = {name: seconds / self._figures.steps for name, seconds in stall.by_cause.items() if seconds}
        return replace(found, wait_seconds=waits)

    # Roofs

    def _roofs(self) -> Verdict:
        figures, moved, limits = self._figures, self._moved, self._limits
        mbu, mfu = self._mbu or 0.0, self._mfu or 0.0
        memory, compute = (figures.components.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
        counted = self._counted_roofs.reached
        ridge = self._seen.peaks.ridge_flops_per_byte if self._seen.peaks else 0.0
        distance = figures.intensity / ridge if figures.intensity and ridge else 0.0
        close = distance > 0 and max(distance, 1 / distance) <= moved.balanced_intensity_ratio
        if close and min(mbu, mfu) >= moved.balanced_roof_ratio:
            reason = f"MBU {mbu:.2f} and MFU {mfu:.2f}, and {distance:.2f} of the ridge: both roofs are near"
            votes = self._votes(BALANCED, True)
            return self._judged(
                BALANCED, None, votes, margin(min(mbu, mfu), limits.balanced_roof_ratio), reason
            )
        modelled = None
        if memory >= compute and mbu >= moved.memory_mbu_ratio:
            modelled = MEMORY
        elif compute > memory and mfu >= moved.compute_mfu_ratio:
            modelled = COMPUTE
        for roof, name, value, limit in (
            (MEMORY, "MBU", mbu, limits.memory_mbu_ratio),
            (COMPUTE, "MFU", mfu, limits.compute_mfu_ratio),
        ):
            if roof in (modelled, counted):
                far = margin(value, limit) if roof == modelled else self._counted_roofs.margin(roof)
                reason = f"{name} {value:.2f} of busy time{self._counted_roofs.said(roof)}"
                return self._judged(roof, None, self._votes(roof, roof == modelled), far, reason)
        nearer, limit = (
            (mbu, limits.memory_mbu_ratio) if memory >= compute else (mfu, limits.compute_mfu_ratio)
        )
        reason = f"busy, yet near neither roof: MBU {mbu:.2f}, MFU {mfu:.2f}"
        if self._seen.one_graph and self._kernels is None:
            reason += "; each step is one CUDA graph, so launches are not what it waits for"
        elif self._kernels is None and self._counters is not None and self._never_idle():
            reason += (
                f"; the GPU had something to compute {self._counters.graphics_active_ratio:.0%} of the time, "
                "so launches are not what it waits for"
            )
        if not self._device_queue:
            reason += "; the framework's own work between operators is part of a CPU's busy time"
            if self._signs:
                reason += f"; {self._signs[0].text}"
        votes = self._votes(INEFFICIENT, True)
        return self._judged(INEFFICIENT, None, votes, margin(nearer, limit, below=True), reason)

    def _votes(self, bottleneck: str, modelled: bool) -> list[Vote]:
        peaks, counters, limits = self._seen.peaks, self._counters, self._limits
        calibrated = peaks is not None and peaks.source != "nominal"
        factor = CALIBRATED_FACTOR if calibrated else 1.0
        # That neither roof is near says little by itself: the model of the work may lack a part.
        if bottleneck == INEFFICIENT and self._device_queue:
            factor /= 2
        # What a counter put right of the memory's bytes is no second witness.
        if (routing := self._seen.routing) is not None and bottleneck != COMPUTE:
            factor *= 1 - routing.weight * (0.5 if bottleneck == BALANCED else 1.0)
        votes = [Vote("model of the work", modelled, factor)]
        if self._kernels is not None:
            votes.append(Vote("kernel windows", True))
        if counters is not None:
            roof = self._counted_roofs.reached
            contrary = bottleneck == MEMORY and counters.dram_active_ratio < limits.dram_idle_ratio
            same = bottleneck in (MEMORY, COMPUTE) and self._counted_roofs.confirms(bottleneck, self._figures)
            agrees = roof == bottleneck or (roof is None and (bottleneck == INEFFICIENT or same))
            if agrees and not contrary:
                votes.append(Vote("hardware counters", True))
            elif contrary or (roof is not None and bottleneck != BALANCED):
                votes.append(Vote("hardware counters", False))
        return votes

    # The verdict put together

    def _judged(
        self,
        bottleneck: str,
        cause: str | None,
        votes: list[Vote],
        far: float,
        reason: str,
        told: tuple[Sign, ...] | None = None,
    ) -> Verdict:
        """``told``: the signs to show, if not all that explain."""
        told = self._signs if told is None else told
        reason += "" if bottleneck == SYNC else self._routed()
        attained = attributes.attained(self._seen, bottleneck, self._mbu, self._mfu)
        near = None if attained is None else attained >= 1 - self._limits.near_roof_ratio
        return Verdict(
            phase=self._seen.phase,
            bottleneck=bottleneck,
            cause=cause,
            confidence=confidence(votes, far, HOST_CLOCK_LIMIT if not self._device_queue else 1.0),
            reason=reason,
            healthy=attributes.healthy(self._seen, self._figures, bottleneck, near, self._limits),
            near_roof=near,
            attained_ratio=attained,
            bound_by_operator=attributes.operator(self._figures, bottleneck),
            headroom_seconds=attributes.headroom(self._seen, self._figures),
            signs=tuple(sign.name for sign in told),
            evidence=self._shown(told),
        )

    def _shown(self, told: tuple[Sign, ...]) -> tuple[Evidence, ...]:
        figures, limits, kernels, counters = self._figures, self._limits, self._kernels, self._counters
        shown: list[Evidence] = []
        bytes_by: Source = "modelled" if self._seen.routing is None else "counter"
        if figures.sync_gap_ratio is not None:
            source: Source = "sampled" if kernels is not None else "counter" if self._counted else "measured"
            age = 0.0 if kernels is None else kernels.age_seconds
            shown.append(Evidence("sync_gap_ratio", self._stall.ratio, limits.sync_gap_ratio, source, age))
        if self._mbu is not None:
            shown.append(Evidence("mbu_busy", self._mbu, limits.memory_mbu_ratio, bytes_by))
        if self._mfu is not None:
            shown.append(Evidence("mfu_busy", self._mfu, limits.compute_mfu_ratio, "modelled"))
        if figures.intensity is not None:
            ridge = self._seen.peaks.ridge_flops_per_byte if self._seen.peaks else None
            shown.append(Evidence("intensity_flops_per_byte", figures.intensity, ridge, bytes_by))
        if (routing := self._seen.routing) is not None:
            read, even, age = routing.read_ratio, routing.even_ratio, routing.age_seconds
            shown.append(Evidence("experts_read_ratio", read, even, "counter", age))
        if kernels is not None:
            bubbles, age = kernels.launch_gap_ratio, kernels.age_seconds
            shown.append(Evidence("launch_gap_ratio", bubbles, None, "sampled", age))
        if counters is not None:
            dram, tensor, age = counters.dram_active_ratio, counters.tensor_active_ratio, counters.age_seconds
            shown.append(Evidence("dram_active_ratio", dram, limits.dram_active_ratio, "counter", age))
            shown.append(Evidence("tensor_active_ratio", tensor, limits.tensor_active_ratio, "counter", age))
            if (active := counters.graphics_active_ratio) is not None:
                shown.append(Evidence("graphics_active_ratio", active, None, "counter", age))
        shown += [Evidence(f"host_{sign.name}", sign.value, sign.threshold, "measured") for sign in told]
        return tuple(shown)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
