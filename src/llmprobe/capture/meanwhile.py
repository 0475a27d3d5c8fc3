"""The live figures of a capture's own seconds, by the step records of the processes that it recorded.

What a server shows is of 30 s, most of which lie before a short capture, perhaps under another load. The same
figures of the recorded steps alone can be held against what the capture saw.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.compute.accounting import account
from llmprobe.compute.evidence import KernelEvidence
from llmprobe.compute.facts import FactsError, ModelFacts
from llmprobe.compute.figures import summarise
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.lengthened import lengthened_ratios
from llmprobe.compute.sampled import apply_windows
from llmprobe.record.journal import JournalError
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import PHASES, STEP, Flag

#: Kernel windows older than this say nothing of a capture's steps; as for what is shown live.
_WINDOW_GOOD_SECONDS = 60.0
#: So much time before a recording says how long steps are without it.
_BEFORE_NS = 4 * 10**9
_SHOWN = ("steps", "seconds", "sync_gap_ratio", "sync_gap_is_lower_bound")
_EVIDENCE = tuple(field.name for field in dataclasses.fields(KernelEvidence))
_NEEDED = {field.name for field in dataclasses.fields(KernelEvidence) if field.default is dataclasses.MISSING}


def journal_steps(journal: Path, begin_ns: int, end_ns: int) -> np.ndarray:
    """The journal's records (of `STEP`) of the steps that ran in that time, as far as its ring has them.

    Raises:
        JournalError, OSError: it is gone, or none that this version reads.
    """
    reader = JournalReader(journal)
    try:
        parts = []
        while len(steps := reader.read().steps):
            parts.append(steps[(steps["e3"] > begin_ns) & (steps["e0"] < end_ns)])
    finally:
        reader.close()
    return np.concatenate(parts) if parts else np.empty(0, STEP)


def kept_steps(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    """By process: the step records that lie in a capture's folder as ``PREFIXname.npy``."""
    found = {}
    for path in sorted(folder.glob(f"{prefix}*.npy")):
        try:
            steps = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            continue
        if steps.dtype == STEP:
            found[path.stem.removeprefix(prefix)] = steps
    return found


