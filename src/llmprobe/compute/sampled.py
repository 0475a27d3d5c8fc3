"""Kernel windows applied to steps that nobody watched: what their busy time consists of.

A window sees some steps of a phase; the others are taken to be like them. Out of the busy time above the
floor: launch bubbles as `KernelEvidence.launch_gaps` has them, exposed communication and exposed transfers by
their ratio of the span, and the rest ran slower than its floor. Of the time before the step, as much as the
windows saw busy was no waiting. The row still sums to the time it covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, StepAccounts
from llmprobe.compute.evidence import KernelEvidence, Unwatched
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.steps import PHASES, Floats

#: Steps of a phase whose bubbles are looked at together: of few, all that scatters would be a bubble.
_TOGETHER = 32
_INDEX = {name: index for index, name in enumerate(COMPONENTS)}


def apply_windows(
    rows: StepAccounts,
    kernels: Mapping[str, KernelEvidence],
    earlier: dict[str, Unwatched] | None = None,
) -> None:
    """Split the components of ``rows`` in place; rows of phases without evidence stay as they are.

    Args:
        kernels: by phase.
        earlier: by phase, steps right before these; gets the newest of all, for the next call.
    """
    for index, label in enumerate(PHASES):
        seen = kernels.get(label)
        if seen is None:
            continue
        chosen = rows.phase == index
        if chosen.any():
            steps = Unwatched(
                rows.span_s[chosen],
                rows.busy_s[chosen],
                rows.floor_s[chosen],
                (rows.prompt_tokens + rows.decode_tokens)[chosen].astype(np.float64),
            )
            before = (earlier or {}).get(label)
            _apply(rows, chosen, seen, seen.launch_gaps(steps, before))
            if earlier is not None:
                earlier[label] = steps.after(before, _TOGETHER)


def _apply(rows: StepAccounts, chosen: np.ndarray, seen: KernelEvidence, bubbles: Floats) -> None:
    parts = rows.components[chosen]
    span = rows.span_s[chosen]
    floor = parts[:, _INDEX["floor_memory"]] + parts[:, _INDEX["floor_compute"]]
    above = np.clip(rows.busy_s[chosen] - floor, 0, None)
    left = np.minimum(above, parts[:, _INDEX["unattributed"]])
    parts[:, _INDEX["unattributed"]] -= left
    for name, seconds in (
        ("launch_gap", bubbles),
        ("communication", seen.communication_ratio * span),
        ("transfer", seen.transfer_ratio * span),
    ):
        taken = np.clip(seconds, 0, left)
        parts[:, _INDEX[name]] += taken
        left = left - taken
    prepared = seen.prepared(parts[:, _INDEX["host_gap"]])
    parts[:, _INDEX["host_gap"]] -= prepared
    parts[:, _INDEX["inefficiency"]] += left + prepared
    rows.components[chosen] = parts
    rows.sampled_kernels[chosen] = True


def seen_of(figures: PhaseFigures, seen: KernelEvidence) -> KernelEvidence:
    """What windows saw, of the steps of these figures."""
    span, steps, parts = figures.span_seconds, figures.steps, figures.components
    if span <= 0 or not steps:
        return seen
    if not figures.sync_gap_is_lower_bound:  # accounting has applied windows to each of them
        return replace(
            seen,
            launch_gap_ratio=parts.get("launch_gap", 0.0) / span,
            communication_ratio=parts.get("communication", 0.0) / span,
            transfer_ratio=parts.get("transfer", 0.0) / span,
        )
    busy, tokens = span - parts.get("sample_gap", 0.0), figures.prompt_tokens + figures.decode_tokens
    mean = (span / steps, busy / steps, figures.floor_seconds or 0.0, tokens / steps)
    return seen.at(Unwatched(*(np.array([value]) for value in mean)))
