"""nsys on a server that was started under ``nsys launch``: start, stop and export, by argument lists.

``llmprobe run --nsys`` leaves a note in the shared directory that says which session a server runs under and
which temporary folder nsys keeps it in; a session is only found through that folder. Nothing from a request
reaches a command line here: names come from the note, paths from the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from llmprobe.capture.store import RAW, write_json
from llmprobe.capture.tool import Interrupted, ToolError
from llmprobe.capture.words import exit_words, last_words
from llmprobe.processors import own_group
from llmprobe.record.agent_launch import agent_environment

#: States of a session, as ``nsys sessions list`` shows them. From the last one nsys never comes back.
IDLE, RECORDING, LEAVING = "Launched", "Collection", "Shutdown"
#: As it begins to record; where that was cut short it stays so, and refuses to start and to stop.
_BEGINNING = "ConfiguredLaunched"
NOTES_NAME = "nsys"
TEMPORARY_PREFIX = "llmprobe-nsys-"
RAW_SQLITE = "raw.sqlite"
TRACES = ("cuda", "nvtx", "osrt", "cublas", "cudnn", "python-gil")
DEFAULT_TRACE = ("cuda", "nvtx")
#: nsys's words for how CUDA graphs are recorded: each whole, or kernel by kernel. The first is the default.
GRAPH_TRACES = ("graph", "node")
_SESSION = re.compile(r"llmprobe-[0-9a-f]{6,32}")
_TETHER = (sys.executable, "-m", "llmprobe.capture.tether")
_LIST_SECONDS = 20.0
_START_SECONDS = 60.0
_IMPORT_SECONDS = 900.0
_POLL_SECONDS = 0.1
#: nsys waits 30 s for a process that does not answer, and then writes what the others recorded.
_SETTLE_SECONDS = 90.0
_AGAIN = "start the server again with llmprobe run --nsys"


class NsysError(ToolError):
    """nsys did not do what was asked; the message holds its own last words."""


@dataclass(frozen=True)
class Session:
    """The nsys session that a server runs under.

    ``temporary`` is the TMPDIR of its nsys processes: a private folder on disk. ``cuda_graph_trace`` is one
    of `GRAPH_TRACES`; None where CUDA is not traced.
    """

    group: str
    name: str
    nsys: str
    temporary: str
    trace: tuple[str, ...]
    cuda_graph_trace: str | None = None

    def note(self, directory: Path) -> Path:
        """Where the session is noted."""
        return _note(directory, self.group)

    def write(self, directory: Path) -> None:
        """Leave the note for the agent of ``directory``."""
        path = self.note(directory)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(path, asdict(self))

    def forget(self, directory: Path) -> None:
        """Remove the note and the temporary folder."""
        for path in (self.note(directory), self.dead_man(directory), self._lost(directory)):
            with contextlib.suppress(OSError):
                path.unlink()
        if Path(self.temporary).name.startswith(TEMPORARY_PREFIX):
            shutil.rmtree(self.temporary, ignore_errors=True)

    def dead_man(self, directory: Path) -> Path:
        """Holds until when a recording may last, in seconds of CLOCK_MONOTONIC.

        `llmprobe run` ends it if the agent does not.
        """
        return self.note(directory).with_suffix(".until")

    def lose(self, directory: Path, reason: str | None) -> None:
        """Note why nothing can be recorded in it any more; None: it can."""
        path = self._lost(directory)
        with contextlib.suppress(OSError):
            if reason is not None:
                write_json(path, {"reason": reason})
            # Whoever runs the server may have forgotten the session meanwhile: nobody would do so again.
            if reason is None or not self.note(directory).exists():
                path.unlink(missing_ok=True)

    def lost(self, directory: Path) -> str | None:
        """What was noted so."""
        try:
            return str(json.loads(self._lost(directory).read_text())["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _lost(self, directory: Path) -> Path:
        return self.note(directory).with_suffix(".lost")


def session_of(directory: Path, group: str) -> Session | None:
    """The session that the server with this group id runs under; None if it was not started so."""
    try:
        data = json.loads(_note(directory, group).read_text())
        trace = tuple(data["trace"])
        # Notes did not say it while it was always by node.
        graphs = data.get("cuda_graph_trace", "node" if "cuda" in trace else None)
        session = Session(**{**data, "trace": trace, "cuda_graph_trace": graphs})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    sound = (
        session.group == group
        and _SESSION.fullmatch(session.name)
        and Path(session.nsys).is_absolute()
        and Path(session.temporary).is_absolute()
    )
    return session if sound else None


def sweep_sessions(
    directory: Path, older_seconds: float = 600.0, interrupted: Callable[[], bool] = lambda: False
) -> None:
    """Remove what a killed ``llmprobe run --nsys`` left once nothing runs in its session any more.

    Only notes of some age: a new one is written before its session begins. Asks nsys about each, which may
    hang for a while; ends soon once ``interrupted``.
    """
    with contextlib.suppress(OSError, Interrupted):
        for path in (directory / NOTES_NAME).glob("*.json"):
            if time.time() - path.stat().st_mtime < older_seconds:
                continue
            session = session_of(directory, unquote(path.stem))
            if session is None:
                continue
            with contextlib.suppress(NsysError):
                if Nsys(session, interrupted).state() is None:
                    session.forget(directory)


def _note(directory: Path, group: str) -> Path:
    return directory / NOTES_NAME / f"{quote(group, safe='')[:200]}.json"


class Nsys:
    """One session's commands. ``interrupted`` is asked all the time; once true, `Interrupted` is raised."""

    def __init__(self, session: Session, interrupted: Callable[[], bool] = lambda: False) -> None:
        self.session = session
        self._interrupted = interrupted

    def state(self) -> str | None:
        """What nsys says about the session, such as ``Launched`` or ``Collection``; None: there is none."""
        for line in self._run(["sessions", "list"], _LIST_SECONDS).splitlines():
            words = line.split()
            if len(words) >= 4 and words[-1] == self.session.name:
                return words[2]
        return None

    def recording(self) -> bool:
        """Whether the session records right now."""
        return self.state() == RECORDING

    def lost(self) -> str | None:
        """Why nothing can be recorded in the session any more; None if something can."""
        return _why_lost(self.state())

    def settled(self, seconds: float = _SETTLE_SECONDS) -> str | None:
        """As `state`, once nsys does not write a recording any more, or after so many seconds."""
        until = time.monotonic() + seconds
        while (state := self.state()) not in (None, IDLE, RECORDING, LEAVING) and time.monotonic() < until:
            if self._interrupted():
                raise Interrupted("writing")
            time.sleep(_POLL_SECONDS)
        return state

    def check_idle(self) -> None:
        """Raise `NsysError` unless the session is there and records nothing.

        To be asked before `start`, which makes a new session, with nothing in it, for a name that is gone.
        """
        state = self.settled()
        if why := _why_lost(state):
            raise NsysError(why)
        if state == RECORDING:
            raise NsysError("somebody else records in the server's nsys session already")
        if state == _BEGINNING:
            raise NsysError(f"nsys was ended as it began to record, and cannot record any more: {_AGAIN}")
        if state != IDLE:
            raise NsysError(f"nsys has not been done with the recording before for {_SETTLE_SECONDS:g} s")

    def start(self, folder: Path) -> None:
        """Begin to record into ``folder``."""
        output = str(folder / RAW.removesuffix(".nsys-rep")).replace("%", "%%")
        options = ["--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
        self._run(["start", f"--session={self.session.name}", *options, "-o", output], _START_SECONDS)

    def stop(self, folder: Path) -> None:
        """End the recording; nsys writes its file before this returns."""
        said = self._run(["stop", f"--session={self.session.name}"], _IMPORT_SECONDS)
        if not (folder / RAW).is_file():
            raise NsysError(f"nsys stopped, but wrote no {RAW}: {last_words(said) or 'it said nothing'}")
        (folder / RAW).chmod(0o600)

    def export(self, folder: Path) -> None:
        """Turn the recorded file into SQLite (`RAW_SQLITE`), which is as unscrubbed as the file.

        What an agent before this one had begun of it died with it.
        """
        for left in folder.glob(f".{RAW_SQLITE}.*"):
            left.unlink(missing_ok=True)
        made = folder / f".{RAW_SQLITE}.{os.getpid()}"
        command = ["export", "--type=sqlite", "--force-overwrite=true", "--quiet=true"]
        arguments = [*command, f"--output={made}", str(folder / RAW)]
        said = self._run(arguments, _IMPORT_SECONDS, tethered=True)
        if not made.is_file():
            raise NsysError(f"nsys exported nothing: {last_words(said) or 'it said nothing'}")
        made.chmod(0o600)
        made.replace(folder / RAW_SQLITE)

    def recorded_bytes(self) -> int:
        """What the recording takes so far in the temporary folder."""
        total = 0
        with contextlib.suppress(OSError):
            for path in Path(self.session.temporary).glob("nsys-report-*"):
                total += path.stat().st_size
        return total

    def abandon(self) -> bool:
        """End whatever was begun, and delete what nsys left in its temporary folder. Raises nothing.

        Returns:
            Whether nothing is recorded any more, as far as nsys says.
        """
        quiet, state = Nsys(self.session), RECORDING
        with contextlib.suppress(NsysError, OSError):
            if quiet.recording():
                quiet._run(["stop", f"--session={self.session.name}"], _IMPORT_SECONDS)
            state = quiet.settled() or LEAVING
        # An nsys that writes its recording dies where the file goes away meanwhile, and its session with it.
        if state in (IDLE, LEAVING):
            with contextlib.suppress(OSError):
                for path in Path(self.session.temporary).glob("nsys-report-*"):
                    path.unlink()
        return state != RECORDING

    def _run(self, arguments: Sequence[str], seconds: float, *, tethered: bool = False) -> str:
        environment = {**agent_environment(os.environ), "TMPDIR": self.session.temporary}
        command = [self.session.nsys, *arguments]
        return run_nsys(command, seconds, environment, self._interrupted, tethered=tethered)


def _why_lost(state: str | None) -> str | None:
    if state is None:
        return f"the server's nsys session is gone: {_AGAIN}"
    if state == LEAVING:
        return f"nsys's own process of the server's session has failed or is ending: {_AGAIN}"
    return None


def run_nsys(
    command: Sequence[str],
    seconds: float,
    environment: dict[str, str],
    interrupted: Callable[[], bool] = lambda: False,
    *,
    tethered: bool = False,
) -> str:
    """Run an nsys command to its end; returns what it printed.

    Args:
        tethered: it must not go on where this process is killed.

    Raises:
        NsysError: it cannot be started, failed, or took longer than ``seconds``.
        OSError: there is no descriptor left for what it prints.
        Interrupted: ``interrupted`` became true; the command was ended.
    """
    what = f"nsys {command[1]}"
    # In memory: a recording must be ended also where the disk is full or the temporary folder gone.
    with os.fdopen(os.memfd_create("nsys", os.MFD_CLOEXEC), "w+b") as output:
        try:
            child = subprocess.Popen(
                [*_TETHER, *command] if tethered else command,
                stdin=subprocess.PIPE if tethered else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                **own_group(),
            )
        except OSError as error:
            raise NsysError(f"{command[0]} cannot be started: {os.strerror(error.errno or 0)}") from None
        try:
            code = _wait(child, seconds, interrupted, what)
        finally:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            if child.stdin is not None:
                child.stdin.close()
        output.seek(max(0, output.seek(0, os.SEEK_END) - (64 << 10)))
        said = output.read().decode(errors="replace")
    if code != 0:
        raise NsysError(f"{what} failed ({exit_words(code)}): {last_words(said) or 'it said nothing'}")
    return said


def _wait(child: subprocess.Popen[bytes], seconds: float, interrupted: Callable[[], bool], what: str) -> int:
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(_POLL_SECONDS)
        if interrupted():
            raise Interrupted(what)
        if time.monotonic() > until:
            raise NsysError(f"{what} did not end within {seconds:g} s and was killed")
