"""What compute knows about step records: phase numbers and flags, as `llmprobe.record.layout` has them.

Repeated here so that compute needs nothing but arrays with the right field names; a test holds both equal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PHASES = ("prefill", "decode", "mixed", "draft", "dummy", "encode")
DRAFT = PHASES.index("draft")
DUMMY = PHASES.index("dummy")
ENCODE = PHASES.index("encode")

RESTARTED = 1  #: the gap before this step is not known
EMPTY = 4  #: no token was scheduled
NO_PARTS = 8  #: where the forward ended and sampling began was not stamped


def column(steps: np.ndarray, name: str) -> Floats:
    """A field of the step records as float64 (counts in a record are unsigned: differences would wrap)."""
    return steps[name].astype(np.float64)


def tokens(steps: np.ndarray) -> Floats:
    """Query tokens of each step."""
    return column(steps, "prompt_tokens") + column(steps, "decode_tokens")


def modelled(steps: np.ndarray) -> Bools:
    """Which steps ran the model that the facts describe: a draft model or an encoder is another one."""
    phase = steps["phase"]
    return np.asarray((phase != DRAFT) & (phase != ENCODE))


def sum_by_phase(phase: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Sum ``values`` (N,) by the label of ``phase`` (N,); phases that do not occur are absent."""
    sums = np.bincount(phase, weights=values, minlength=len(PHASES))
    present = np.bincount(phase, minlength=len(PHASES)) > 0
    return {label: float(sums[index]) for index, label in enumerate(PHASES) if present[index]}
