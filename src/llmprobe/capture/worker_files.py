"""What an engine process recorded, and the steps of its journal, as one file that may be looked at.

In a capture's folder lies, for each process, ``raw-NAME.torch`` or ``raw-NAME.kernels`` as the process wrote
it, ``raw-NAME.npy`` with step records and ``raw-NAME.json`` with clocks (`llmprobe.capture.asking`). From
them come ``torch-NAME.json.gz``, scrubbed, and ``kernels-NAME.npz``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.analysis import read_trace
from llmprobe.analysis.events import AnalysisError, Trace
from llmprobe.analysis.kernel_file import write_kernels
from llmprobe.analysis.kineto import OWN_PREFIX, RECORDED_UNTIL
from llmprobe.capture.asking import RAW_PREFIX
from llmprobe.capture.scrub import scrub
from llmprobe.capture.scrub_database import kernel_name
from llmprobe.record.demangle import demangled
from llmprobe.record.layout import PHASES, STEP, Clock, Flag
from llmprobe.record.window_file import WindowFileError, read_window

#: Both clocks agree to some ten microseconds: a step's first kernel may seem to begin a moment before it.
_SLACK_NS = 50_000
_FORWARD, _SAMPLE = "forward", "sample"
_RANGES = (*PHASES, _FORWARD, _SAMPLE)
_RANGE = np.dtype([("begin", "<i8"), ("end", "<i8"), ("name", "u1"), ("tokens", "<i8")])
#: Steps of a CPU device are shown in a row of their own.
_ROW = {"pid": 0, "tid": 0}


def finish_workers(folder: Path) -> list[tuple[str, Trace]]:
    """Make the files, and read them; what they were made of goes.

    Returns:
        The name of each process and what was recorded of it; empty if no process recorded anything.

    Raises:
        AnalysisError, ScrubError: a file cannot be used.
    """
    for raw in sorted(folder.glob(f"{RAW_PREFIX}*")):
        if raw.suffix not in (".torch", ".kernels"):
            continue
        name = raw.stem.removeprefix(RAW_PREFIX)
        facts, steps = _beside(raw)
        if raw.suffix == ".torch":
            _torch(raw, folder / f"torch-{name}.json.gz", facts, steps)
            if facts.get("stacks"):
                raw.replace(folder / f"torch-{name}.raw.json.gz")
        else:
            _kernels(raw, folder / f"kernels-{name}.npz", facts, steps)
        for left in (raw, raw.with_suffix(".json"), raw.with_suffix(".npy")):
            left.unlink(missing_ok=True)
    found = []
    for path in sorted((*folder.glob("torch-*.json.gz"), *folder.glob("kernels-*.npz"))):
        if not path.name.endswith(".raw.json.gz"):
            name = path.name.partition(".")[0].partition("-")[2]
            found.append((name, read_trace(path)))
    return found


def _beside(raw: Path) -> tuple[dict[str, Any], np.ndarray]:
    try:
        facts = json.loads(raw.with_suffix(".json").read_text())
        steps = np.load(raw.with_suffix(".npy"), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{raw.name}: what belongs to it cannot be read: {error}") from None
    if steps.dtype != STEP:
        raise AnalysisError(f"{raw.name}: the steps beside it are of another version")
    return facts, steps[steps["flags"] & Flag.EMPTY == 0]


def _kernels(raw: Path, target: Path, facts: dict[str, Any], steps: np.ndarray) -> None:
    try:
        window = read_window(raw).window
    except (OSError, WindowFileError) as error:
        raise AnalysisError(f"{raw.name}: cannot be used: {error}") from None
    header = {
        "version": str(facts.get("version", "")),
        "names": [kernel_name(demangled(name)) for name in window.names],
        "ranges": list(_RANGES),
        "devices": {
            str(number): facts.get("device", "") for number in np.unique(window.activities["device"])
        },
        "begin_ns": window.begin_ns,
        "end_ns": window.end_ns,
        "dropped": window.dropped,
    }
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write_kernels(draft, header, window.activities, ranges_of(steps, _SLACK_NS))
        draft.chmod(0o600)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _torch(raw: Path, target: Path, facts: dict[str, Any], steps: np.ndarray) -> None:
    on_device = bool(len(steps)) and int(steps["clock"][0]) == Clock.CUDA
    ranges = ranges_of(steps, _SLACK_NS if on_device else 0)
    to_real = _to_real(facts["clocks"])

    def events(base_ns: int) -> Iterator[dict[str, Any]]:
        until = (to_real(facts["end_ns"]) - base_ns) / 1000
        yield {"ph": "i", "s": "g", "name": RECORDED_UNTIL, **_ROW, "ts": until}
        for begin, end, name, tokens in ranges.tolist():
            at = to_real(begin)
            yield {
                "ph": "X",
                "cat": "gpu_user_annotation" if on_device else "user_annotation",
                "name": f"{OWN_PREFIX}{_RANGES[name]}",
                **_ROW,
                "ts": (at - base_ns) / 1000,
                "dur": max(to_real(end) - at, 0) / 1000,
                "args": {"tokens": tokens, "device": int(facts.get("index", 0))},
            }

    target.unlink(missing_ok=True)  # of an agent that was killed just then
    scrub(raw, target, further=events)


def _to_real(clocks: list[list[int]]) -> Callable[[int], int]:
    """From CLOCK_MONOTONIC to CLOCK_REALTIME, by both readings: the latter is slewed meanwhile."""
    (real, monotonic), (real_end, monotonic_end) = clocks[0], clocks[-1]
    rate = (real_end - real) / (monotonic_end - monotonic) if monotonic_end > monotonic else 1.0
    return lambda at: real + round((at - monotonic) * rate)


def ranges_of(steps: np.ndarray, slack_ns: int) -> np.ndarray:
    """The steps (of `STEP`) and their parts as ranges of the device, (N,) with begin, end, name and tokens.

    Args:
        slack_ns: how much earlier than its mark a step may begin, without reaching into the one before.
    """
    steps = steps[(steps["phase"] < len(PHASES)) & (steps["e3"] > steps["e0"])]
    steps = steps[np.argsort(steps["e0"], kind="stable")]
    if not len(steps):
        return np.empty(0, _RANGE)
    e0, e1, e2, e3 = (steps[name].astype(np.int64) for name in ("e0", "e1", "e2", "e3"))
    before = np.concatenate((e0[:1] - 2 * slack_ns, np.maximum.accumulate(e3)[:-1]))
    begin = e0 - np.clip((e0 - before) // 2, 0, slack_ns)
    tokens = steps["prompt_tokens"].astype(np.int64) + steps["decode_tokens"]
    whole = _rows(begin, e3, steps["phase"], tokens)
    parts = steps["flags"] & Flag.NO_PARTS == 0
    marked = parts & (e1 > e0) & (e1 <= e3)
    forward = _rows(begin[marked], e1[marked], _RANGES.index(_FORWARD), tokens[marked])
    sampled = parts & (e2 >= e1) & (e3 > e2) & (steps["flags"] & Flag.NO_SAMPLE == 0)
    sample = _rows(e2[sampled], e3[sampled], _RANGES.index(_SAMPLE), tokens[sampled])
    return np.concatenate((whole, forward, sample))


def _rows(begin: np.ndarray, end: np.ndarray, name: Any, tokens: np.ndarray) -> np.ndarray:
    rows = np.empty(len(begin), _RANGE)
    rows["begin"], rows["end"], rows["name"], rows["tokens"] = begin, end, name, tokens
    return rows
