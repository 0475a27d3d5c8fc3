"""Kernels, copies and sets as CUPTI's activity API records them, through ctypes in the engine's process.

Uses the ``libcupti`` that torch already loaded; loads none itself. Nothing here runs on the step path, but
CUPTI asks for a buffer in whatever thread launches a kernel when the last one is full: `_Buffers.requested`
only takes one from a list.

What it writes into them is read by `llmprobe.record.cupti_records`.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.record import cupti_clock
from llmprobe.record.cupti_memory import Recorded
from llmprobe.record.cupti_records import ACTIVITY, KERNEL, KINDS, Names, Records, Window, untimed

BUFFER_BYTES = 4 << 20  #: holds about 19 000 kernels
MOST_BUFFERS = 8  #: for one recording
_ALIGNMENT = 8
_LIBRARY = re.compile(r"/libcupti\.so(\.[\d.]+)?$")
_INJECTED = re.compile(r"/lib(ToolsInjection64|cuda-injection)\.so[\d.]*$")
_MAPS = Path("/proc/self/maps")
_SUCCESS = 0
#: Kernels that had not run when a window closed have no times: of four steps as many as three, where the host
#: runs ahead. If it is more than this of all kernels, CUPTI is at its limit (`llmprobe.record.cupti_memory`),
#: or stamps them by a clock that nobody knows.
_MOST_NOWHERE_RATIO = 0.9
#: What ran until CUPTI had been told to stop is in its records too; that takes milliseconds. And what one
#: recording left may come in the next.
_LATEST_NS, _EARLIEST_NS = 10 * 10**9, 3600 * 10**9
_OLDEST_VERSION = 12  # CUDA 10: `cupti_records` holds from there on

_Requested = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_Completed = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


#: Held by whoever records through CUPTI in this process, a torch profiler of ours included. Only ever tried,
#: or waited for by threads of our own.
IN_USE = threading.Lock()


class CuptiError(Exception):
    """CUPTI is not there, or refused; the message says what to do."""


class Cupti:
    """One window at a time: `open`, then `close`. Once opened it has to live as long as the process."""

    def __init__(self) -> None:
        """Raises CuptiError if this process has no usable libcupti."""
        path = loaded_library()
        if path is None:
            raise CuptiError("no libcupti is loaded in this process: its torch was built without it")
        try:
            self._library: Any = ctypes.CDLL(path)
            version = ctypes.c_uint32()
            self._check("cuptiGetVersion", ctypes.byref(version))
        except (OSError, AttributeError) as error:
            raise CuptiError(f"{path} cannot be used: {error}") from None
        self.version = int(version.value)
        if self.version < _OLDEST_VERSION:
            raise CuptiError(f"CUPTI's API version {self.version} is older than {_OLDEST_VERSION} (CUDA 10)")
        self._buffers = _Buffers()
        self._records = Records(self._library)
        self._enabled: list[int] = []
        self._begin_ns = 0
        self._opened = cupti_clock.Reading(0, 0, 0, 0)
        self._names = Names()
        self._parts: list[np.ndarray] = []
        self._requested = _Requested(self._buffers.requested)
        self._completed = _Completed(self._buffers.completed)

    @property
    def filling(self) -> bool:
        """Whether the window should be closed now, before its buffers are full."""
        return self._buffers.left <= 1

    def open(self) -> None:
        """Record from now on. Raises CuptiError if something else holds CUPTI."""
        self._buffers.reset()
        self._records.forget()
        self._names, self._parts = Names(), []
        # Each time anew: whatever profiler ran since then had its own.
        self._check("cuptiActivityRegisterCallbacks", self._requested, self._completed)
        if self.filling:
            self._check("cuptiActivityFlushAll", ctypes.c_uint32(1))
            self._buffers.reset()
            if self.filling:
                raise CuptiError(
                    f"CUPTI gave back none of {self._buffers.held} buffers of earlier recordings"
                )
        try:
            for kind in KINDS:
                self._check("cuptiActivityEnable", ctypes.c_int(kind))
                self._enabled.append(kind)
            self._opened = cupti_clock.read(self._now)
        except BaseException:  # nobody closes what did not open
            self._disable()
            raise
        self._begin_ns = time.monotonic_ns()

    def drain(self) -> int:
        """Take what full buffers hold, so that a long recording goes on; returns how many rows there are.

        Takes milliseconds; not for the step path.
        """
        self._check("cuptiActivityFlushAll", ctypes.c_uint32(0))
        self._take()
        return sum(map(len, self._parts))

    def close(self) -> Window:
        """Stop recording and return what ran. Takes milliseconds; not for the step path.

        CUPTI stays attached to the process, which makes each launch of a CUDA graph dearer from then on
        (docs/decisions/kernel-windows.md). ``cuptiFinalize`` would detach it, but while kernels are in flight
        it ends the process with a memory fault of the device.
        """
        end_ns = time.monotonic_ns()
        self._disable()
        self._check("cuptiActivityFlushAll", ctypes.c_uint32(1))
        self._take()
        parts, self._parts = self._parts, []
        activities = np.concatenate(parts) if parts else np.zeros(0, ACTIVITY)
        begin = activities["begin"]
        timed = activities["end"] >= begin
        elsewhere = (begin > end_ns + _LATEST_NS) | (begin < self._begin_ns - _EARLIEST_NS)
        kept = activities[(begin >= self._begin_ns) & timed & ~elsewhere]  # not what is left from before
        kernels = activities["kind"] == KERNEL
        dropped, nowhere = self._buffers.refused, int((kernels & (elsewhere | ~timed)).sum())
        if nowhere > _MOST_NOWHERE_RATIO * kernels.sum():
            dropped += nowhere
        activities = kept[np.argsort(kept["begin"], kind="stable")]
        return Window(self._begin_ns, end_ns, activities, self._names.names, dropped)

    def _take(self) -> None:
        now = cupti_clock.read(self._now)
        taken = self._buffers.take()
        try:
            for _, buffer, valid in taken:
                for part in self._records.decode(buffer, valid, self._names):
                    if part["kind"][0] == KERNEL:
                        Recorded.kernels += len(part)
                    never = untimed(part)
                    for name in ("begin", "end"):
                        part[name] = cupti_clock.monotonic_ns(part[name], self._opened, now)
                    part["end"][never] = part["begin"][never] - 1  # wherever no time at all may lie
                    self._parts.append(part)
        finally:  # what cannot be read is no reason to have fewer
            for address, _, _ in taken:
                self._buffers.free(address)

    def _disable(self) -> None:
        while self._enabled:
            self._library.cuptiActivityDisable(ctypes.c_int(self._enabled.pop()))

    def _now(self) -> int:
        stamp = ctypes.c_uint64()
        self._check("cuptiGetTimestamp", ctypes.byref(stamp))
        return stamp.value

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != _SUCCESS:
            text = ctypes.c_char_p()
            self._library.cuptiGetResultString(ctypes.c_int(status), ctypes.byref(text))
            said = text.value.decode(errors="replace") if text.value else f"status {status}"
            raise CuptiError(f"{function} refused: {said}")


class _Process:
    """See `of_process`."""

    cupti: Cupti | None = None
    making = threading.Lock()


def of_process() -> Cupti:
    """This process's one, made when it is first asked for and then kept. Raises CuptiError.

    CUPTI calls what was registered, and writes into buffers that it was given, for as long as the process
    lives, also between recordings. And one that was given in a window may come back in a capture.
    """
    with _Process.making:
        if _Process.cupti is None:
            _Process.cupti = Cupti()
            # Not even when Python takes itself down: memory that CUPTI may write into has to stay.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(_Process.cupti))
        return _Process.cupti


class _Buffers:
    """The memory that CUPTI writes into, made when first asked for, then kept.

    `MOST_BUFFERS` for a recording, beside what CUPTI still holds of those before, up to as many: another
    profiler may have been given them, and does not give them back.
    """

    def __init__(self) -> None:
        self._made: dict[int, np.ndarray] = {}  # by address
        self._free: list[int] = []
        self._full: list[tuple[int, int]] = []
        self._most = MOST_BUFFERS
        self.refused = 0

    @property
    def held(self) -> int:
        """How many CUPTI has not given back."""
        return len(self._made) - len(self._free)

    @property
    def left(self) -> int:
        """How many CUPTI may still ask for."""
        return self._most - self.held

    def reset(self) -> None:
        """Nothing is recorded yet."""
        for address, _, _ in self.take():
            self.free(address)
        self._most = MOST_BUFFERS + min(self.held, MOST_BUFFERS)
        self.refused = 0

    def requested(self, buffer: Any, size: Any, most_records: Any) -> None:
        """CUPTI wants a buffer. Runs in any thread, also the engine's."""
        most_records[0] = 0
        try:
            address = self._free.pop()
        except IndexError:
            address = self._make()
        if address:
            buffer[0], size[0] = address, BUFFER_BYTES
        else:  # CUPTI drops what it has no room for
            self.refused += 1
            buffer[0], size[0] = None, 0

    def completed(self, context: Any, stream: int, buffer: int, size: int, valid: int) -> None:
        """A buffer is full, or flushed. Runs in any thread."""
        self._full.append((buffer, valid))

    def take(self) -> list[tuple[int, np.ndarray, int]]:
        """Address, buffer and how many of its bytes are valid; each is to be given back with `free`."""
        full = []
        while self._full:  # while a recording goes on, another thread may add one at any moment
            full.append(self._full.pop(0))
        # Another profiler's may come back to who was registered last.
        return [(address, self._made[address], valid) for address, valid in full if address in self._made]

    def free(self, address: int) -> None:
        """CUPTI may have this one again."""
        self._free.append(address)

    def _make(self) -> int:
        if len(self._made) >= self._most:
            return 0
        try:
            memory = np.empty(BUFFER_BYTES + _ALIGNMENT, dtype=np.uint8)
        except MemoryError:  # nothing may be raised into CUPTI
            return 0
        skip = -memory.ctypes.data % _ALIGNMENT
        memory = memory[skip : skip + BUFFER_BYTES]
        self._made[memory.ctypes.data] = memory
        return int(memory.ctypes.data)


def loaded_library(maps: Path = _MAPS) -> str | None:
    """The path of the libcupti that this process has loaded; None if it has none."""
    return next((path for path in _loaded(maps) if _LIBRARY.search(path)), None)


def _loaded(maps: Path) -> Iterator[str]:
    """Paths of the libraries of this process that are of interest here."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        if ("libcupti" in line or "njection" in line) and line.count(" ") >= 5:
            yield line.split(maxsplit=5)[5]


def injected(environ: dict[str, str] | None = None, maps: Path = _MAPS) -> str | None:
    """What tells that a tool was injected into this process and holds CUPTI; None if nothing does.

    A variable that is set, or a library of nsys or ncu that is loaded: launchers clear variables.
    """
    environ = dict(os.environ) if environ is None else environ
    for name in (
        "CUDA_INJECTION64_PATH",
        "CUDA_INJECTION32_PATH",
        "NSYS_PROFILING_SESSION_ID",
        "NVTX_INJECTION64_PATH",
    ):
        if environ.get(name):
            return f"{name} is set"
    path = next((path for path in _loaded(maps) if _INJECTED.search(path)), None)
    return None if path is None else f"{Path(path).name} is loaded"
