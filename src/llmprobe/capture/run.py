"""Takes one capture from where it stands to its end, on a thread of its own.

Every step can be done again: an agent that is killed is followed by one that reads the state from disk and
goes on from there, so each state is entered on disk before what belongs to it begins.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llmprobe.capture.asking import RAW_PREFIX
from llmprobe.capture.compare import compare
from llmprobe.capture.condition import Live, Watch, parse
from llmprobe.capture.meanwhile import kept_bounds, kept_steps, meanwhile, read_steps, roofs, steps_before
from llmprobe.capture.session import Capture, State
from llmprobe.capture.stopped import stopped, wait_for_signs
from llmprobe.capture.store import (
    LIVE,
    REPORT_JSON,
    STOP_FREE_BYTES,
    Store,
    write_json,
)
from llmprobe.capture.tool import Interrupted, Tool, ToolError, Worker
from llmprobe.capture.tools import make_tool
from llmprobe.capture.words import exit_words, last_words
from llmprobe.record.agent_launch import agent_environment

log = logging.getLogger("llmprobe.capture")

_LOOK_SECONDS = 0.1
_KEEP_SECONDS = 1.0
#: How long a server may be out of sight before it counts as gone.
_GONE_SECONDS = 5.0
_WORK_SECONDS = 1800.0
#: Between entering these a tool records that does not say when itself.
_RECORDED: tuple[State, State] = ("recording", "importing")
#: What one recording may take of all that may be kept.
_SHARE_OF_BYTES = 0.5


class Failed(Exception):
    """The capture cannot go on; the message says why."""


class Server(Protocol):
    """What a capture asks the agent about the server that it is of."""

    def live(self, capture: Capture) -> Live | None:
        """What conditions look at; None if there is no such server."""

    def figures(self, capture: Capture) -> dict[str, Any] | None:
        """The server's entry in ``/api/status``."""

    def workers(self, capture: Capture) -> list[Worker]:
        """Its living engine processes."""


