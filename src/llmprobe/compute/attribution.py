"""What a step's time went into: the picture that the page and the reports draw.

A mixed step is prefill and decode at once; its time is split between them by token share. Without kernel
windows, slow kernels, launch bubbles, communication and transfers look alike, and stay in ``remainder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmprobe.compute.accounting import COMPONENTS, IDLE_COMPONENTS, StepAccounts, operator_floors
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.facts import OPERATORS
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.steps import PHASES, Floats

#: The parts of `Attribution.seconds` that are not floors.
OTHER_PARTS = ("inefficiency", "launch", "host", "sample", "communication", "transfer", "remainder")
#: Every part: ``memory.<operator>`` and ``compute.<operator>`` are the floor.
PARTS = tuple(f"{roof}.{name}" for roof in ("memory", "compute") for name in OPERATORS) + OTHER_PARTS
_INDEX = {name: index for index, name in enumerate(PARTS)}
_COMPONENT = {name: index for index, name in enumerate(COMPONENTS)}
_PREFILL, _DECODE, _MIXED = (PHASES.index(name) for name in ("prefill", "decode", "mixed"))


@dataclass(frozen=True)
class Attribution:
    """Where the time of one phase went. ``seconds`` by `PARTS` sum to ``total_seconds``.

    ``steps`` counts a mixed step as its token share of one; ``kernels_age_seconds`` is None where no kernel
    window tells launch bubbles from slow kernels.
    """

    steps: float
    total_seconds: float
    seconds: dict[str, float]
    kernels_age_seconds: float | None = None

    @property
    def step_seconds(self) -> dict[str, float]:
        """The parts of a mean step; those that are 0 are left out."""
        return {name: value / self.steps for name, value in self.seconds.items() if value and self.steps}


def attribute(
    rows: StepAccounts, peaks: Peaks | None, kernels: Mapping[str, KernelEvidence] | None = None
) -> dict[str, Attribution]:
    """Attribute the time of steps, gaps before them included and idle time (`IDLE_COMPONENTS`) left out.

    Args:
        rows: steps.
        peaks: None leaves busy time without a floor.
        kernels: by the phase of the steps that were seen.

    Returns:
        By phase; ``mixed`` is never among them. Over all phases the seconds sum to those of the rows.
    """
    parts = _parts(rows, peaks)
    for index, label in enumerate(PHASES):
        if kernels and (seen := kernels.get(label)):
            chosen = rows.phase == index
            parts[chosen] = _with_kernels(parts[chosen], rows.span_s[chosen], seen)
    present = set(np.unique(rows.phase).tolist())
    share = _prefill_share(rows)
    if _MIXED in present:
        present |= {_PREFILL, _DECODE}
    result = {}
    for index, label in enumerate(PHASES):
        if index == _MIXED or index not in present:
            continue
        weight = np.where(rows.phase == index, 1.0, 0.0)
        if index == _PREFILL:
            weight = np.where(rows.phase == _MIXED, share, weight)
        elif index == _DECODE:
            weight = np.where(rows.phase == _MIXED, 1 - share, weight)
        steps = float(weight[~rows.empty].sum())
        sums = weight @ parts
        if weight.any():
            seconds = dict(zip(PARTS, sums.tolist(), strict=True))
            result[label] = Attribution(steps, float(sums.sum()), seconds, _age(label, rows, kernels))
    return result


def _parts(rows: StepAccounts, peaks: Peaks | None) -> Floats:
    """(N, parts) seconds."""
    parts = np.zeros((len(rows), len(PARTS)))
    floor = rows.components[:, _COMPONENT["floor_memory"]] + rows.components[:, _COMPONENT["floor_compute"]]
    rest = np.array(floor)
    if peaks is not None and len(rows):
        memory, compute = operator_floors(rows, peaks)
        parts[:, : len(OPERATORS)] = memory
        parts[:, len(OPERATORS) : 2 * len(OPERATORS)] = compute
        rest = floor - memory.sum(axis=1) - compute.sum(axis=1)
    named = {
        "inefficiency": "inefficiency",
        "launch": "launch_gap",
        "host": "host_gap",
        "sample": "sample_gap",
        "communication": "communication",
        "transfer": "transfer",
    }
    for part, component in named.items():
        parts[:, _INDEX[part]] = rows.components[:, _COMPONENT[component]]
    parts[:, _INDEX["remainder"]] = rows.components[:, _COMPONENT["unattributed"]] + rest
    return parts


def _with_kernels(parts: Floats, span_s: Floats, seen: KernelEvidence) -> Floats:
    """What windows saw, out of the remainder; what is then left of the span ran slower than its floor."""
    result = np.array(parts)
    left = np.clip(result[:, _INDEX["remainder"]], 0, None)
    before = np.array(left)
    for part, ratio in (
        ("launch", seen.launch_gap_ratio),
        ("communication", seen.communication_ratio),
        ("transfer", seen.transfer_ratio),
    ):
        taken = np.clip(ratio * span_s - result[:, _INDEX[part]], 0, left)
        result[:, _INDEX[part]] += taken
        left = left - taken
    inside = span_s - result[:, : 2 * len(OPERATORS)].sum(axis=1)
    inside -= result[:, [_INDEX[name] for name in OTHER_PARTS if name not in ("host", "remainder")]].sum(
        axis=1
    )
    slow = np.clip(inside, 0, left)
    result[:, _INDEX["inefficiency"]] += slow
    result[:, _INDEX["remainder"]] += left - slow - before
    return result


def _prefill_share(rows: StepAccounts) -> Floats:
    tokens = rows.prompt_tokens + rows.decode_tokens
    share = np.zeros(len(rows))
    np.divide(rows.prompt_tokens, tokens, out=share, where=tokens > 0)
    return share


def _age(label: str, rows: StepAccounts, kernels: Mapping[str, KernelEvidence] | None) -> float | None:
    """How old the oldest window is that the phase's attribution leans on."""
    if not kernels:
        return None
    of = {label, "mixed"} if label in ("prefill", "decode") and (rows.phase == _MIXED).any() else {label}
    ages = [kernels[name].age_seconds for name in of if name in kernels]
    return max(ages) if ages else None


__all__ = ["IDLE_COMPONENTS", "OTHER_PARTS", "PARTS", "Attribution", "attribute"]
