"""Records of CUPTI's activity API as they lie in memory, and what llmprobe keeps of each.

How they lie there is published with CUPTI (``cupti_activity.h``). The fields used here have stood at the same
offsets since CUDA 9; how long a record is changes with the version, so that is measured: CUPTI itself tells
where the next record begins (`Records`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

KERNEL, COPY, SET = 0, 1, 2

#: CUpti_ActivityKind → kind of an `ACTIVITY`. CONCURRENT_KERNEL: the kind that does not serialise kernels.
KINDS = {10: KERNEL, 1: COPY, 2: SET}
_OFFSETS = {
    KERNEL: {"begin": 16, "end": 24, "device": 40, "stream": 48, "name": 104},
    COPY: {"begin": 16, "end": 24, "device": 32, "stream": 40, "copy_kind": 4},
    SET: {"begin": 16, "end": 24, "device": 32, "stream": 40},
}
_FORMATS = {"begin": "<u8", "end": "<u8", "device": "<u4", "stream": "<u4", "name": "<u8", "copy_kind": "u1"}
#: CUpti_ActivityMemcpyKind, by number.
COPY_NAMES = {
    1: "HtoD", 2: "DtoH", 3: "HtoA", 4: "AtoH", 5: "AtoA", 6: "AtoD", 7: "DtoA", 8: "DtoD", 9: "HtoH",
    10: "PtoP",
}  # fmt: skip

#: One kernel, copy or set. Times are nanoseconds of CLOCK_MONOTONIC; ``name`` indexes the window's names.
ACTIVITY = np.dtype(
    [("begin", "<i8"), ("end", "<i8"), ("name", "<u4"), ("stream", "<u4"), ("device", "u1"), ("kind", "u1")]
)

_SUCCESS, _MAX_LIMIT_REACHED = 0, 12


@dataclass(frozen=True)
class Window:
    """What ran on the devices of this process while a window was open.

    Kernels that were launched before ``begin_ns`` may be missing, and so may be what ended after ``end_ns``.
    ``dropped``: records were lost because the buffers were full, or have no times; the window then says
    nothing.
    """

    begin_ns: int
    end_ns: int
    activities: np.ndarray  # (N,) of `ACTIVITY`
    names: list[str]
    dropped: int


class Names:
    """Kernel names by the pointer that a record carries; each is read once a window."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._index: dict[Any, int] = {}

    def of_pointers(self, pointers: np.ndarray) -> np.ndarray:
        """(N,) indices of names."""
        distinct, inverse = np.unique(pointers, return_inverse=True)
        indices = [self._add(pointer, self._read) for pointer in distinct.tolist()]
        return np.array(indices, dtype=np.uint32)[inverse]

    def of_copies(self, kinds: np.ndarray) -> np.ndarray:
        """(N,) likewise, for copies."""
        distinct, inverse = np.unique(kinds, return_inverse=True)
        indices = [self._add(("copy", kind), self._copy) for kind in distinct.tolist()]
        return np.array(indices, dtype=np.uint32)[inverse]

    def of_sets(self, count: int) -> np.ndarray:
        """(N,) likewise, for sets."""
        return np.full(count, self._add(("set",), lambda _: "memset"), dtype=np.uint32)

    def _add(self, key: Any, read: Any) -> int:
        known = self._index.get(key)
        if known is None:
            known = self._index[key] = len(self.names)
            self.names.append(read(key))
        return known

    @staticmethod
    def _read(pointer: int) -> str:
        return ctypes.string_at(pointer).decode(errors="replace") if pointer else ""

    @staticmethod
    def _copy(key: tuple[str, int]) -> str:
        return f"memcpy {COPY_NAMES.get(key[1], 'other')}"


class Records:
    """The records of a buffer as arrays, by how long a record of each kind is."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._size: dict[int, int] = {}  # CUpti_ActivityKind → bytes

    def forget(self) -> None:
        """Measure anew: cheap, and another version's records must never be taken for this one's."""
        self._size.clear()

    def decode(self, buffer: np.ndarray, valid: int, names: Names) -> list[np.ndarray]:
        """The records of one buffer as arrays of `ACTIVITY`, times still in CUPTI's clock."""
        found, at = [], 0
        while at + 4 <= valid:
            kind = int(buffer[at : at + 4].view("<u4")[0])
            size = self._size.get(kind) or self._measure(buffer, at, valid, kind)
            if size <= 0:
                break
            count = self._run(buffer, at, valid, kind, size)
            if not count:  # cut off
                break
            if kind in KINDS:
                found.append(_rows(buffer[at : at + count * size], size, KINDS[kind], names))
            at += count * size
        return found

    @staticmethod
    def _run(buffer: np.ndarray, at: int, valid: int, kind: int, size: int) -> int:
        """How many records of the same kind follow each other from ``at`` on."""
        most = (valid - at) // size
        kinds = np.ndarray((most,), "<u4", buffer[at:].data, 0, (size,))
        # A longer record's inside may look like a short one's kind, but the first that differs ends the run,
        # and `_measure` has asked CUPTI itself where the second begins.
        differs = np.flatnonzero(kinds != kind)
        return int(differs[0]) if len(differs) else most

    def _measure(self, buffer: np.ndarray, at: int, valid: int, kind: int) -> int:
        record = ctypes.c_void_p(int(buffer.ctypes.data) + at)
        status = self._library.cuptiActivityGetNextRecord(
            ctypes.c_void_p(int(buffer.ctypes.data)), ctypes.c_size_t(valid), ctypes.byref(record)
        )
        if status == _MAX_LIMIT_REACHED:  # the last one
            size = valid - at
        elif status == _SUCCESS and record.value is not None:
            size = record.value - int(buffer.ctypes.data) - at
        else:
            return 0
        if size > 0 and status == _SUCCESS:
            self._size[kind] = size
        return size


def untimed(rows: np.ndarray) -> np.ndarray:
    """Which of these have no times, by CUPTI's clock: never run, or run without being timed."""
    return np.asarray((rows["begin"] == 0) | (rows["end"] < rows["begin"]))


def _rows(raw: np.ndarray, size: int, kind: int, names: Names) -> np.ndarray:
    offsets = _OFFSETS[kind]
    dtype = np.dtype(
        {
            "names": list(offsets),
            "formats": [_FORMATS[name] for name in offsets],
            "offsets": list(offsets.values()),
            "itemsize": size,
        }
    )
    records = raw.view(dtype)
    rows = np.empty(len(records), ACTIVITY)
    for name in ("begin", "end", "stream"):
        rows[name] = records[name]
    rows["device"] = np.minimum(records["device"], 255)
    rows["kind"] = kind
    if kind == KERNEL:
        rows["name"] = names.of_pointers(records["name"])
    elif kind == COPY:
        rows["name"] = names.of_copies(records["copy_kind"])
    else:
        rows["name"] = names.of_sets(len(records))
    return rows
