"""Every threshold that a verdict or a pressure depends on: one frozen table, each row with its source.

Start points, most of them not calibrated; docs/verdicts.md shows the table and says what is proven.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_DESIGN = "llmprobe's definition"
_FIELD = "usual practice, not calibrated"
_MOST_SHOWN = 60  # characters of a value that is refused


class ThresholdError(ValueError):
    """An override is not allowed. The message is one line: key, value, what is allowed."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        named = key if key.isprintable() else repr(key)
        super().__init__(f"{named}={_brief(value)} is not allowed: {allowed}")
        self.key = key
        self.value = value
        self.allowed = allowed


def _brief(value: object) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        return f"({type(value).__name__})"
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"


def _instead(key: str, value: object, names: Collection[str]) -> str:
    """What may have been meant by a name that is none."""
    if isinstance(value, Mapping):
        return "they stand in no table, one `name = number` a line"
    if near := difflib.get_close_matches(key[:_MOST_SHOWN], names, 2):  # all names would fill a screen
        return f"perhaps {' or '.join(near)} is meant"
    return f"there are {', '.join(names)}"


@dataclass(frozen=True)
class Row:
    """One threshold as the documentation shows it."""

    name: str
    default: float
    lowest: float
    highest: float
    meaning: str
    source: str


def _at(default: float, lowest: float, highest: float, meaning: str, source: str = _FIELD) -> Any:
    """A field of `Thresholds`: its default, the values allowed, and what it decides."""
    told = {"lowest": lowest, "highest": highest, "meaning": meaning, "source": source}
    return dataclasses.field(default=default, metadata=told)


