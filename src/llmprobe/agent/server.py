"""The agent put together: the collecting thread, the listening sockets, and when to leave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from llmprobe.agent import daemon, listen
from llmprobe.agent.captures import Watched
from llmprobe.agent.connections import MOST_CONNECTIONS, Connection
from llmprobe.agent.door import Door, door_for
from llmprobe.agent.event_log import EventLog
from llmprobe.agent.events import Watch
from llmprobe.agent.exposition import ExpositionFiles
from llmprobe.agent.files import Token
from llmprobe.agent.jobs import Jobs
from llmprobe.agent.options import Options
from llmprobe.agent.service import State, create_app
from llmprobe.agent.snapshot_on_change import SnapshotOnChange
from llmprobe.capture.manager import Manager
from llmprobe.capture.store import Store, default_directory
from llmprobe.collect.collector import Collector
from llmprobe.collect.peaks import attainable_for, peaks_for
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.thresholds import load_thresholds
from llmprobe.record.agent_launch import CONTROL_NAME, LOG_NAME, TOKEN_NAME

log = logging.getLogger("llmprobe.agent")

CHECKPOINT_NAME = "checkpoint.json"
EVENTS_NAME = "events.json"
_TICK_SECONDS = 0.1
_SAVE_SECONDS = 5.0
#: A full disk has kept it from its files; until then the Unix socket serves.
_PUBLISH_SECONDS = 10.0
_MOST_RESIDENT_BYTES = 150 << 20


def serve(options: Options, lock: daemon.Lock) -> None:
    """Serve ``options.settings.directory`` until there is a reason to leave; all of it is said in the log."""
    settings = options.settings
    directory = settings.directory
    thresholds, problem = load_thresholds(settings.thresholds)
    if problem:
        log.error("%s", problem)
    telemetry = Telemetry()
    collector = Collector(
        directory,
        checkpoint=directory / CHECKPOINT_NAME,
        peaks=lambda facts: peaks_for(facts, gpu=telemetry.hardware(facts)),
        attainable=attainable_for,
        thresholds=thresholds,
        telemetry=telemetry,
        notes=[problem] if problem else [],
        remove_dead=True,
    )
    jobs = Jobs()
    state = State(
        collector,
        directory,
        since_read=lambda: jobs.since_success("collect"),
        errors=lambda: dict(jobs.errors),
        events=EventLog(directory / EVENTS_NAME),
    )
    changes = Watch(state.events)
    state.captures = captures = Manager(
        Store(settings.capture_dir or default_directory(directory), settings.capture_max_bytes),
        directory,
        Watched(collector),
        max_seconds=settings.capture_max_seconds,
        entered=changes.capture,
    )
    exposition = ExpositionFiles(directory)
    snapshots = SnapshotOnChange(directory, settings.snapshot_dir) if settings.snapshot_dir else None

    def look_for_changes() -> None:
        if "collect" in jobs.succeeded:  # before that, servers have not gone but not been found yet
            changes.look(collector.views())

    jobs.add("events", 1.0, look_for_changes)
    if snapshots is not None:
        jobs.add("snapshot", 1.0, lambda: snapshots.look(_classes(collector), state.status))
    try:
        jobs.attempt("exposition", exposition.start)
        asyncio.run(_Agent(options, lock, collector, jobs, state, exposition).run())
    finally:
        if snapshots is not None:
            jobs.attempt("snapshot", snapshots.close)
        jobs.attempt("captures", captures.close)
        jobs.attempt("events", changes.save)
        jobs.attempt("checkpoint", collector.save)
        jobs.attempt("exposition", exposition.remove)
        if lock.in_place():
            listen.unpublish(directory)
        collector.close()
        telemetry.close()


def _classes(collector: Collector) -> dict[tuple[str, str], str]:
    """What each phase of each server is bound by, as of the last look."""
    return {
        (view.server, phase): verdict.bottleneck
        for view in collector.views()
        for phase, verdict in view.verdicts.items()
    }


class _Agent:
    """One run of the agent."""

    def __init__(
        self,
        options: Options,
        lock: daemon.Lock,
        collector: Collector,
        jobs: Jobs,
        state: State,
        exposition: ExpositionFiles,
    ) -> None:
        self._options = options
        self._lock = lock
        self._collector = collector
        self._jobs = jobs
        self._state = state
        self._exposition = exposition
        self._directory = options.settings.directory
        self._leave = threading.Event()
        self._empty_since = time.monotonic()
        self._said_large = False

    async def run(self) -> None:
        """Until a signal comes, or the collecting thread finds a reason to leave."""
        loop = asyncio.get_running_loop()
        leaving = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._go, signal.Signals(number).name)
        servers = [_Server(app, listener) for app, listener in self._doors()]
        self._add_jobs()
        if self._state.captures is not None:
            self._jobs.attempt("captures", self._state.captures.resume)
        # What is here now stays: searching tens of thousands of imported things for garbage again and again
        # costs a twentieth of all that the agent does.
        gc.collect()
        gc.freeze()
        thread = threading.Thread(target=self._collect, args=(loop, leaving), name="collect")
        thread.start()
        serving = [asyncio.ensure_future(server.serve([server.listener])) for server in servers]
        try:
            await leaving.wait()
        finally:
            self._leave.set()
            self._state.events.close()
            for server in servers:
                server.leave()
            await asyncio.gather(*serving, return_exceptions=True)
            thread.join()

    def _doors(self) -> Iterator[tuple[ASGIApp, socket.socket]]:
        settings = self._options.settings
        token = Token(settings.token_file or self._directory / TOKEN_NAME)
        if settings.token_file is not None and not token.value():
            log.error("LLMPROBE_TOKEN_FILE %s is empty or cannot be read: switches are refused", token.path)
        unix = listen.bind_unix(self._directory)
        tcp = listen.bind_tcp(*settings.listen)
        self._state.info = listen.about(self._directory, tcp, settings.listen)
        self._jobs.attempt("publish", self._publish)
        yield create_app(self._state, Door("unix", None)), unix
        if tcp is not None:
            door = door_for(settings.listen[0], token, settings.token_file is not None)
            yield create_app(self._state, door), tcp
            host, port = tcp.getsockname()[:2]
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            log.info("serving http://%s/metrics for %s", where, self._directory)
            if door.token is None:
                log.warning(
                    "beyond loopback without LLMPROBE_TOKEN_FILE: only /metrics and /healthz are served"
                )

    def _publish(self) -> None:
        """Leave in the directory what is missing there: where this agent is, and the token."""
        if self._lock.in_place():
            if self._options.settings.token_file is None:
                Token.make(self._directory)
            listen.publish(self._directory, self._state.info)

    def _add_jobs(self) -> None:
        self._jobs.add("collect", _TICK_SECONDS, self._collector.tick)
        self._jobs.add("exposition", 1.0, lambda: self._exposition.write(self._collector.views()))
        self._jobs.add("watch", 1.0, self._watch)
        self._jobs.add("checkpoint", _SAVE_SECONDS, self._collector.save)
        self._jobs.add("publish", _PUBLISH_SECONDS, self._publish)
        self._jobs.add("log", 60.0, lambda: daemon.cap_log(self._directory / LOG_NAME))

    def _collect(self, loop: asyncio.AbstractEventLoop, leaving: asyncio.Event) -> None:
        try:
            self._jobs.run_until(self._leave)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(leaving.set)

    def _go(self, reason: str) -> None:
        if not self._leave.is_set():
            log.info("leaving: %s", reason)
            self._leave.set()

    def _watch(self) -> None:
        """Find reasons to leave."""
        if not self._lock.in_place():
            self._go(f"{self._directory} was removed or replaced")
        now = time.monotonic()
        if self._collector.alive() or (self._state.captures is not None and self._state.captures.busy()):
            self._empty_since = now
        elif not self._options.external and now - self._empty_since >= self._options.linger_seconds:
            # "off" is meant for engines that run: the next one starts switched on.
            (self._directory / CONTROL_NAME).unlink(missing_ok=True)
            self._go(f"no engine for {self._options.linger_seconds:g} s")
        resident = daemon.resident_bytes()
        if resident > _MOST_RESIDENT_BYTES:
            if not self._options.external:
                self._go(f"{resident >> 20} MiB resident; an engine starts a new agent")
            elif not self._said_large:
                self._said_large = True
                log.warning(
                    "%d MiB resident, more than it should ever be; restart this agent", resident >> 20
                )


class _Server(uvicorn.Server):
    """A uvicorn server on a socket of ours that leaves signals alone: two run in one process."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS + 1,
                timeout_graceful_shutdown=2,
            )
        )
        self.listener = listener
        self._left = asyncio.Event()

    def leave(self) -> None:
        """End `serve`."""
        self.should_exit = True
        self._left.set()

    async def main_loop(self) -> None:
        """As uvicorn's, which wakes ten times a second; this one once, for what the ``Date`` header says."""
        while not await self.on_tick(0):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._left.wait(), 1.0)

    def install_signal_handlers(self) -> None:
        """Nothing (uvicorn before 0.29)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing (uvicorn from 0.29)."""
        yield
