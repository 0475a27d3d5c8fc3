"""What a step's time went into: the picture that the page and the reports draw.

A mixed step is prefill and decode at once; its time is split between them by token share. Without kernel
windows, slow kernels, launch bubbles, communication and transfers look alike, and stay in ``remainder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmprobe.compute.accounting import IDLE_COMPONENTS
from llmprobe.compute.evidence import KernelEvidence, Unwatched
from llmprobe.compute.facts import OPERATORS
from llmprobe.compute.steps import PHASES, Floats
from llmprobe.compute.sums import COLUMNS, INDEX, PhaseSums, prefill_share

#: The parts of `Attribution.seconds` that are not floors.
OTHER_PARTS = ("inefficiency", "launch", "host", "sample", "communication", "transfer", "remainder")
#: Every part: ``memory.<operator>`` and ``compute.<operator>`` are the floor.
PARTS = tuple(f"{roof}.{name}" for roof in ("memory", "compute") for name in OPERATORS) + OTHER_PARTS
_INDEX = {name: index for index, name in enumerate(PARTS)}
_PREFILL, _DECODE, _MIXED = (PHASES.index(name) for name in ("prefill", "decode", "mixed"))
_NO_SHARE = 1e-9  # of a step: above what rounding leaves, below a token's share of any step


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
    window: Mapping[int, PhaseSums], kernels: Mapping[str, KernelEvidence] | None = None
) -> dict[str, Attribution]:
    """Attribute the time of steps, gaps before them included and idle time (`IDLE_COMPONENTS`) left out.

    Args:
        window: steps, by the index of their phase.
        kernels: by the phase of the steps that were seen.

    Returns:
        By phase; ``mixed`` is never among them. Over all phases the seconds sum to those of the steps.
    """
    phases = {index: _phase(index, steps, kernels or {}) for index, steps in window.items()}
    mixed = phases.pop(_MIXED, None)
    if mixed is not None:
        whole, prefill = mixed
        for index, part in ((_PREFILL, prefill), (_DECODE, whole - prefill)):
            own = phases.get(index)
            if own is not None:
                phases[index] = own[0] + part, own[1]
            elif part[-1] > _NO_SHARE:
                phases[index] = part, part
    result = {}
    for index in sorted(phases):
        *seconds, steps, _ = phases[index][0].tolist()
        label = PHASES[index]
        named = dict(zip(PARTS, seconds, strict=True))
        result[label] = Attribution(steps, sum(seconds), named, _age(label, mixed is not None, kernels))
    return result


def _phase(index: int, steps: PhaseSums, kernels: Mapping[str, KernelEvidence]) -> tuple[Floats, Floats]:
    """The parts of all steps of a phase, and of their prefill share: (parts + steps + rows,) each."""
    seen = kernels.get(PHASES[index])
    if seen is None:
        return steps.sums @ _TO_PARTS, steps.prefill @ _TO_PARTS
    rows = steps.rows()
    parts = rows @ _TO_PARTS
    unwatched = Unwatched(
        rows[:, INDEX["span"]],
        rows[:, INDEX["span"]] - rows[:, INDEX["sample_gap"]],
        rows[:, INDEX["floor"]],
        rows[:, INDEX["prompt_tokens"]] + rows[:, INDEX["decode_tokens"]],
    )
    parts[:, : len(PARTS)] = _with_kernels(parts[:, : len(PARTS)], unwatched, seen)
    return parts.sum(axis=0), prefill_share(rows) @ parts


def _to_parts() -> Floats:
    """(columns, parts + steps + rows): what each column of a step adds to."""
    matrix = np.zeros((len(COLUMNS), len(PARTS) + 2))
    for part, column in {
        "inefficiency": "inefficiency",
        "launch": "launch_gap",
        "host": "host_gap",
        "sample": "sample_gap",
        "communication": "communication",
        "transfer": "transfer",
        "remainder": "unattributed",
    }.items():
        matrix[INDEX[column], _INDEX[part]] = 1
    # What of the floor no operator explains stays in the remainder.
    for roof in ("memory", "compute"):
        matrix[INDEX[f"floor_{roof}"], _INDEX["remainder"]] = 1
        for name in OPERATORS:
            matrix[INDEX[f"{roof}.{name}"], _INDEX[f"{roof}.{name}"]] = 1
            matrix[INDEX[f"{roof}.{name}"], _INDEX["remainder"]] = -1
    matrix[INDEX["steps"], -2] = matrix[INDEX["rows"], -1] = 1
    return matrix


_TO_PARTS = _to_parts()


def _with_kernels(parts: Floats, steps: Unwatched, seen: KernelEvidence) -> Floats:
    """What windows saw, out of the remainder; what is then left of the span ran slower than its floor."""
    result, span_s = np.array(parts), steps.span_s
    left = np.clip(result[:, _INDEX["remainder"]], 0, None)
    before = np.array(left)
    for part, seconds in (
        ("launch", seen.launch_gaps(steps)),
        ("communication", seen.communication_ratio * span_s),
        ("transfer", seen.transfer_ratio * span_s),
    ):
        taken = np.clip(seconds - result[:, _INDEX[part]], 0, left)
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


def _age(label: str, mixed: bool, kernels: Mapping[str, KernelEvidence] | None) -> float | None:
    """How old the oldest window is that the phase's attribution leans on."""
    if not kernels:
        return None
    of = {label, "mixed"} if label in ("prefill", "decode") and mixed else {label}
    ages = [kernels[name].age_seconds for name in of if name in kernels]
    return max(ages) if ages else None


__all__ = ["IDLE_COMPONENTS", "OTHER_PARTS", "PARTS", "Attribution", "attribute"]