@dataclass(frozen=True)
class Thresholds:
    """The thresholds in force. Ratios unless the name carries another unit."""

    idle_steps: float = _at(50, 1, 100_000, "fewer steps of a phase in 10 s: `idle`", _DESIGN)
    idle_share_ratio: float = _at(
        0.5, 0.01, 1, "… unless its few steps fill this share of the window: then it is busy", _DESIGN
    )
    sync_gap_ratio: float = _at(
        0.20,
        0.01,
        0.99,
        "`sync_bound` from this share of pending time in which the device waited",
        "host time above a fifth of the total is called overhead in published studies",
    )
    memory_mbu_ratio: float = _at(
        0.50,
        0.05,
        1,
        "`memory_bound` from this MBU of busy time; below it bubbles cannot be excluded",
        "below 0.50 of the bandwidth practice looks for host or synchronisation overhead",
    )
    compute_mfu_ratio: float = _at(
        0.40,
        0.05,
        1,
        "`compute_bound` from this MFU of busy time",
        "tensor use under 0.40-0.50 in matrix products counts as poor",
    )
    dram_active_ratio: float = _at(
        0.70,
        0.05,
        1,
        "`memory_bound` from this reading of the DRAM counter",
        "DRAM above 0.70 counts as saturated",
    )
    tensor_active_ratio: float = _at(
        0.70, 0.05, 1, "`compute_bound` from this reading of the tensor counter", _FIELD
    )
    dram_idle_ratio: float = _at(
        0.30,
        0,
        0.99,
        "below it the DRAM counter speaks against `memory_bound`",
        "DRAM below 0.30 is not the limit",
    )
    balanced_intensity_ratio: float = _at(
        1.25, 1, 4, "`balanced` within this factor of the ridge, above it or below", _DESIGN
    )
    balanced_roof_ratio: float = _at(0.50, 0.05, 1, "… and from this MBU and this MFU", _DESIGN)
    near_roof_ratio: float = _at(
        0.10, 0, 0.9, "`near_roof` within this distance of what the device was measured to attain", _DESIGN
    )
    healthy_mbu_ratio: float = _at(
        0.70,
        0.05,
        1,
        "a memory-bound phase is healthy from this MBU of whole steps",
        "0.70-0.80 is called optimised",
    )
    healthy_mfu_ratio: float = _at(
        0.55, 0.05, 1, "a compute-bound phase is healthy from this MFU of whole steps"
    )
    above_peak_ratio: float = _at(
        1.10, 1, 10, "an MBU or MFU above this contradicts the clock or the peak: `unknown`", _DESIGN
    )
    counter_disagreement_ratio: float = _at(
        0.15,
        0.01,
        1,
        "a modelled MBU this far above the DRAM counter contradicts it: `unknown`; of a mixture of experts, "
        "where uneven routing explains it, the counter is taken for it",
        _DESIGN,
    )
    counter_agreement_ratio: float = _at(
        0.05,
        0,
        1,
        "a DRAM counter no further than this below the modelled MBU confirms it; the tensor counter an MFU; "
        "further below it, of a mixture of experts, it begins to count for more than the model",
        _DESIGN,
    )
    clock_disagreement_ratio: float = _at(
        0.20, 0.01, 1, "step spans this far from the kernels' own contradict the clock: `unknown`", _DESIGN
    )
    counter_phase_share_ratio: float = _at(
        0.90, 0.1, 1, "hardware counters speak for a phase that fills this share of the window", _DESIGN
    )
    kernel_age_seconds: float = _at(60, 1, 3600, "kernel windows older than this say nothing", _DESIGN)
    band_ratio: float = _at(
        0.10, 0, 0.5, "thresholds move this much in favour of the verdict that stands", _DESIGN
    )
    kv_usage_ratio: float = _at(
        0.90, 0.1, 1, "KV cache nearly full, with requests waiting", "0.90-0.95 is usual"
    )
    preemption_ratio: float = _at(0.01, 0, 1, "preemptions for each finished request")
    preemption_high_ratio: float = _at(0.05, 0, 1, "… from here it may take the headline")
    queue_share_ratio: float = _at(0.20, 0, 1, "share of TTFT that is spent in the queue")
    queue_share_high_ratio: float = _at(0.50, 0, 1, "… from here it may take the headline")
    queue_wait_seconds: float = _at(
        0.05,
        0,
        60,
        "mean wait below which queueing presses on nobody, whatever its share",
        "a request waits for the running step to end; half of the 0.1 s from which a delay is noticed",
    )
    starved_seconds: float = _at(
        10, 1, 600, "requests wait for so long while none has its first token", _DESIGN
    )
    token_budget_ratio: float = _at(
        0.95, 0.1, 1, "a step is full with this share of `max_num_batched_tokens`", _DESIGN
    )
    token_budget_steps_ratio: float = _at(
        0.50, 0.01, 1, "this share of prefill and mixed steps is full, with requests waiting", _DESIGN
    )
    thread_busy_ratio: float = _at(
        0.90, 0.1, 1, "one thread on this share of a core: it has no time left", _DESIGN
    )
    front_end_busy_ratio: float = _at(
        0.95,
        0.1,
        1,
        "one thread of a front end runs, or waits for a core, for this share of the time, with requests",
        _DESIGN,
    )
    output_lag_seconds: float = _at(
        0.1,
        0.001,
        3600,
        "mean time from the engine core's having outputs until the front end has handed them on",
        _DESIGN,
    )
    throttled_ratio: float = _at(
        0.05, 0, 1, "share of time that the container's CPU quota stopped it", _DESIGN
    )
    run_queue_ratio: float = _at(
        0.10, 0, 1, "share of time that a thread was runnable without a core", _DESIGN
    )
    involuntary_switches_per_second: float = _at(
        200, 1, 1e6, "times a second that others took the process's core", _DESIGN
    )
    major_faults_per_second: float = _at(5, 0, 1e6, "page faults that had to read from disk", _DESIGN)
    memory_pressure_ratio: float = _at(
        0.10, 0, 1, "share of time that tasks waited for memory (PSI)", _DESIGN
    )
    minor_faults_per_second: float = _at(
        100_000,
        1,
        1e8,
        "page faults that mapped memory without reading it",
        "about 1 µs each: a tenth of a core. vLLM on a CPU has 5000 to 10,000 under load",
    )
    cpu_pressure_ratio: float = _at(
        0.50,
        0.01,
        1,
        "share of time that tasks of the container, or the machine, waited for a core (PSI), "
        "unless the engine's own threads are known not to",
        _DESIGN,
    )
    numa_nodes: float = _at(
        2, 2, 1024, "NUMA nodes that the engine's threads may run on: explains nothing by itself", _DESIGN
    )

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        """The table."""
        return tuple(Row(field.name, field.default, **field.metadata) for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_mapping(cls, overrides: Mapping[str, object]) -> Thresholds:
        """The defaults with ``overrides``, by name.

        Raises:
            ThresholdError: a name is not in the table, or a value is no number in its range.
        """
        rows = {row.name: row for row in cls.rows()}
        values: dict[str, float] = {}
        for key, value in overrides.items():
            if (row := rows.get(key)) is None:
                raise ThresholdError(key, value, f"no such threshold; {_instead(key, value, rows)}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # No NaN lies in a range, and an integer of any size can be compared, though not made a float.
            if not number or not row.lowest <= value <= row.highest:  # type: ignore[operator]
                raise ThresholdError(key, value, f"a number from {row.lowest:g} to {row.highest:g}")
            values[key] = float(value)  # type: ignore[arg-type]
        return cls(**values)

    def favouring(self, bottleneck: str | None) -> Thresholds:
        """Moved by ``band_ratio`` in favour of the class that stands: noise at an edge moves nothing."""
        return _moved(self, bottleneck) if bottleneck in _EDGES else self


#: class → the thresholds that it is reached by
_EDGES: dict[str, tuple[str, ...]] = {
    "sync_bound": ("sync_gap_ratio",),
    "balanced": ("balanced_roof_ratio",),
    "memory_bound": ("memory_mbu_ratio", "dram_active_ratio"),
    "compute_bound": ("compute_mfu_ratio", "tensor_active_ratio"),
    "inefficient_kernels": (),
}


@functools.lru_cache(maxsize=64)  # the same few, for every phase of every rank
def _moved(limits: Thresholds, bottleneck: str) -> Thresholds:
    easier, harder = 1 - limits.band_ratio, 1 + limits.band_ratio
    moved = {name: getattr(limits, name) * easier for name in _EDGES[bottleneck]}
    if bottleneck != "sync_bound":
        moved["sync_gap_ratio"] = limits.sync_gap_ratio * harder
    if bottleneck == "balanced":
        moved["balanced_intensity_ratio"] = limits.balanced_intensity_ratio * harder
    if bottleneck == "inefficient_kernels":
        moved["memory_mbu_ratio"] = limits.memory_mbu_ratio * harder
        moved["compute_mfu_ratio"] = limits.compute_mfu_ratio * harder
    return dataclasses.replace(limits, **moved)
