"""What ran on the devices and what the host was doing meanwhile, whatever tool recorded it.

Columns are numpy arrays of equal length, times are nanoseconds on one clock of the recording. Names are
indices into `Trace.names`, devices into `Trace.devices`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmprobe.compute.intervals import Intervals

Ints = NDArray[np.int64]

#: What an activity is. A graph is a whole CUDA graph recorded as one, its kernels unseen.
KERNEL, COPY, SET, GRAPH = range(4)
KINDS = ("kernel", "copy", "set", "graph")
#: A time, thread or number of bytes that the recording does not tell.
UNKNOWN = -1

#: What a sane file stays below: the year 2096, a month, a step's tokens, a copy. Sums then fit their type.
LATEST_NS, LONGEST_NS, MOST_TOKENS, MOST_BYTES = 4 * 10**18, 26 * 10**14, 1 << 40, 1 << 50
#: nsys counts from the begin of its session, and gives CUDA graphs that began before it.
EARLIEST_NS = -60 * 10**9

#: No machine has more.
MAX_GPUS = 1024


class AnalysisError(Exception):
    """A file cannot be analysed; the message is one line that names it and says what to do."""

    def __init__(self, message: str) -> None:
        # Names of files are bytes of somebody's choice, and what libraries say holds pieces of the file.
        super().__init__(printable(message))


@dataclass(frozen=True)
class Source:
    """The file and the tool that wrote it."""

    path: str
    tool: str  #: ``nsys``, ``torch`` or ``kernels``
    format: str  #: ``nsys-sqlite``, ``nsys-rep``, ``kineto-json`` or ``kernels-npz``
    version: str = ""


@dataclass(frozen=True)
class Activities:
    """Kernels, copies, sets and whole graphs on the devices, in order of their begin."""

    begin_ns: Ints
    end_ns: Ints
    kind: Ints
    device: Ints
    name: Ints
    launched_ns: Ints  #: when the host call that launched it was entered, or `UNKNOWN`
    thread: Ints  #: the host thread that launched it, or `UNKNOWN`
    moved_bytes: Ints  #: of copies and sets, else 0

    def __len__(self) -> int:
        return len(self.begin_ns)

    def where(self, chosen: Any) -> Activities:
        """The rows that ``chosen`` (a mask or indices) picks."""
        return Activities(*(getattr(self, column)[chosen] for column in self.__dataclass_fields__))


@dataclass(frozen=True)
class Spans:
    """Named times of host threads: marked ranges, or calls into CUDA."""

    begin_ns: Ints
    end_ns: Ints  #: `UNKNOWN` where the recording ended before the range did, and for calls of nsys files
    name: Ints
    thread: Ints
    value: Ints  #: a range's payload, or `UNKNOWN`

    def __len__(self) -> int:
        return len(self.begin_ns)

    def where(self, chosen: Any) -> Spans:
        """The rows that ``chosen`` (a mask or indices) picks."""
        return Spans(*(getattr(self, column)[chosen] for column in self.__dataclass_fields__))


def no_activities() -> Activities:
    """Nothing ran."""
    return Activities(*(np.empty(0, dtype=np.int64) for _ in Activities.__dataclass_fields__))


def no_spans() -> Spans:
    """Nothing was marked."""
    return Spans(*(np.empty(0, dtype=np.int64) for _ in Spans.__dataclass_fields__))


@dataclass(frozen=True)
class HostOperator:
    """One operator of a framework on the host: ``seconds`` with what it calls, ``self_seconds`` without."""

    name: str
    count: int
    seconds: float
    self_seconds: float


@dataclass(frozen=True)
class Trace:
    """One recording."""

    source: Source
    names: list[str]
    devices: list[str]  #: as shown, for example ``GPU 0 (NVIDIA H100 80GB HBM3)``
    activities: Activities
    ranges: Spans  #: llmprobe's own ranges, or an engine's that mean the same; other ranges are left out
    calls: Spans  #: calls into the CUDA runtime and driver
    #: Steps, and parts of them, as the journal's device clock saw them: what began on the device in one
    #: belongs to it. ``thread`` is the device. They count before ``ranges``.
    device_ranges: Spans = field(default_factory=no_spans)
    host_operators: list[HostOperator] = field(default_factory=list)
    recorded: Intervals | None = None  #: (1, 2): when the tool recorded, if it says so
    #: (devices,): which of several recordings each is from, each of its own seconds; None: all of one
    recordings: Ints | None = None
    lost: list[str] = field(default_factory=list)  #: what the tool says about events it lost
    implausible: int = 0  #: activities left out because no clock gives their times
    cuda_traced: bool = True  #: whether the tool was asked for CUDA at all, as far as the file tells


def plausible(activities: Activities) -> tuple[Activities, int]:
    """The rows whose times a clock can give, and how many others there are."""
    lasting = activities.end_ns - activities.begin_ns
    fine = (
        (activities.begin_ns >= EARLIEST_NS)
        & (activities.begin_ns <= LATEST_NS)
        & (lasting >= 0)
        & (lasting <= LONGEST_NS)
    )
    if fine.all():
        return activities, 0
    return activities.where(fine), int((~fine).sum())


def plausible_spans(spans: Spans) -> Spans:
    """The rows whose times a clock can give; a payload that counts nothing is `UNKNOWN`."""
    lasting = spans.end_ns - spans.begin_ns
    fine = (spans.begin_ns >= 0) & (spans.begin_ns <= LATEST_NS)
    fine &= ((lasting >= 0) & (lasting <= LONGEST_NS)) | (spans.end_ns == UNKNOWN)
    kept = spans if fine.all() else spans.where(fine)
    value = np.where((kept.value >= 0) & (kept.value <= MOST_TOKENS), kept.value, UNKNOWN)
    return Spans(kept.begin_ns, kept.end_ns, kept.name, kept.thread, value)


def by_begin(activities: Activities) -> Activities:
    """The same in order of begin (and end)."""
    if len(activities) and (np.diff(activities.begin_ns) < 0).any():
        return activities.where(np.lexsort((activities.end_ns, activities.begin_ns)))
    return activities


def label_devices(number: Ints, names: dict[int, str], path: Path) -> tuple[Ints, list[str]]:
    """Each activity's GPU as an index, and how each GPU is shown; too many for any machine are damage."""
    distinct, index = np.unique(number, return_inverse=True)
    if len(distinct) > MAX_GPUS:
        raise AnalysisError(f"{path}: damaged: activities on {len(distinct)} different GPUs")
    labels = [f"GPU {one} ({names[one]})" if names.get(one) else f"GPU {one}" for one in distinct.tolist()]
    return index.astype(np.int64), labels


def printable(text: str) -> str:
    """``text`` of an untrusted file without control characters, at most 4096 characters long."""
    return "".join(char if char.isprintable() else "�" for char in text[:4096])
