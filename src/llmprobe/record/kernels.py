"""Kernel windows: now and then, for a fraction of a second, see every kernel that runs.

A thread beside the engine opens a window, lets a few whole steps pass, closes it and leaves what it saw in a
file (`llmprobe.record.window_file`); the agent does the arithmetic. The engine's own thread is not involved.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmprobe.record.cupti import IN_USE, Cupti, CuptiError, injected, of_process
from llmprobe.record.cupti_memory import windows_spent
from llmprobe.record.cupti_records import Window
from llmprobe.record.latch import Latch, ProgramEndsError, died_in_a_window, ending
from llmprobe.record.recorder import Recorder
from llmprobe.record.window_file import FOLDER, Seen, next_number, window_path, write_window
from llmprobe.settings import KernelWindows, logger

#: A window stays open beyond its length until so many steps began in it (the first and the last are cut off)
#: but never longer than `_LONGEST_SECONDS`.
_LEAST_STEPS = 4
_LONGEST_SECONDS = 2.0
_POLL_SECONDS = 0.005
_ERRORS_AT_MOST = 3
_LOOK_SECONDS = 0.25


class KernelWindowThread(threading.Thread):
    """Opens windows while steps run, until the recorder is closed or the program ends."""

    def __init__(
        self,
        recorder: Recorder,
        plan: KernelWindows,
        *,
        active: Callable[[], bool],
        failed: Callable[[str, Exception], None],
    ) -> None:
        """
        Args:
            recorder: of the process whose device is watched.
            plan: how long and how often.
            active: whether the probe is on.
            failed: told of what went wrong here.
        """
        super().__init__(name="llmprobe-kernel-windows", daemon=True)
        self._recorder = recorder
        self._plan = plan
        self._active = active
        self._failed = failed
        self._path = window_path(recorder.writer.path)
        self._latch = Latch(self._path.parent, self._path.stem)
        self._said: dict[str, Any] | None = None

    def run(self) -> None:
        """See the class."""
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - a thread of ours in the host's process
            self._failed("kernel_windows", error)
        finally:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _run(self) -> None:
        reason = forbidden(self._recorder) or self._spared()
        cupti = None
        if reason is None:
            try:
                cupti = of_process()
                if not self._plan.spare_graphs or self._recorder.facts.get("framework") == "vllm":
                    # The first one sets CUPTI up, which takes longest: before the engine has work. A program
                    # may still turn out to launch graphs: there the first one comes with the first due.
                    self._window(cupti, 0.0)
            except (CuptiError, OSError) as error:
                reason = str(error)
        if cupti is None or reason is not None:
            self._say(False, reason or "")
            logger().info("no kernel windows: %s", reason)
            return
        self._say(True, "")
        self._watch(cupti)

    def _spared(self) -> str | None:
        return launches_graphs(self._recorder.facts) if self._plan.spare_graphs else None

    def _watch(self, cupti: Cupti) -> None:
        errors = begun = 0
        next_at = time.monotonic() + self._plan.period / 2
        while not self._over():
            begun, before = self._recorder.begun, begun
            time.sleep(max(min(next_at - time.monotonic(), _LOOK_SECONDS), _POLL_SECONDS))
            idle = self._recorder.begun == before
            if time.monotonic() < next_at or idle or not self._active():
                continue
            if reason := self._spared() or profiling():
                self._say(False, reason)
                next_at = time.monotonic() + self._plan.period
                continue
            next_at = time.monotonic() + self._plan.period
            try:
                window = self._window(cupti, self._plan.seconds)
                if window is not None:
                    write_window(self._path, Seen(next_number(), window))
                if reason := windows_spent():
                    self._say(False, reason)
                    return
                self._say(True, "")
            except Exception as error:  # noqa: BLE001 - a thread of ours in the host's process
                errors += 1
                self._failed("kernel_windows", error)
                if errors >= _ERRORS_AT_MOST:
                    self._say(False, f"{errors} windows failed, the last with: {error}")
                    return

    def _over(self) -> bool:
        return self._recorder.closed or ending()

    def _window(self, cupti: Cupti, seconds: float) -> Window | None:
        """One window; None if it saw too little, or something else records or came in between.

        None as well if the program ends, or nobody reads it any more: then it is closed at once.
        """
        if not IN_USE.acquire(blocking=False):
            return None
        try:
            return self._alone(cupti, seconds)
        except ProgramEndsError:
            return None
        finally:
            IN_USE.release()

    def _alone(self, cupti: Cupti, seconds: float) -> Window | None:
        self._latch.open_window()
        try:
            cupti.open()
            begun, began = self._recorder.begun, time.monotonic()
            disturbed = self._over()
            while not disturbed:
                elapsed = time.monotonic() - began
                enough = elapsed >= seconds and self._recorder.begun - begun >= _LEAST_STEPS
                if enough or seconds == 0 or elapsed >= max(seconds, _LONGEST_SECONDS) or cupti.filling:
                    break
                time.sleep(_POLL_SECONDS)
                disturbed = self._over() or profiling() is not None
            window = cupti.close()
            return None if disturbed or seconds == 0 else window
        finally:
            self._latch.close_window()

    def _say(self, on: bool, reason: str) -> None:
        said = {"on": on, "reason": reason, "seconds": self._plan.seconds, "period": self._plan.period}
        if said != self._said:
            self._said = said
            self._recorder.update_facts(kernel_windows=said)


def forbidden(recorder: Recorder) -> str | None:
    """Why no window may be opened in this process; None if one may."""
    if tool := injected():
        return f"a profiler was injected into this process ({tool}): it holds CUPTI"
    folder = recorder.writer.path.parent.parent / FOLDER
    if left := died_in_a_window(folder):
        return f"an engine died while a window was open; remove {left} and start it again to try once more"
    return None


def launches_graphs(facts: Mapping[str, Any]) -> str | None:
    """Why kernel windows are left out for the sake of CUDA graphs; None if this process launches none.

    vLLM says so in its configuration. For other programs: whether torch's compiler has loaded what it replays
    graphs with. Graphs that a program captures by hand are not noticed.
    """
    if facts.get("framework") == "vllm":
        graphs = (facts.get("flags") or {}).get("cudagraph_mode") != "NONE"
    else:
        graphs = "torch._inductor.cudagraph_trees" in sys.modules
    if not graphs:
        return None
    return (
        "this process launches CUDA graphs, and once CUPTI is attached each launch takes the host 0.1 ms "
        "longer, for good; LLMPROBE_KERNEL_WINDOWS=0.1/10 opens them all the same"
    )


def profiling() -> str | None:
    """Which profiler that uses CUPTI runs in this process, in whatever thread; None if none is known to."""
    if getattr(sys.modules.get("torch.autograd.profiler"), "_is_profiler_enabled", False):
        return "a torch profiler runs in this process"
    module = sys.modules.get("triton.profiler.flags")
    # An object since triton 3.5; before, the module itself.
    if getattr(getattr(module, "flags", module), "profiling_on", False):
        return "Triton's profiler (Proton) runs in this process"
    return None