def kept_bounds(folder: Path, prefix: str) -> dict[str, tuple[int, int]]:
    """By process: when it began and ended to record (CLOCK_MONOTONIC ns), as ``PREFIXname.json`` says."""
    found = {}
    for path in sorted(folder.glob(f"{prefix}*.json")):
        try:
            said = json.loads(path.read_text())
            found[path.stem.removeprefix(prefix)] = int(said["begin_ns"]), int(said["end_ns"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def read_steps(journals: Mapping[str, Path], begin_ns: int, end_ns: int) -> dict[str, np.ndarray]:
    """By process: as `journal_steps`; those whose journal cannot be read are left out."""
    found = {}
    for name, journal in journals.items():
        try:
            found[name] = journal_steps(journal, begin_ns, end_ns)
        except (JournalError, OSError):
            continue
    return found


@dataclass(frozen=True)
class Roofs:
    """What the floor of a process's steps is worked out with."""

    model: ModelFacts
    peaks: Peaks


def roofs(journals: Mapping[str, Path], before: Mapping[str, Any]) -> dict[str, Roofs]:
    """By process; those of which the model or the peaks are not known are left out.

    Args:
        journals: what each says of its model.
        before: ``{"server": …}`` with the server's entry in ``/api/status``, which says the peaks it used.
    """
    peaks = _peaks(before.get("server") or {})
    found = {}
    for name, journal in journals.items():
        if name not in peaks:
            continue
        try:
            reader = JournalReader(journal)
        except (JournalError, OSError):
            continue
        try:
            model = ModelFacts.from_json(reader.facts()["model"])
        except (FactsError, KeyError, TypeError):
            continue
        finally:
            reader.close()
        if not model.unmodelled:
            found[name] = Roofs(model, peaks[name])
    return found


def figures_of(
    steps: np.ndarray,
    kernels: Mapping[str, KernelEvidence],
    of: Roofs | None = None,
    within: tuple[int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """By phase: steps, seconds, sync-gap ratio and whether that is a bound, as shown live (`PhaseFigures`).

    Except that idle time before a step is a gap whether or not there were requests: a capture does not know
    of these, and the two are to be compared.

    Args:
        steps: records of one process, in the journal's order.
        kernels: what kernel windows saw of a phase.
        of: for the floor of the steps.
        within: when the process began and ended to record. Steps that it recorded in part are left out, as
            they are of the capture's ratio: in one of them it began, which holds an engine up.
    """
    steps = steps[(steps["flags"] & Flag.EMPTY == 0) & (steps["phase"] < len(PHASES))]
    if not len(steps):
        return {}
    always = np.array([[0, np.iinfo(np.int64).max]], dtype=np.int64)
    model, peaks = (None, None) if of is None else (of.model, of.peaks)
    rows = account(steps, cursor_ns=None, last_step=None, pending=always, model=model, peaks=peaks)
    if within is not None:
        rows = rows.take((steps["time"] >= within[0]) & (steps["e3"] <= within[1]))
        if not len(rows):
            return {}
    apply_windows(rows, kernels)
    found = summarise(rows, since_ns=int(rows.end_ns[0]) - 1, now_ns=int(rows.end_ns[-1]), peaks=peaks)
    return {
        phase: {name: getattr(figures, name) for name in _SHOWN}
        for phase, figures in found.items()
        if figures.seconds > 0
    }


def meanwhile(
    steps: Mapping[str, np.ndarray],
    before: Mapping[str, Any],
    earlier: Mapping[str, np.ndarray] | None = None,
    of: Mapping[str, Roofs] | None = None,
    within: Mapping[str, tuple[int, int]] | None = None,
    *,
    rough: bool = False,
) -> dict[str, Any]:
    """What `llmprobe.capture.compare` takes.

    ``rough``, and ``ranks``, each with ``name`` and ``figures`` by phase; ``lengthened_ratio`` among them is
    the share of the steps' time by which the recording itself made them longer, where that is known.

    Args:
        steps: as of `kept_steps` or `read_steps`.
        before: ``{"server": …}`` with the server's entry in ``/api/status`` when the recording began, which
            says what kernel windows had seen by then.
        earlier: records of the steps right before the recording, by the same names (`steps_before`).
        of: for the floors of steps, by the same names (`roofs`).
        within: when they recorded, by the same names (`kept_bounds`).
        rough: the steps were chosen by when the tool was told to begin and to end, not by when it recorded.
    """
    seen = _windows(before.get("server") or {})
    ranks = []
    for name, records in steps.items():
        figures = figures_of(records, seen.get(name, {}), (of or {}).get(name), (within or {}).get(name))
        then = (earlier or {}).get(name)
        longer = lengthened_ratios(records, then) if then is not None else {}
        for phase, ratio in longer.items():
            if phase in figures:
                figures[phase]["lengthened_ratio"] = ratio
        ranks.append({"name": name, "figures": figures})
    return {"ranks": ranks, "rough": rough}


def steps_before(
    journals: Mapping[str, Path], steps: Mapping[str, np.ndarray], begin_ns: int | None = None
) -> dict[str, np.ndarray]:
    """By process: the records of the `_BEFORE_NS` before the recording, as far as the journals have them.

    Args:
        journals: by the names of ``steps``.
        steps: the recorded ones.
        begin_ns: when the recording began; without it, as the first recorded step did on the host.
    """
    found: dict[str, np.ndarray] = {}
    for name, records in steps.items():
        if name in journals and len(records):
            begin = int(records["time"].min()) if begin_ns is None else begin_ns
            found |= read_steps({name: journals[name]}, begin - _BEFORE_NS, begin)
            if name in found:
                found[name] = found[name][found[name]["e3"] <= begin]
    return found


def _peaks(server: Mapping[str, Any]) -> dict[str, Peaks]:
    """By process, under both its names."""
    known = {field.name for field in dataclasses.fields(Peaks)}
    found: dict[str, Peaks] = {}
    for rank in server.get("ranks") or ():
        said = {name: value for name, value in (rank.get("peaks") or {}).items() if name in known}
        try:
            peaks = Peaks(**said)
        except TypeError:  # an agent of another version wrote it
            continue
        if not all(isinstance(rate, (int, float)) and rate > 0 for rate in _rates(peaks)):
            continue
        found |= dict.fromkeys(_names(rank), peaks)
    return found


def _rates(peaks: Peaks) -> tuple[float, float]:
    return peaks.bandwidth_bytes_per_second, peaks.flops_per_second


def _names(rank: Mapping[str, Any]) -> tuple[str, str]:
    """Both that a process may have (`llmprobe.capture.tool.Worker`)."""
    return f"rank{rank.get('rank')}", f"engine{rank.get('engine')}-rank{rank.get('rank')}"


def _windows(server: Mapping[str, Any]) -> dict[str, dict[str, KernelEvidence]]:
    """By process, under both its names."""
    found: dict[str, dict[str, KernelEvidence]] = {}
    ranks: Sequence[Mapping[str, Any]] = server.get("ranks") or ()
    for rank in ranks:
        shown = {phase: _evidence(said) for phase, said in (rank.get("kernels") or {}).items()}
        kernels = {
            phase: seen
            for phase, seen in shown.items()
            if seen is not None and seen.age_seconds <= _WINDOW_GOOD_SECONDS
        }
        found |= dict.fromkeys(_names(rank), kernels)
    return found


def _evidence(said: Mapping[str, Any]) -> KernelEvidence | None:
    """None where something is missing: an agent of another version may have written it."""
    known = {name: said[name] for name in _EVIDENCE if said.get(name) is not None}
    return KernelEvidence(**known) if known.keys() >= _NEEDED else None
