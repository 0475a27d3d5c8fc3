"""What a change can gain at most, from the floor and the waits of the steps as they were measured.

Upper bounds: they take the change to work perfectly and everything else to stay as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.verdict import Verdict


@dataclass(frozen=True)
class Gain:
    """``seconds`` off a mean step, or ``throughput`` times the tokens per second; None: not in that form."""

    seconds: float | None
    throughput: float | None
    text: str


_LEAST_TIMES = 1.01  # what is less is not worth a word


def _step(figures: PhaseFigures) -> float:
    return figures.seconds / figures.steps


def _saved(seconds: float, figures: PhaseFigures) -> Gain | None:
    step = _step(figures)
    if seconds <= 0 or step <= 0:
        return None
    seconds = min(seconds, step)
    return Gain(
        seconds,
        None,
        f"at most {seconds * 1e3:.2f} ms of a step's {step * 1e3:.2f} ms ({seconds / step:.0%})",
    )


def _memory(figures: PhaseFigures, *operators: str) -> float:
    floors = figures.operator_floors
    return sum(floors[name][0] for name in operators if name in floors) / figures.steps


def _stall(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    return _saved(verdict.wait_seconds.get(verdict.cause or "", 0.0), figures)


def _headroom(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    return _saved(verdict.headroom_seconds or 0.0, figures)


def _half_weights(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    return _saved(_memory(figures, "linear", "experts", "head") / 2, figures)


def _half_kv(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    return _saved(_memory(figures, "attention") / 2, figures)


def _half_compute(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    return _saved(figures.components.get("floor_compute", 0.0) / figures.steps / 2, figures)


def _half_precision(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    """All of the compute floor: how much faster 16-bit products are depends on the device."""
    memory, compute = (figures.components.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
    return _saved((memory / 2 + compute) / figures.steps, figures)


def _half_floor(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    memory, compute = (figures.components.get(f"floor_{roof}", 0.0) for roof in ("memory", "compute"))
    return _saved((memory + compute) / figures.steps / 2, figures)


def _batch(verdict: Verdict, figures: PhaseFigures) -> Gain | None:
    """Twice the tokens a step for weights that are read once: 2 ÷ (2 - their share of the step)."""
    share = min(_memory(figures, "linear", "experts", "head") / _step(figures), 1.0)
    times = 2 / (2 - share)
    if times < _LEAST_TIMES:
        return None
    return Gain(None, times, f"at most {times:.2f} times the tokens per second, for twice the batch")


GAINS: dict[str, Callable[[Verdict, PhaseFigures], Gain | None]] = {
    "stall": _stall,
    "headroom": _headroom,
    "half_weights": _half_weights,
    "half_kv": _half_kv,
    "half_compute": _half_compute,
    "half_precision": _half_precision,
    "half_floor": _half_floor,
    "batch": _batch,
}
