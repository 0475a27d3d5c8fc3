"""Captures by the nsys that a server was started under: every process of it, whatever ranks it has."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmprobe.capture.nsys import RECORDING, Nsys, NsysError, Session, session_of
from llmprobe.capture.store import RAW, write_json
from llmprobe.capture.tool import ToolError

#: How much longer than asked for a recording may last before `llmprobe run` ends it itself.
_GRACE_SECONDS = 30.0
_WRITING_SECONDS = 900.0

HOW_TO_NSYS = (
    "the server was not started under nsys: start it with `llmprobe run --nsys -- vllm serve …` "
    "(nsys cannot attach to a process that runs)"
)
_START_ANEW = "If it does not get on by itself, start it anew"
_HANGS_BY_NODE = (
    "nsys can hang a server for good that replays CUDA graphs while it records them by node, as here "
    "(--cuda-graph-trace node): start it anew, with graphs recorded whole, which is the default"
)
_BY_NODE = (
    "CUDA graphs were recorded by node, which makes each of their launches take hundreds of microseconds: "
    "idle time before a graph may be the recording's"
)

#: Names of the sessions that nsys is being asked about, and who may change that.
_asked: set[str] = set()
_asking = threading.Lock()


def why_not_nsys(directory: Path, group: str) -> str | None:
    """Why nsys cannot capture the server with this group id, as far as is noted; None if it can."""
    session = session_of(directory, group)
    return HOW_TO_NSYS if session is None else session.lost(directory)


def ask_why_not_nsys(directory: Path, group: str) -> str | None:
    """The same, having asked nsys, which takes a moment; what it says is noted.

    While somebody else asks about that session, only what is noted: callers must not pile up on an nsys that
    hangs, nor start one each.
    """
    session = session_of(directory, group)
    if session is None:
        return HOW_TO_NSYS
    with _asking:
        if session.name in _asked:
            return session.lost(directory)
        _asked.add(session.name)
    try:
        lost = Nsys(session).lost()
    except (NsysError, OSError):
        return session.lost(directory)  # the capture will fail with its words
    finally:
        _asked.discard(session.name)
    if lost != session.lost(directory):
        session.lose(directory, lost)
    return lost


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
            cancelled: ends a running command of nsys, but not its start. An agent that leaves lets nsys
                finish what it was told; the next one finds the outcome.
            interrupted: ends a wait.
        """
        self._folder = folder
        self._directory = directory
        self._group = group
        self._cancelled = cancelled
        self._interrupted = interrupted
        self._clock = clock
        self._known: Session | None = None
        self._goes_on = self._may_begin = False

    def check(self) -> None:
        """While pending: a recording that is not ours must not be ended as ours."""
        Nsys(self._session(), self._interrupted).check_idle()

    def start(self, seconds: float, steps: int | None) -> None:
        """Begin."""
        # Not to be cancelled: a session whose start is killed can neither start nor stop from then on.
        nsys = Nsys(self._session())
        self._allow(nsys.session, seconds + _GRACE_SECONDS)
        nsys.start(self._folder)

    def resume(self) -> None:
        """Raise unless nsys records."""
        if not self._nsys().recording():
            # Also after a restart between entering this state and nsys's own start, which may be under way.
            self._may_begin = True
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
        with contextlib.suppress(OSError):  # of a full disk: `llmprobe run` ends nothing that is written
            self._allow(nsys.session, _WRITING_SECONDS + _GRACE_SECONDS)
        # After a restart nsys may still be writing what the agent before this one told it to.
        state = Nsys(nsys.session, self._interrupted).settled(_WRITING_SECONDS)
        if state == RECORDING:
            nsys.stop(self._folder)
        elif not (self._folder / RAW).is_file():
            raise ToolError(f"nsys stopped by itself and left no {RAW}: it was killed, or the server ended")
        self.forget()
        nsys.export(self._folder)
        return [_BY_NODE] if nsys.session.cuda_graph_trace == "node" else []

    def abandon(self) -> None:
        """End the recording."""
        if session := self._known or session_of(self._directory, self._group):
            self._goes_on = not Nsys(session).abandon()
            ask_why_not_nsys(self._directory, self._group)

    def forget(self) -> None:
        """`llmprobe run` need not end it any more, unless it could not be ended here or may yet begin."""
        if self._goes_on or self._may_begin:
            return
        if session := self._known or session_of(self._directory, self._group):
            with contextlib.suppress(OSError):
                session.dead_man(self._directory).unlink(missing_ok=True)

    def hang_hint(self) -> str:
        """What is known of servers that hang while nsys records them."""
        session = self._known or session_of(self._directory, self._group)
        return _HANGS_BY_NODE if session and session.cuda_graph_trace == "node" else _START_ANEW

    def _allow(self, session: Session, seconds: float) -> None:
        """Keep `llmprobe run` from ending the recording for so long, while this agent lives or not."""
        write_json(session.dead_man(self._directory), {"until": self._clock() + seconds})

    def _nsys(self) -> Nsys:
        return Nsys(self._session(), self._cancelled)

    def _session(self) -> Session:
        self._known = self._known or session_of(self._directory, self._group)
        if self._known is None:
            raise ToolError("the server's nsys session is gone: the server, or its `llmprobe run`, ended")
        return self._known
