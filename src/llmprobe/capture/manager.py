"""All captures of one agent: which may begin, which go on after a restart, and how one is ended."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from llmprobe.capture.asking import sweep_asks
from llmprobe.capture.boot import boot_id
from llmprobe.capture.condition import ConditionError, parse
from llmprobe.capture.nsys import sweep_sessions
from llmprobe.capture.nsys_tool import ask_why_not_nsys
from llmprobe.capture.run import Run, Server
from llmprobe.capture.session import FINAL, Capture, Request
from llmprobe.capture.session import Tool as ToolName
from llmprobe.capture.store import Store, StoreError
from llmprobe.capture.tool import Worker
from llmprobe.capture.tools import TOOLS, tools_of
from llmprobe.record.asked import LONGEST_SECONDS

log = logging.getLogger("llmprobe.capture")

_MOST_QUEUED = 8
_STARTS_PER_MINUTE = 30
_JOIN_SECONDS = 20.0


class Refused(Exception):
    """A capture that may not begin.

    ``kind``: ``busy`` (``other`` is the capture in the way), ``rate``, ``unavailable`` or ``invalid``.
    """

    def __init__(self, kind: str, detail: str, hint: str, other: str | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.hint = hint
        self.other = other


def choose_tool(
    directory: Path, group: str, wanted: str, workers: Sequence[Worker], ranks: Collection[int] | None = None
) -> ToolName:
    """The tool for a request; ``auto`` is the deepest that is available, safe, and can do what is wanted.

    Args:
        workers: the server's.
        ranks: that are wanted, if not all.

    Raises:
        Refused: it is not available, with the reason and what to use.
    """
    there = {worker.rank for worker in workers}
    if ranks is not None and not (ranks and set(ranks) <= there):
        raise Refused("invalid", f"ranks: there are {sorted(there)}.", "Leave `ranks` out for all.")
    chosen = [worker for worker in workers if ranks is None or worker.rank in ranks]
    reasons = tools_of(directory, group, chosen)
    if wanted in ("auto", "nsys"):
        reasons["nsys"] = ask_why_not_nsys(directory, group)
    if ranks is not None and set(ranks) != there and reasons["nsys"] is None:
        reasons["nsys"] = f"nsys records every process of the server, so ranks: {sorted(there)} or nothing"
        if wanted == "nsys":
            raise Refused("invalid", f"ranks: {reasons['nsys']}.", "Leave `ranks` out.")
    able = [tool for tool in TOOLS if wanted in ("auto", tool) and reasons[tool] is None]
    safe = [tool for tool in able if not any(tool in worker.unsafe for worker in chosen)]
    if able:
        return (safe or able)[0]
    why = reasons[wanted] if wanted != "auto" else "; ".join(f"{tool}: {reasons[tool]}" for tool in TOOLS)
    raise Refused(
        "unavailable",
        f"No {wanted} capture: {why}.",
        "`llmprobe status` and GET /api/captures say what each server has.",
    )


class Manager:
    """Starts, lists, cancels and removes captures. Its methods block; they may be called from any thread."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        server: Server,
        *,
        max_seconds: float,
        entered: Callable[[Capture], object] = lambda capture: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            entered: told of each state that a capture enters, from any thread; must neither raise nor wait.
            clock: seconds.
        """
        self.store = store
        self.max_seconds = min(max_seconds, LONGEST_SECONDS)  # which engines take up
        #: How captures of this agent ended, by (tool, outcome).
        self.ended: Counter[tuple[str, str]] = Counter(
            {(tool, outcome): 0 for tool in TOOLS for outcome in sorted(FINAL)}
        )
        self._directory = directory
        self._server = server
        self._entered = entered
        self._clock = clock
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._queues: dict[str, deque[Run]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._doomed: set[str] = set()
        self._starts: deque[float] = deque()
        self._closing = False
        self._sweeping: threading.Thread | None = None
        self._boot = boot_id()

    def resume(self) -> None:
        """Go on with the captures that an agent before this one left; called once, at the start."""
        self.store.sweep()
        # Beside all else: an nsys that hangs would keep this agent from answering, and from reading journals.
        self._sweeping = threading.Thread(target=self._sweep, name="llmprobe-capture-sweep", daemon=True)
        self._sweeping.start()
        found = self.store.all()
        sweep_asks(self._directory, {capture.id for capture in found if capture.live})
        for capture in sorted(found, key=self._turn):
            if not capture.live:
                continue
            if capture.owner == str(self._directory):
                log.info("going on with capture %s, which is %s", capture.id, capture.state)
                with self._lock:
                    self._enqueue(capture)
            elif not Path(capture.owner).is_dir():
                with contextlib.suppress(OSError):
                    self.store.write(capture.enter("failed", time.time(), reason="its agent is gone"))

    def _turn(self, capture: Capture) -> tuple[bool, float]:
        """Sorts what had begun before what waited, by when it was asked for: ids tell only the second."""
        waited = capture.in_boot(self._boot).since("pending", time.time(), time.monotonic())
        return capture.state == "pending", -waited

    def _sweep(self) -> None:
        try:
            sweep_sessions(self._directory, interrupted=lambda: self._closing)
        except Exception:
            log.exception("what is left of nsys sessions cannot be swept")

    def request(self, group: str, server: str, request: Request, *, queue: bool = False) -> Capture:
        """Begin a capture of the server with this group id, or queue it behind the one that runs.

        Raises:
            Refused: it may not begin.
        """
        self.check_wanted(request.when, request.seconds)
        with self._lock:
            self._check_room(group, queue)
            capture = Capture(
                id=self.store.new_id(),
                owner=str(self._directory),
                server=server,
                group=group,
                request=request,
                times={"pending": time.time()},
                clocks={"pending": time.monotonic()},
                boot=self._boot,
            )
            try:
                self.store.create(capture)
            except StoreError as error:
                raise Refused("unavailable", f"{error}.", "Ask again once that is so.") from None
            self._starts.append(self._clock())
            self._entered(capture)
            self._enqueue(capture)
        return capture

    def check_wanted(self, when: str, seconds: float | None) -> None:
        """Raise `Refused` if no server could ever be captured so, whatever runs now; takes no time."""
        try:
            parse(when)
        except ConditionError as error:
            raise Refused("invalid", f"when: {error}.", "docs/captures.md says what it takes.") from None
        if seconds is not None and seconds > self.max_seconds:
            raise Refused(
                "invalid",
                f"seconds: {seconds:g} is more than the {self.max_seconds:g} allowed here.",
                "Ask for less, or raise LLMPROBE_CAPTURE_MAX_SECONDS where the server is started.",
            )

    def check_room(self, group: str, *, queue: bool = False) -> None:
        """Raise `Refused` if no capture of this group may begin now, whatever is wanted; takes no time."""
        with self._lock:
            self._check_room(group, queue)

    def _check_room(self, group: str, queue: bool) -> None:
        if self._closing:
            raise Refused("unavailable", "This agent is leaving.", "Ask again in a few seconds.")
        # One that has just ended is still in the queue for a moment.
        waiting = [capture for run in self._queues.get(group, ()) if (capture := run.capture).live]
        if waiting and not queue:
            other = waiting[0]
            raise Refused(
                "busy",
                f"Capture {other.id} of {other.server} is {other.state}; one runs at a time.",
                "Wait for it, DELETE it, or let this one wait (queue: true, --queue).",
                other.id,
            )
        if len(waiting) > _MOST_QUEUED:
            raise Refused(
                "rate", f"{len(waiting) - 1} captures wait already.", "Wait, or DELETE some of them."
            )
        now = self._clock()
        while self._starts and now - self._starts[0] > 60:
            self._starts.popleft()
        if len(self._starts) >= _STARTS_PER_MINUTE:
            raise Refused(
                "rate",
                f"{_STARTS_PER_MINUTE} captures began within a minute.",
                "Wait a minute and ask again.",
            )

    def _enqueue(self, capture: Capture) -> None:
        run = Run(
            capture.in_boot(self._boot),
            self.store,
            self._directory,
            self._server,
            max_seconds=self.max_seconds,
            entered=self._entered,
        )
        self._runs[capture.id] = run
        group = capture.group
        self._queues.setdefault(group, deque()).append(run)
        if group not in self._threads:
            thread = threading.Thread(
                target=self._work, args=(group,), name=f"llmprobe-capture-{group}", daemon=True
            )
            self._threads[group] = thread
            thread.start()

    def _work(self, group: str) -> None:
        """Take the captures of one server to their ends, one after the other."""
        while True:
            with self._lock:
                queue = self._queues.get(group)
                if not queue or self._closing:
                    self._queues.pop(group, None)
                    del self._threads[group]
                    return
                run = queue[0]
            self._take(run)
            with self._lock:
                # By identity: a queued one may have been cancelled and taken out meanwhile.
                if queue and queue[0] is run:
                    queue.popleft()
                self._forget(run)

    @staticmethod
    def _take(run: Run) -> None:
        """Take one as far as it goes. An error of ours must not end the thread that takes the next ones."""
        try:
            run.go()
        except Exception as error:
            capture = run.capture
            log.exception("capture %s: an error of ours at its end", capture.id)
            if capture.live:
                reason = f"an error in llmprobe: {type(error).__name__}; see agent.log"
                run.capture = capture.enter("failed", time.time(), reason=reason)

    def _forget(self, run: Run) -> None:
        capture = run.capture
        if capture.live:
            return  # this agent leaves; the next one goes on
        self.ended[(capture.request.tool, capture.state)] += 1
        doomed = capture.id in self._doomed
        if doomed:
            with contextlib.suppress(KeyError, StoreError):  # who asked for it tries again, and is told
                self.store.remove(capture.id)
        if self._kept(capture, gone=doomed):
            del self._runs[capture.id]
        self._doomed.discard(capture.id)

    def _kept(self, capture: Capture, *, gone: bool) -> bool:
        """Whether the disk says what we know; a state that could not be written is kept here.

        Args:
            gone: we know that it is to be gone.
        """
        try:
            return self.store.read(capture.id).state == capture.state
        except KeyError:
            return gone

    def get(self, capture_id: str) -> Capture:
        """A capture as it is now. Raises KeyError if there is none."""
        run = self._runs.get(capture_id)
        return run.capture if run is not None else self.store.read(capture_id)

    def all(self) -> list[Capture]:
        """Every capture, newest first."""
        found = self.store.all()  # then what we know better; never once more from a disk that has changed
        return [capture if (run := self._runs.get(capture.id)) is None else run.capture for capture in found]

    def busy(self) -> bool:
        """Whether any capture of this agent is live."""
        return bool(self._threads)

    def delete(self, capture_id: str, wait_seconds: float = 5.0) -> bool:
        """Stop a capture that goes on, and remove it with its files.

        Returns:
            Whether that is done; stopping may take longer than ``wait_seconds``.

        Raises:
            KeyError: there is none.
            StoreError: its files cannot be removed.
        """
        with self._lock:
            capture = self.get(capture_id)
            run = self._runs.get(capture_id)
            if run is None or not capture.live:
                try:
                    self.store.remove(capture_id)  # first: one that cannot be removed stays known
                except KeyError:
                    if run is None:
                        raise
                self._runs.pop(capture_id, None)
                return True
            self._doomed.add(capture_id)
            run.cancelled.set()
            queue = self._queues.get(capture.group)
            if queue and queue[0] is not run:
                queue.remove(run)
                self._take(run)  # only notes the end: it had not begun
                self._forget(run)
        until = self._clock() + wait_seconds
        while capture_id in self._doomed:
            if self._clock() >= until:
                return False
            time.sleep(0.02)
        with self._lock:
            with contextlib.suppress(KeyError):  # it is gone, as it should be
                self.store.remove(capture_id)
            self._runs.pop(capture_id, None)  # there still if neither its end could be written nor it removed
        return True

    def close(self) -> None:
        """Let go: what is live stays as it is on disk, for the next agent."""
        with self._lock:
            self._closing = True
            for run in self._runs.values():
                run.leaving.set()
            threads = list(self._threads.values())
            if self._sweeping is not None:
                threads.append(self._sweeping)
        until = self._clock() + _JOIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - self._clock()))
