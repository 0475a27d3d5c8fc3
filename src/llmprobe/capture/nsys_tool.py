"""Captures by the nsys that a server was started under: every process of it, whatever ranks it has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from llmprobe.capture.nsys import IDLE, RECORDING, Nsys, Session, session_of
from llmprobe.capture.store import RAW, write_json
from llmprobe.capture.tool import Interrupted, ToolError

#: How much longer than asked for a recording may last before `llmprobe run` ends it itself.
_GRACE_SECONDS = 30.0
_WRITING_SECONDS = 900.0
_LOOK_SECONDS = 0.1

HOW_TO_NSYS = (
    "the server was not started under nsys: start it with `llmprobe run --nsys -- vllm serve …` "
    "(nsys cannot attach to a process that runs)"
)


class NsysTool:
    """See `llmprobe.capture.tool.Tool`."""

    ends_by_clock = True

    def __init__(
        self,
        folder: Path,
        directory: Path,
        group: str,
        *,
        cancelled: Callable[[], bool],
        interrupted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            folder: the capture's.
            directory: the agent's shared directory, in which sessions are noted.
            cancelled: ends a running command of nsys. An agent that leaves lets nsys finish what it was told;
                the next one finds the outcome.
            interrupted: ends a wait.
        """
        self._folder = folder
        self._directory = directory
        self._group = group
        self._cancelled = cancelled
        self._interrupted = interrupted
        self._clock = clock
        self._known: Session | None = None
        self._goes_on = False

    def check(self) -> None:
        """While pending: a recording that is not ours must not be ended as ours."""
        self._nsys().check_idle()

    def start(self, seconds: float, steps: int | None) -> None:
        """Begin."""
        nsys = self._nsys()
        write_json(
            nsys.session.dead_man(self._directory), {"until": self._clock() + seconds + _GRACE_SECONDS}
        )
        nsys.start(self._folder)

    def resume(self) -> None:
        """Raise unless nsys records."""
        if not self._nsys().recording():
            # Also after a restart between entering this state and nsys's own start.
            raise ToolError("nsys does not record any more: it was ended, or the agent died before it began")

    def ended(self) -> bool:
        """It records until it is told to stop."""
        return False

    def progress(self) -> float | None:
        """It does not know."""
        return None

    def taken_bytes(self) -> int:
        """What the recording takes so far in nsys's temporary folder."""
        return self._nsys().recorded_bytes()

    def collect(self) -> list[str]:
        """Stop, and export to SQLite."""
        nsys = self._nsys()
        # After a restart nsys may still be writing what the agent before this one told it to.
        until = time.monotonic() + _WRITING_SECONDS
        while (state := nsys.state()) not in (None, IDLE, RECORDING) and time.monotonic() < until:
            if self._interrupted():
                raise Interrupted("writing")
            time.sleep(_LOOK_SECONDS)
        if state == RECORDING:
            nsys.stop(self._folder)
        elif not (self._folder / RAW).is_file():
            raise ToolError(f"nsys stopped by itself and left no {RAW}: it was killed, or the server ended")
        self.forget()
        nsys.export(self._folder)
        return []

    def abandon(self) -> None:
        """End the recording."""
        if session := self._known or session_of(self._directory, self._group):
            self._goes_on = not Nsys(session).abandon()

    def forget(self) -> None:
        """`llmprobe run` need not end it any more, unless it could not be ended here."""
        if self._goes_on:
            return
        if session := self._known or session_of(self._directory, self._group):
            with contextlib.suppress(OSError):
                session.dead_man(self._directory).unlink(missing_ok=True)

    def _nsys(self) -> Nsys:
        return Nsys(self._session(), self._cancelled)

    def _session(self) -> Session:
        self._known = self._known or session_of(self._directory, self._group)
        if self._known is None:
            raise ToolError("the server's nsys session is gone: the server, or its `llmprobe run`, ended")
        return self._known
