"""Kernel windows applied to steps that nobody watched: what their busy time consists of.

A window sees some steps of a phase; the others are taken to be like them. Out of the busy time above the
floor: launch bubbles as `KernelEvidence.launch_gaps` has them, exposed communication and exposed transfers by
their ratio of the span, and the rest ran slower than its floor. Of the time before the step, as much as the
windows saw busy was no waiting. The row still sums to the time it covers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, StepAccounts
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.steps import PHASES

_INDEX = {name: index for index, name in enumerate(COMPONENTS)}


def apply_windows(rows: StepAccounts, kernels: Mapping[str, KernelEvidence]) -> None:
    """Split the components of ``rows`` in place; rows of phases without evidence stay as they are."""
    for index, label in enumerate(PHASES):
        seen = kernels.get(label)
        if seen is None:
            continue
        chosen = rows.phase == index
        if chosen.any():
            _apply(rows, chosen, seen)


def _apply(rows: StepAccounts, chosen: np.ndarray, seen: KernelEvidence) -> None:
    parts = rows.components[chosen]
    span = rows.span_s[chosen]
    floor = parts[:, _INDEX["floor_memory"]] + parts[:, _INDEX["floor_compute"]]
    above = np.clip(rows.busy_s[chosen] - floor, 0, None)
    left = np.minimum(above, parts[:, _INDEX["unattributed"]])
    parts[:, _INDEX["unattributed"]] -= left
    for name, seconds in (
        ("launch_gap", seen.launch_gaps(span, rows.busy_s[chosen], rows.floor_s[chosen])),
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
