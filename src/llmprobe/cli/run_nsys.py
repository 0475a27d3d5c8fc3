"""``llmprobe run --nsys``: the command under ``nsys launch``, so that it can be captured while it serves.

nsys and the command each get a session of their own, away from the terminal: signals reach this process, and
it alone passes them on, once. The command outlives this process and nsys, should either be killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import typer

from llmprobe.capture.nsys import (
    DEFAULT_TRACE,
    GRAPH_TRACES,
    TEMPORARY_PREFIX,
    TRACES,
    Nsys,
    NsysError,
    Session,
    run_nsys,
)
from llmprobe.cli import nsys_target
from llmprobe.record.directory import prepare_directory
from llmprobe.record.journal import JournalError
from llmprobe.settings import Settings

_USUAL_PLACES = (
    "opt/nvidia/nsight-systems/*/target-linux-*/nsys",
    "usr/local/cuda/bin/nsys",
    "usr/lib/*/nsight-systems/target-linux-*/nsys",
    "opt/nvidia/nsight-compute/*/host/target-linux-*/nsys",
)
_POLL_SECONDS = 0.05
_DEADLINE_LOOK_SECONDS = 1.0
#: How long nsys may take to end after the command has: it may have a recording to write.
_LINGER_SECONDS = 120.0
_SHUTDOWN_SECONDS = 20.0


class NsysUsageError(Exception):
    """What is wrong, and what to do. ``code`` is the exit status: 2 wrong usage, 127 no such command."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def find_nsys(given: str) -> str:
    """The nsys program: ``given`` if not empty, else the one on PATH or the newest in the usual places.

    Raises:
        NsysUsageError: there is none.
    """
    if given:
        found = shutil.which(given)
        if found is None:
            raise NsysUsageError(f"--nsys={given}: no such program")
        return str(Path(found).absolute())
    found = shutil.which("nsys")
    places = (
        [Path(found)] if found else sorted(path for place in _USUAL_PLACES for path in Path("/").glob(place))
    )
    if not places:
        raise NsysUsageError("no nsys on PATH: install NVIDIA Nsight Systems, or name it with --nsys=PATH")
    return str(places[-1].absolute())


def parse_trace(text: str | None) -> tuple[str, ...]:
    """The traces in ``cuda,nvtx,osrt``; `DEFAULT_TRACE` for None.

    Raises:
        NsysUsageError: one of them is none that we pass on.
    """
    if text is None:
        return DEFAULT_TRACE
    wanted = tuple(part.strip() for part in text.split(","))
    for part in wanted:
        if part not in TRACES:
            raise NsysUsageError(f"--trace {text}: {part!r} is none of {', '.join(TRACES)}")
    return wanted


def parse_graphs(text: str | None, trace: Sequence[str]) -> str | None:
    """How to trace CUDA graphs, by what ``--cuda-graph-trace`` says; None where CUDA is not traced.

    Raises:
        NsysUsageError: it is none of `GRAPH_TRACES`, or CUDA is not traced.
    """
    if text is not None and text not in GRAPH_TRACES:
        raise NsysUsageError(f"--cuda-graph-trace {text}: it takes {' or '.join(GRAPH_TRACES)}")
    if "cuda" in trace:
        return text or GRAPH_TRACES[0]
    if text is not None:
        raise NsysUsageError(
            f"--cuda-graph-trace {text}: cuda is not traced; leave it out, or add cuda to --trace"
        )
    return None


