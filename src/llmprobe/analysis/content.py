"""What a report consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmprobe.analysis.events import HostOperator, Source
from llmprobe.analysis.findings import Finding
from llmprobe.analysis.trust import Trust


@dataclass(frozen=True)
class Gpu:
    """One GPU over the recording."""

    name: str
    seconds: float
    busy_ratio: float
    idle_ratio: float
    busy_seconds: float
    exposed_communication_seconds: float
    exposed_transfer_seconds: float
    #: idle time in which the next work had not been launched; None where launches were not recorded
    unlaunched_idle_seconds: float | None
    back_to_back_idle_seconds: float  #: idle time in gaps below 1 µs, which the device itself takes
    kernels: int
    copies: int
    sets: int
    graphs: int


@dataclass(frozen=True)
class PhaseRow:
    """All steps of a phase on one GPU, or one part of each of them.

    Where nothing on a GPU can be led back to the ranges, the figures of the device are None.
    """

    name: str
    part: str | None
    gpu: str | None
    steps: int
    tokens: int | None
    host_seconds: float  #: how long the ranges lasted on the host, together
    seconds: float | None  #: device time from the first to the last activity of each step, together
    busy_ratio: float | None  #: of these seconds
    idle_ratio: float | None
    gap_seconds: float | None  #: idle time before the steps; requests may not have been waiting in all of it
    sync_gap_ratio: float | None  #: (gaps + idle + exposed) ÷ (gaps + seconds): an upper bound, as said above
    cut_steps: int  #: of the steps, those that the recording has in part only: it began or ended in them
    #: as `sync_gap_ratio`, of steps that are not cut and without gaps below 1 µs, as live figures are
    comparable_sync_gap_ratio: float | None


@dataclass(frozen=True)
class OperatorRow:
    """All kernels of a class; the share is of the summed time of everything that ran on the devices."""

    name: str
    share: float
    count: int
    seconds: float
    mean_seconds: float


@dataclass(frozen=True)
class KernelRow(OperatorRow):
    """All kernels of one name, copies of one kind, or whole graphs."""

    operator: str


@dataclass(frozen=True)
class GapRow:
    """One idle time between two activities of a GPU."""

    gpu: str
    begin_seconds: float  #: since the first window's begin
    seconds: float
    before: str
    after: str
    unlaunched_seconds: float | None  #: of it, until the work that ended it was launched
    phase: str | None  #: of the step that ended it
    in_step: bool | None  #: whether what ran before it belongs to the same step


@dataclass(frozen=True)
class Content:
    """Everything an analysis says about one recording."""

    source: Source
    trust: Trust
    gpus: list[Gpu]
    phases: list[PhaseRow]
    operators: list[OperatorRow]
    kernels: list[KernelRow]
    gaps: list[GapRow]
    findings: list[Finding]
    host_operators: list[HostOperator] = field(default_factory=list)
