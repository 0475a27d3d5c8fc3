"""Every kernel, copy and set of some seconds, through CUPTI: `llmprobe.record.kernels` at length, once."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np

from llmprobe.record.cupti import Cupti, CuptiError, loaded_library, of_process
from llmprobe.record.cupti_memory import captures_spent
from llmprobe.record.cupti_records import ACTIVITY, Window
from llmprobe.record.kernels import forbidden, profiling
from llmprobe.record.latch import Latch, ending
from llmprobe.record.recorder import Recorder
from llmprobe.record.room import Room
from llmprobe.record.window_file import FOLDER, Seen, next_number, window_path, write_window

#: 26 bytes each, held in memory and then in shared memory until the agent has fetched them.
MOST_ACTIVITIES = 1_000_000
#: Besides them, for the names of kernels.
_NAMES_BYTES = 1 << 20
#: Buffers hold about 150 000 kernels; the fastest engine launches less than that in a second.
_DRAIN_SECONDS = 0.2
#: What the live verdict gets of a capture: as much as of a long window, from its beginning, because the steps
#: right before tell how much the recording itself slows those in it.
_VERDICT_NS = 1_000_000_000
_VERDICT_ACTIVITIES = 150_000


def beginning(window: Window) -> Window:
    """The part of a window that the agent works out like any kernel window."""
    rows, end = window.activities, window.begin_ns + _VERDICT_NS
    if len(rows) > _VERDICT_ACTIVITIES:
        end = min(end, int(rows["begin"][_VERDICT_ACTIVITIES]))
    if end >= window.end_ns:
        return window
    kept = rows[: int(np.searchsorted(rows["begin"], end))]
    return Window(window.begin_ns, end, kept, window.names, window.dropped)


def unavailable(recorder: Recorder) -> str | None:
    """Why no kernels can be recorded in this process; None if they can."""
    if recorder.facts.get("clock") != "cuda":
        return "kernels are seen on CUDA devices only, and this process drives none"
    if loaded_library() is None:
        return "no libcupti is loaded in this process: its torch was built without it"
    return captures_spent() or forbidden(recorder)


class KernelTrace:
    """`start`, `look` now and then, `stop`, `save`: all on one thread, which is none of the engine's."""

    def __init__(self, recorder: Recorder) -> None:
        journal = recorder.writer.path
        self._live = window_path(journal)
        # A name of its own: the process's windows have one too.
        self._latch = Latch(journal.parent.parent / FOLDER, f"{journal.stem}-capture")
        self._cupti: Cupti | None = None
        self._window: Window | None = None
        self._drained_at = 0.0
        self._room = Room(journal.parent)
        self.notes: list[str] = []

    def start(self) -> None:
        """Record from now on. Raises CuptiError or OSError."""
        cupti = of_process()
        self._latch.open_window()
        try:
            cupti.open()
        except BaseException:
            self._latch.close_window()
            raise
        self._cupti = cupti
        self._drained_at = time.monotonic()

    def look(self) -> str | None:
        """Why it must end now, if it must. Raises CuptiError."""
        assert self._cupti is not None
        if ending():
            raise CuptiError("the program ends")
        if other := profiling():
            raise CuptiError(f"another profiler came in between: {other}")
        now = time.monotonic()
        if now - self._drained_at < _DRAIN_SECONDS and not self._cupti.filling:
            return None
        self._drained_at = now
        held = self._cupti.drain()
        if held >= MOST_ACTIVITIES:
            return f"ended early: {MOST_ACTIVITIES} kernels, copies and sets, and no more are held"
        if not self._room.holds(held * ACTIVITY.itemsize + _NAMES_BYTES):
            place = self._live.parent.parent
            return f"ended early: {held} kernels, copies and sets, and {place} has no room for more"
        return None

    def stop(self) -> None:
        """End the recording. Raises CuptiError."""
        cupti, self._cupti = self._cupti, None
        if cupti is None:
            return
        try:
            self._window = cupti.close()
        finally:
            self._latch.close_window()

    def save(self, target: Path) -> None:
        """Write what was seen. Raises OSError, also for lack of room; then nothing is left behind."""
        window, self._window = self._window, None
        assert window is not None
        write_window(target, Seen(1, window), self._room)
        with contextlib.suppress(OSError):  # the capture is what was asked for
            write_window(self._live, Seen(next_number(), beginning(window)))

    def forget(self) -> None:
        """Give the memory back."""
        self._window = None
