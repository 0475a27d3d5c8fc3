"""Steps as columns that figures and attributions only ever sum: whatever a window holds, sums say it all.

The agent keeps running totals of these columns: a window costs a subtraction, however many steps it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, StepAccounts, operator_floors
from llmprobe.compute.facts import OPERATORS
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.steps import PHASES, Floats

#: Seconds, bytes, FLOPs and counts. ``known_*`` are 0 for steps of whose work nothing is known, so that these
#: do not dilute a ratio; a row without a token is not among ``steps``; ``unsampled`` had no kernel windows.
COLUMNS = (
    "rows",
    "steps",
    "span",
    "gap",
    "prompt_tokens",
    "decode_tokens",
    "floor",
    "floored",
    "flops",
    "known_bytes",
    "known_flops",
    "known_seconds",
    "known_busy",
    "unsampled",
    *COMPONENTS,
    *(f"memory.{name}" for name in OPERATORS),
    *(f"compute.{name}" for name in OPERATORS),
)
INDEX = {name: index for index, name in enumerate(COLUMNS)}
_FIRST_COMPONENT = INDEX[COMPONENTS[0]]
COMPONENT_COLUMNS = slice(_FIRST_COMPONENT, _FIRST_COMPONENT + len(COMPONENTS))
MEMORY_COLUMNS = slice(COMPONENT_COLUMNS.stop, COMPONENT_COLUMNS.stop + len(OPERATORS))
COMPUTE_COLUMNS = slice(MEMORY_COLUMNS.stop, MEMORY_COLUMNS.stop + len(OPERATORS))


@dataclass(frozen=True)
class PhaseSums:
    """The steps of one phase in one window."""

    sums: Floats  # (columns,)
    prefill: Floats  # (columns,) each step weighted by `prefill_share`; of other phases than "mixed" not used
    spans: Floats  # (N,) seconds, of steps that are not empty
    rows: Callable[[], Floats]  # (N, columns), for what is not a sum


def columns(rows: StepAccounts, peaks: Peaks | None) -> Floats:
    """(N, `COLUMNS`) of each step.

    Args:
        rows: accounts, kernel windows applied.
        peaks: those that the accounts were made with.
    """
    found = np.zeros((len(rows), len(COLUMNS)))
    moved = rows.traffic_bytes.sum(axis=1)
    done = rows.flops.sum(axis=1)
    known = moved > 0
    for name, values in (
        ("rows", 1.0),
        ("steps", ~rows.empty),
        ("span", rows.span_s),
        ("gap", rows.gap_s),
        ("prompt_tokens", rows.prompt_tokens),
        ("decode_tokens", rows.decode_tokens),
        ("floor", rows.floor_s),
        ("floored", rows.floor_s > 0),
        ("flops", done),
        ("known_bytes", moved),
        ("known_flops", done * known),
        ("known_seconds", (rows.span_s + rows.gap_s) * known),
        ("known_busy", (rows.busy_s - rows.components[:, COMPONENTS.index("launch_gap")]) * known),
        ("unsampled", ~rows.sampled_kernels),
    ):
        found[:, INDEX[name]] = values
    found[:, COMPONENT_COLUMNS] = rows.components
    if peaks is not None and len(rows):
        found[:, MEMORY_COLUMNS], found[:, COMPUTE_COLUMNS] = operator_floors(rows, peaks)
    return found


def prefill_share(rows: Floats) -> Floats:
    """The share of each step's tokens that are prompt tokens; 0 of a step without tokens.

    Args:
        rows: (N, `COLUMNS`).
    """
    prompt = rows[:, INDEX["prompt_tokens"]]
    tokens = prompt + rows[:, INDEX["decode_tokens"]]
    return np.divide(prompt, tokens, out=np.zeros(len(rows)), where=tokens > 0)


def by_phase(rows: StepAccounts, peaks: Peaks | None) -> dict[int, PhaseSums]:
    """Every phase that occurs, by its index in `PHASES`. ``peaks`` as for `columns`."""
    found = columns(rows, peaks)
    return {
        phase: _of(found[rows.phase == phase]) for phase in range(len(PHASES)) if (rows.phase == phase).any()
    }


def _of(rows: Floats) -> PhaseSums:
    spans = rows[rows[:, INDEX["steps"]] > 0, INDEX["span"]]
    return PhaseSums(rows.sum(axis=0), prefill_share(rows) @ rows, spans, lambda: rows)