class NsysChild:
    """A command under ``nsys launch``. Offers what `subprocess.Popen` offers for a plain one."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        settings: Settings,
        nsys: str,
        trace: tuple[str, ...],
        graphs: str | None,
    ) -> None:
        """Start it.

        Raises:
            NsysUsageError: it cannot be started.
        """
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            raise NsysUsageError(f"cannot run {command[0]!r}: No such file or directory", 127)
        try:
            prepare_directory(settings.directory)
        except JournalError as error:
            raise NsysUsageError(str(error)) from None
        self._directory = settings.directory
        try:
            self._temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX))
        except OSError as error:
            raise NsysUsageError(f"no folder for nsys can be made ({_why(error)}); set TMPDIR") from None
        self.session = Session(
            group=environment["LLMPROBE_GROUP"],
            name=f"llmprobe-{secrets.token_hex(6)}",
            nsys=nsys,
            temporary=str(self._temporary),
            trace=trace,
            cuda_graph_trace=graphs,
        )
        self._pid_file = self._temporary / "target.pid"
        self._target: psutil.Process | None = None
        self._unsent: list[int] = []
        self._ended_at: float | None = None
        self._look_at = 0.0
        self._said_lost = False
        try:
            self.session.write(self._directory)
        except OSError as error:
            self.session.forget(self._directory)
            where = self.session.note(self._directory)
            raise NsysUsageError(f"cannot write {where}: {_why(error)}; set LLMPROBE_DIR") from None
        self._launch = self._start(command, environment)

    def _start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        trace, how = self.session.trace, self.session.cuda_graph_trace
        graphs = [] if how is None else [f"--cuda-graph-trace={how}"]
        umask = os.umask(0o077)
        os.umask(umask)
        out, err = os.dup(1), os.dup(2)
        try:
            return subprocess.Popen(
                [
                    *(self.session.nsys, "launch", f"--session-new={self.session.name}"),
                    # Not for what the command leaves behind, such as llmprobe's own agent.
                    *("--wait=primary", f"--trace={','.join(trace)}", *graphs),
                    *(sys.executable, "-I", "-S", nsys_target.__file__, str(self._pid_file)),
                    *(str(out), str(err), str(umask), environment.get("TMPDIR", "-")),
                    *command,
                ],
                env={**environment, "TMPDIR": str(self._temporary)},
                stdout=err,  # what nsys says is not the command's output
                pass_fds=(out, err),
                umask=0o077,
                start_new_session=True,
            )
        except OSError as error:
            self.close()
            raise NsysUsageError(f"cannot run {self.session.nsys}: {os.strerror(error.errno or 0)}") from None
        finally:
            os.close(out)
            os.close(err)

    def wait(self, timeout: float) -> int:
        """The command's exit status once it has ended; 1 if nsys was killed and nobody can tell.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        until = time.monotonic() + timeout
        while (code := self._poll()) is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired("nsys launch", timeout)
            time.sleep(_POLL_SECONDS)
        return code

    def _poll(self) -> int | None:
        self._keep_deadline()
        # In this order: nsys ends after the command does, unless it was killed.
        code = self._launch.poll()
        if self._target_alive():
            if code is not None and not self._said_lost:
                self._said_lost = True
                _say("nsys ended, the command goes on; it cannot be captured any more")
                self.session.lose(
                    self._directory, "nsys's own process ended while the server ran: start it anew"
                )
            return None
        if code is None:
            # Not started yet, or nsys still writes a recording.
            if self._target is not None:
                self._ended_at = self._ended_at or time.monotonic()
                if time.monotonic() - self._ended_at > _LINGER_SECONDS:
                    self._launch.kill()
            return None
        if self._said_lost:
            _say("the command has ended; its exit status is not known, because nsys was killed")
            return 1
        return code

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the command; Ctrl-C to all of its process group, as a terminal would."""
        if self._target is None and not self._target_alive():
            self._unsent.append(number)
            return
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            if self._target is not None and self._target.is_running():
                pid = self._target.pid
                if number == signal.SIGINT and os.getpgid(pid) == pid:
                    os.killpg(pid, number)
                else:
                    os.kill(pid, number)

    def _target_alive(self) -> bool:
        if self._target is None:
            try:
                self._target = psutil.Process(int(self._pid_file.read_text()))
            except (OSError, ValueError, psutil.Error):
                return False
            unsent, self._unsent = self._unsent, []
            for number in unsent:
                self.send_signal(number)
        with contextlib.suppress(psutil.Error):
            return self._target.is_running() and self._target.status() != psutil.STATUS_ZOMBIE
        return False

    def _keep_deadline(self) -> None:
        """End a recording whose agent did not: nsys would go on to record for as long as the server lives."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _DEADLINE_LOOK_SECONDS
        path = self.session.dead_man(self._directory)
        try:
            until = float(json.loads(path.read_text())["until"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if now > until:
            path.unlink(missing_ok=True)
            Nsys(self.session).abandon()

    def close(self) -> None:
        """End the nsys session and whatever is left of it; nothing of the command."""
        with contextlib.suppress(NsysError, OSError):
            if Nsys(self.session).state() is not None:
                environment = {**os.environ, "TMPDIR": str(self._temporary)}
                shutdown = [self.session.nsys, "shutdown", f"--session={self.session.name}", "--kill=none"]
                run_nsys(shutdown, _SHUTDOWN_SECONDS, environment)
        left = list(self._left())
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(left, timeout=3)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.session.forget(self._directory)

    def _left(self) -> Iterator[psutil.Process]:
        """nsys's own processes of this session, which carry its name or its folder on their command line."""
        for process in psutil.process_iter(["name", "cmdline", "uids"]):
            line = process.info["cmdline"] or []
            ours = any(
                word == f"--session-name={self.session.name}" or word.startswith(f"{self._temporary}/")
                for word in line[1:3]
            )
            if ours and Path(line[0]).name.startswith("nsys") and process.info["uids"].real == os.getuid():
                yield process


def warn_of_old_nsys(nsys: str) -> None:
    """Say so if this nsys does not show our ranges: versions of 2023 reject those of newer nvtx packages."""
    try:
        said = run_nsys([nsys, "--version"], _SHUTDOWN_SECONDS, dict(os.environ))
    except NsysError as error:
        raise NsysUsageError(str(error)) from None
    version = re.search(r"\b(20\d\d)\.\d", said)
    if version and int(version[1]) <= 2023:
        _say(f"nsys of {version[1]} does not show ranges of nvtx 0.2.12 and newer: captures have no phases")


def warn_of_hangs() -> None:
    """Say what tracing by node risks."""
    _say("--cuda-graph-trace node: a capture can hang the server for good, and slows launches of CUDA graphs")


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _say(text: str) -> None:
    typer.echo(f"llmprobe: {text}", err=True)