class Run:
    """One capture on its way."""

    def __init__(
        self,
        capture: Capture,
        store: Store,
        directory: Path,
        server: Server,
        *,
        max_seconds: float,
        entered: Callable[[Capture], object] = lambda capture: None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            capture: as read from disk, in any state that is not final, of this boot.
            directory: the agent's shared directory.
            max_seconds: ``LLMPROBE_CAPTURE_MAX_SECONDS``.
            entered: told of each state that it enters, once that is on disk; must not raise.
            wall: Unix seconds, which are shown and may be set at any time.
            clock: seconds of CLOCK_MONOTONIC, by which durations go.
        """
        self.capture = capture
        self.cancelled = threading.Event()
        self.leaving = threading.Event()
        self._store = store
        self._directory = directory
        self._server = server
        self._max_seconds = max_seconds
        self._entered = entered
        self._wall = wall
        self._clock = clock
        self._folder = store.folder(capture.id)
        self._seen_at = time.monotonic()
        self._kept_at = 0.0
        self._begun: float | None = None  # when the tool had begun to record, if it did so for us
        self._tool: Tool = make_tool(
            capture,
            self._folder,
            directory,
            lambda: server.workers(capture),
            seconds=self._longest(),
            cancelled=self.cancelled.is_set,
            interrupted=self._interrupted,
            clock=clock,
        )

    def go(self) -> None:
        """Take it to its end, or leave it where it is once ``leaving`` is set. Raises nothing."""
        steps: dict[State, Callable[[], None]] = {
            "pending": self._wait_and_start,
            "recording": self._record,
            "importing": self._import,
            "analysing": self._analyse,
        }
        try:
            while self.capture.live:
                if self._interrupted():
                    raise Interrupted(self.capture.state)
                steps[self.capture.state]()
        except Interrupted:
            if not self.cancelled.is_set():
                return  # the agent leaves; the next one goes on from what is on disk
            self._end("cancelled", "it was cancelled")
        except (Failed, ToolError) as error:
            self._end("failed", str(error))
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            self._end("failed", f"{os.strerror(error.errno or 0)}{where}")
        except Exception as error:
            log.exception("capture %s: an error of ours", self.capture.id)
            self._end("failed", f"an error in llmprobe: {type(error).__name__}; see agent.log")

    def _wait_and_start(self) -> None:
        request = self.capture.request
        watch = Watch(parse(request.when))
        until = self._clock() + request.wait_seconds  # from its turn on, where it was queued
        while not watch.come(self._look(), time.monotonic()):
            if self._clock() > until:
                why = f": {unknown} was not known in all that time" if (unknown := watch.never_known) else ""
                raise Failed(f"{request.when!r} did not come true within {request.wait_seconds:g} s{why}")
            self._pause()
        self._tool.check()
        self._keep_live("before")
        self._enter("recording")
        self._tool.start(self._longest(), request.steps)
        self._begun = self._clock()  # it may take a while to begin, in which it records nothing

    def _record(self) -> None:
        self._tool.resume()
        request, seconds = self.capture.request, self._longest()
        begun = self._begun
        if begun is None:  # an agent before this one began it
            # Cut, because where only the wall clock knows it may have been set.
            begun = self._clock() - min(self._since("recording"), seconds)
        self._keep(self.capture.at(0.0))
        first = self._look()
        while not self._tool.ended():
            elapsed = self._clock() - begun
            live = self._look()
            first = first or live  # an agent that starts anew has to find the server first
            progress = self._tool.progress()
            if progress is None:
                progress = elapsed / seconds
                if request.steps is not None and live is not None and first is not None:
                    progress = live.steps_since(first) / request.steps
                    if progress >= 1:
                        break
            if elapsed >= seconds and self._tool.ends_by_clock:
                if request.steps is not None:
                    self.capture = self.capture.noting(f"fewer than {request.steps} steps in {seconds:g} s")
                break
            self._keep(self.capture.at(progress))
            if self._too_large():
                break
            self._pause()
        self._keep_live("during")
        self._enter("importing")

    def _longest(self) -> float:
        return min(self.capture.request.seconds or self._max_seconds, self._max_seconds)

    def _too_large(self) -> bool:
        """Whether to stop before the time: the recording must not fill the disk."""
        free, taken = self._store.free_bytes(), self._tool.taken_bytes()
        if free < STOP_FREE_BYTES:
            note = f"ended early: {free >> 20} MiB free in {self._store.root}"
        elif taken > self._store.max_bytes * _SHARE_OF_BYTES:
            note = f"ended early: {taken >> 20} MiB, half of LLMPROBE_CAPTURE_MAX_BYTES"
        else:
            return False
        self.capture = self.capture.noting(note)
        return True

    def _import(self) -> None:
        for note in self._tool.collect():
            self.capture = self.capture.noting(note)
        self._try("the live figures of the recorded steps", self._keep_meanwhile)
        self._enter("analysing")

    def _analyse(self) -> None:
        command = [sys.executable, "-m", "llmprobe.capture.work", str(self._folder)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=agent_environment(os.environ),
            cwd="/",
        ) as child:
            try:
                said = self._wait_for(child)
            finally:
                if child.poll() is None:
                    child.kill()
        if child.returncode != 0:
            why = said or exit_words(child.returncode)
            if not said and child.returncode == -signal.SIGKILL:
                why += ", as a system does that runs out of memory"
            raise Failed(f"the capture cannot be analysed: {why}")
        self._keep_live("after")
        # Only now: a tool may have stopped the server while it wrote, and the server gets on since.
        if hung := self._hang():
            self.capture = self.capture.noting(hung)
            log.warning("capture %s of %s: %s", self.capture.id, self.capture.server, hung)
        self._try("the comparison with the live figures", self._compare)
        self._store.tidy(self.capture.id)  # drafts of an agent that was killed: they are not scrubbed
        taken, most = self._store.size(self.capture.id), self._store.max_bytes
        if taken > most:
            self.capture = self.capture.noting(
                f"it takes {taken / 2**20:.1f} MiB, more than LLMPROBE_CAPTURE_MAX_BYTES "
                f"({most / 2**20:.1f} MiB), and is deleted to make room for the next capture"
            )
        self._enter("done")
        self._store.trim(keep=self.capture.id)
        log.info("capture %s of %s is done", self.capture.id, self.capture.server)

    def _wait_for(self, child: subprocess.Popen[bytes]) -> str:
        assert child.stderr is not None
        os.set_blocking(child.stderr.fileno(), False)
        until, said = time.monotonic() + _WORK_SECONDS, b""
        while True:
            ended = child.poll() is not None
            said = (said + (child.stderr.read() or b""))[-4096:]
            if ended:
                lines = said.decode(errors="replace").strip().splitlines()
                return last_words(lines[-1]) if lines else ""
            if time.monotonic() > until:
                raise Failed(f"the analysis did not end within {_WORK_SECONDS:g} s")
            self._pause()

    def _try(self, what: str, make: Callable[[], None]) -> None:
        """Make what is good to have beside a recording; if it cannot be had, that is a note."""
        try:
            make()
        except Exception as error:
            log.warning("capture %s lacks %s", self.capture.id, what, exc_info=True)
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self.capture = self.capture.noting(f"{what} could not be had ({why[:200]}); see agent.log")

    def _compare(self) -> None:
        live = _read_json(self._folder / LIVE)
        report = _read_json(self._folder / REPORT_JSON)
        live["comparison"] = compare(report, live.get("during") or {}, live.get("meanwhile"))
        write_json(self._folder / LIVE, live)
        if live["comparison"].get("disagree"):
            self.capture = self.capture.noting(live["comparison"]["why"])

    def _look(self) -> Live | None:
        live = self._server.live(self.capture)
        now = time.monotonic()
        if live is not None:
            self._seen_at = now
        elif now - self._seen_at > _GONE_SECONDS:
            raise Failed(f"the server {self.capture.server} is gone")
        return live

    def _pause(self) -> None:
        if self._interrupted():
            raise Interrupted("waiting")
        self.cancelled.wait(_LOOK_SECONDS)

    def _interrupted(self) -> bool:
        return self.cancelled.is_set() or self.leaving.is_set()

    def _keep_live(self, when: str) -> None:
        """Keep what the server shows now beside the capture, unless it was kept before a restart."""
        path = self._folder / LIVE
        live = _read_json(path)
        if when not in live:
            live[when] = {"time": self._wall(), "server": self._server.figures(self.capture)}
            write_json(path, live)

    def _keep_meanwhile(self) -> None:
        """Keep the live figures of the seconds that were recorded, by their step records."""
        path = self._folder / LIVE
        live = _read_json(path)
        steps = kept_steps(self._folder, RAW_PREFIX)
        rough = not steps  # the tool kept none beside what it recorded, and when that was it alone knows
        journals = {worker.name: worker.journal for worker in self._server.workers(self.capture)}
        begin_ns = None
        if rough:
            now_ns = time.monotonic_ns()
            begin_ns, end_ns = (now_ns - round(self._since(state) * 1e9) for state in _RECORDED)
            steps = read_steps(journals, begin_ns, end_ns)
        earlier = steps_before(journals, steps, begin_ns)
        before = live.get("before") or {}
        of, within = roofs(journals, before), kept_bounds(self._folder, RAW_PREFIX)
        live["meanwhile"] = meanwhile(steps, before, earlier, of, within, rough=rough)
        write_json(path, live)

    def _since(self, state: State) -> float:
        return self.capture.since(state, self._wall(), self._clock())

    def _enter(self, state: State, reason: str | None = None) -> None:
        entered = self.capture.enter(state, self._wall(), reason=reason, clock=self._clock())
        self._store.write(entered)
        self.capture = entered
        self._entered(entered)

    def _keep(self, capture: Capture) -> None:
        self.capture = capture
        now = time.monotonic()
        if now - self._kept_at > _KEEP_SECONDS:
            self._kept_at = now
            self._store.write(capture)

    def _end(self, state: State, reason: str) -> None:
        """Clean up, and keep why: of a capture that failed only that is left. Whatever cleaning up does."""
        if not self.capture.live:
            return  # it has ended already; what failed was of no matter to it
        if self.capture.state in ("recording", "importing"):
            self._quietly(self._tool.abandon)
        if state == "failed" and self.capture.state != "pending":
            for more in (self._hang(wait=True), self._full()):
                reason = f"{reason}. {more}" if more else reason
        if self.capture.state != "pending":  # what is there then is another capture's
            self._quietly(self._tool.forget)
        self._store.tidy(self.capture.id, files=False)
        ended = self.capture.enter(state, self._wall(), reason=reason)
        try:
            self._store.write(ended)
        except OSError as error:  # a full disk: at least as long as this agent lives it is known
            log.error("capture %s: cannot write its state: %s", self.capture.id, error)
        self.capture = ended
        self._entered(ended)
        self._quietly(lambda: self._store.trim(keep=ended.id))
        log.warning("capture %s of %s %s: %s", self.capture.id, self.capture.server, state, reason)

    def _full(self) -> str | None:
        """What to say if the disk is full: few tools do when they fail of it. Raises nothing."""
        try:
            free = self._store.free_bytes()
        except OSError:
            return None
        if free >= STOP_FREE_BYTES:
            return None
        return f"{self._store.root} has {free >> 20} MiB free: make room"

    def _hang(self, *, wait: bool = False) -> str | None:
        """What to say if the server has not got on since it was recorded; may wait for signs of it.

        Raises nothing.
        """
        try:
            begun_ns = time.monotonic_ns() - round(self._since("recording") * 1e9)
            if wait:
                wait_for_signs(lambda: self._server.live(self.capture), self._wait)
            return stopped(self._server.live(self.capture), begun_ns, self._tool.hang_hint())
        except Exception:
            log.exception("capture %s: whether its server gets on is not known", self.capture.id)
            return None

    def _wait(self, seconds: float) -> bool:
        """Whether to wait no longer, after so many seconds."""
        return self.cancelled.wait(seconds) or self.leaving.is_set()

    def _quietly(self, clean: Callable[[], object]) -> None:
        try:
            clean()
        except Exception:
            log.exception("capture %s: something of it may be left", self.capture.id)


def _read_json(path: Path) -> dict[str, Any]:
    import json

    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
