"""Captures that an agent asks an engine process for (`llmprobe.record.asked`): taken up, recorded, answered.

The housekeeping thread looks for an ask a few times a second. What is asked for runs on a thread of its own,
which sleeps nearly all the time: the engine's own threads are not involved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from llmprobe.record import kernel_trace, torch_trace
from llmprobe.record.asked import Ask, Paths, Said, read_ask, write
from llmprobe.record.cupti import IN_USE, CuptiError
from llmprobe.record.kernels import profiling
from llmprobe.record.recorder import Recorder
from llmprobe.record.room import NoRoom, Room
from llmprobe.settings import logger

_LOOK_SECONDS = 0.05
_LOOK_FOR_STEPS_SECONDS = 0.01
#: Of every tool that uses CUPTI, ours or torch's: docs/decisions/kernel-windows.md.
_ATTACHED = (
    "from its first capture or kernel window on, a process takes longer to launch a CUDA graph "
    "(some 0.1 ms), until it is started anew"
)
_SAY_SECONDS = 0.5
#: A result of some seconds takes one to five MiB (docs/captures.md); with less room nothing is begun.
_LEAST_ROOM_BYTES = 8 << 20
#: A kernel window is over by then.
_IN_USE_SECONDS = 5.0


class Trace(Protocol):
    """A recording of one tool; its methods are called on one thread, in this order."""

    notes: list[str]

    def start(self) -> None:
        """Record from now on."""

    def look(self) -> str | None:
        """Why it must end before its time, if it must; raises if it can be of no use any more."""

    def stop(self) -> None:
        """End it."""

    def save(self, target: Path) -> None:
        """Write it as a whole or not at all."""

    def forget(self) -> None:
        """Give back what it holds."""


class Refused(Exception):
    """The capture cannot be made; the message says why."""


def available(recorder: Recorder) -> dict[str, str | None]:
    """What can capture this process: tool → None, or why it cannot."""
    return {
        "torch": torch_trace.unavailable(recorder.facts.get("clock") == "cuda"),
        "kernels": kernel_trace.unavailable(recorder),
    }


def unsafe(recorder: Recorder) -> dict[str, str]:
    """What could capture this process, but should not unless it is asked for by name: tool → why."""
    if available(recorder)["torch"] is not None:
        return {}
    reason = torch_trace.stops_the_engine(recorder.facts.get("clock") == "cuda")
    return {} if reason is None else {"torch": reason}


class AskedCaptures:
    """Follows the asks for one process, named by the journal of ``recorder``."""

    def __init__(
        self,
        recorder: Recorder,
        *,
        profiler: Callable[[], str | None],
        failed: Callable[[str, Exception], None],
    ) -> None:
        """
        Args:
            profiler: says which profiler of the engine runs, or is about to.
            failed: told of errors of ours.
        """
        self._recorder = recorder
        self._profiler = profiler
        self._failed = failed
        self._paths = Paths.of(recorder.writer.path)
        self._seen: tuple[int, int] | None = None
        self._thread: _CaptureThread | None = None
        self._begun = ""
        self._able: dict[str, str | None] | None = None
        self._in_the_way: str | None = None

    def look(self) -> None:
        """See whether something is asked for, or was called off. Called a few times a second."""
        thread = self._thread
        if thread is not None and not thread.is_alive():
            thread = self._thread = None
        if thread is None:
            self._tell()
        state = self._state()
        if state is None:
            self._seen = None
            if thread is not None:
                thread.called_off.set()
            return
        if state == self._seen:
            return
        ask = read_ask(self._paths.ask)
        if thread is not None:
            # Another ask takes the place of the one that runs; it is looked at once that has ended.
            if ask is None or ask.id != thread.ask.id:
                thread.called_off.set()
            elif ask.end:
                thread.enough.set()
            return
        self._seen = state
        if ask is not None and not (ask.end and ask.id == self._begun):  # it may have ended just now
            self._begun = ask.id
            self._thread = _CaptureThread(ask, self._paths, self._recorder, self._profiler, self._failed)
            self._thread.start()

    def _tell(self) -> None:
        """Say what can capture this process, once and whenever another profiler begins or ends."""
        recorder = self._recorder
        in_the_way = self._profiler() or profiling()
        if self._able is None:
            self._able = available(recorder)
            recorder.update_facts(captures_unsafe=unsafe(recorder))
        elif in_the_way == self._in_the_way:
            return
        self._in_the_way = in_the_way
        recorder.update_facts(
            captures={tool: in_the_way if reason is None else reason for tool, reason in self._able.items()}
        )

    def close(self) -> None:
        """The probe goes: end what runs."""
        if self._thread is not None:
            self._thread.called_off.set()

    def _state(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._paths.ask)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


class _CaptureThread(threading.Thread):
    """One capture from the ask to its result."""

    def __init__(
        self,
        ask: Ask,
        paths: Paths,
        recorder: Recorder,
        profiler: Callable[[], str | None],
        failed: Callable[[str, Exception], None],
    ) -> None:
        super().__init__(name="llmprobe-capture", daemon=True)
        self.ask = ask
        self.called_off = threading.Event()
        #: What was recorded by then is wanted, but no more of it.
        self.enough = threading.Event()
        if ask.end:
            self.enough.set()
        self._paths = paths
        self._recorder = recorder
        self._profiler = profiler
        self._failed = failed
        self._said = Said(ask.id, "recording")

    def run(self) -> None:
        """See the class."""
        try:
            self._check()
            if not IN_USE.acquire(timeout=_IN_USE_SECONDS):
                raise Refused("another capture or kernel window is open in this process")
            try:
                self._capture()
            finally:
                IN_USE.release()
        except Exception as error:  # noqa: BLE001 - a thread of ours in the host's process
            expected = isinstance(error, (Refused, torch_trace.TorchTraceError, CuptiError))
            if not expected and not isinstance(error, OSError):
                self._failed("capture", error)
            self._clean()
            with contextlib.suppress(OSError):
                self._say(state="failed", reason=str(error) or type(error).__name__)
        if self.called_off.is_set():
            self._clean()

    def _check(self) -> None:
        reason = available(self._recorder).get(self.ask.tool, "no such tool")
        if reason is None:
            reason = self._profiler()
        if reason is None:
            reason = profiling()
        if reason is not None:
            raise Refused(reason)
        try:
            Room(self._paths.ask.parent).check(_LEAST_ROOM_BYTES)
        except NoRoom as error:
            raise Refused(str(error)) from None

    def _capture(self) -> None:
        self._clean()
        trace = self._trace()
        clocks = [_clocks()]
        trace.start()
        try:
            begin_ns, begun = time.monotonic_ns(), self._recorder.begun
            self._say(begin_ns=begin_ns, clocks=tuple(clocks))
            early = self._wait(trace, begin_ns, begun)
        except BaseException:
            with contextlib.suppress(Exception):
                trace.stop()
            trace.forget()
            raise
        end_ns, steps = time.monotonic_ns(), self._recorder.begun - begun
        clocks.append(_clocks())
        try:
            trace.stop()
            self._say(state="writing", end_ns=end_ns, steps=steps, clocks=tuple(clocks))
            if self.called_off.is_set():
                raise Refused("it was called off")
            trace.save(self._paths.result)
        finally:
            trace.forget()
        if self._recorder.facts.get("clock") == "cuda":
            trace.notes.append(_ATTACHED)
        notes = (*((early,) if early else ()), *trace.notes)
        self._say(state="done", notes=notes)
        logger().info("captured %d steps with %s", steps, self.ask.tool)

    def _trace(self) -> Trace:
        if self.ask.tool == "kernels":
            return kernel_trace.KernelTrace(self._recorder)
        cuda = self._recorder.facts.get("clock") == "cuda"
        return torch_trace.TorchTrace(cuda, self.ask.cpu, self.ask.stacks)

    def _wait(self, trace: Trace, begin_ns: int, begun: int) -> str | None:
        """Let it record; returns why it ended before its time, if it did."""
        said_at = time.monotonic()
        pause = _LOOK_SECONDS if self.ask.steps is None else _LOOK_FOR_STEPS_SECONDS
        while not self.called_off.wait(pause):
            if self._recorder.closed:
                raise Refused("the engine ended, or its probe was taken out")
            if early := trace.look():
                return early
            if self.enough.is_set():
                return None
            now, steps = time.monotonic(), self._recorder.begun - begun
            if self.ask.steps is not None and steps >= self.ask.steps:
                return None
            if time.monotonic_ns() - begin_ns >= self.ask.seconds * 1e9:
                if self.ask.steps is None:
                    return None
                return f"{steps} instead of {self.ask.steps} steps in {self.ask.seconds:g} s"
            if now - said_at >= _SAY_SECONDS:
                said_at = now
                self._say(steps=steps)
        raise Refused("it was called off")

    def _say(self, **changes: object) -> None:
        self._said = dataclasses.replace(self._said, **changes, updated_ns=time.monotonic_ns())  # type: ignore[arg-type]
        if not self.called_off.is_set():
            write(self._paths.said, self._said)

    def _clean(self) -> None:
        for path in (self._paths.said, self._paths.result):
            with contextlib.suppress(OSError):
                path.unlink()


def _clocks() -> tuple[int, int]:
    """The same moment on both clocks."""
    before = time.monotonic_ns()
    real = time.time_ns()
    return real, (before + time.monotonic_ns()) // 2
