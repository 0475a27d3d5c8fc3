"""Captures that engine processes make themselves: asked for by files, followed, fetched.

The other end is `llmprobe.record.asked_capture`. What a process recorded goes into the capture's folder as it
is, under a name that is never served, with the steps of its journal beside it; `llmprobe.capture.work` makes
of both what may be looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import llmprobe
from llmprobe.capture.meanwhile import journal_steps
from llmprobe.capture.store import write_json
from llmprobe.capture.tool import Interrupted, ToolError, Worker
from llmprobe.record.asked import FOLDER, MOST_RESULT_BYTES, Ask, Paths, Said, open_plain, read_said, write

_LOOK_SECONDS = 0.1
#: A process looks four times a second; one that starts its first profiler may need longer to say so.
_ANSWER_SECONDS = 15.0
#: How long a process may put its trace together and write it.
_WRITING_SECONDS = 300.0
#: How much longer than asked for a recording may last.
_GRACE_SECONDS = 10.0
#: How long a process may be out of sight before it counts as gone.
_GONE_SECONDS = 3.0
#: Steps reach the journal a moment after they end.
_SETTLE_SECONDS = 0.7
_MOST_ASK_BYTES = 64 << 10
_NAME = re.compile(r"(engine\d{1,5}-)?rank\d{1,5}(-\d{1,3})?")
#: In the capture's folder: ``raw-rank0.torch``, and ``raw-rank0.json``, ``raw-rank0.npy`` beside it.
RAW_PREFIX = "raw-"


@dataclass(frozen=True)
class Options:
    """What a request asks of torch's profiler."""

    cpu: bool = False
    stacks: bool = False


class AskingTool:
    """See `llmprobe.capture.tool.Tool`; ``tool`` is ``torch`` or ``kernels``."""

    ends_by_clock = False

    def __init__(
        self,
        tool: str,
        capture_id: str,
        folder: Path,
        workers: Callable[[], Sequence[Worker]],
        *,
        seconds: float,
        steps: int | None,
        interrupted: Callable[[], bool],
        options: Options | None = None,
        directory: Path | None = None,
    ) -> None:
        """
        Args:
            folder: the capture's.
            workers: those that are to be captured and live.
            seconds: the longest that the recording may last.
            steps: after how many it ends before; each process counts its own.
            interrupted: ends a wait.
            directory: the agent's shared directory, where asks are found of processes that are not (yet).
        """
        self._tool = tool
        self._id = capture_id
        self._folder = folder
        self._workers = workers
        self._seconds = seconds
        self._interrupted = interrupted
        self._options = options or Options()
        self._directory = directory
        self._steps = steps
        self._known: tuple[Worker, ...] = ()
        self._seen: dict[Path, float] = {}
        self._since = time.monotonic()

    def check(self) -> None:
        """Raise unless every process can make it."""
        workers = self._asked()
        for worker in workers:
            reason = worker.refusals.get(self._tool, "it does not say that it can")
            if reason is not None:
                raise ToolError(f"{worker.name}: {reason}")

    def start(self, seconds: float, steps: int | None) -> None:
        """Ask every process."""
        self._since = time.monotonic()
        for worker in self._asked():
            paths = Paths.of(worker.journal)
            paths.remove()
            write(paths.ask, self._ask(seconds, steps))

    def resume(self) -> None:
        """Raise unless the asks are there."""
        self._since = time.monotonic()
        for worker in self._asked():
            if not Paths.of(worker.journal).ask.exists() and self._said(worker) is None:
                raise ToolError(f"{worker.name} was not asked: the agent died before it did")

    def ended(self) -> bool:
        """Whether no process records any more. Raises ToolError if one cannot."""
        return all(said is not None and said.state != "recording" for said in self._look())

    def progress(self) -> float | None:
        """The clock knows better, but for steps."""
        if self._steps is None:
            return None
        steps = [0 if said is None else said.steps for said in self._look()]
        return min(steps, default=0) / self._steps

    def taken_bytes(self) -> int:
        """Bounded where it is recorded."""
        return 0

    def hang_hint(self) -> str:
        """Nothing is known."""
        return ""

    def collect(self) -> list[str]:
        """End what still records, and fetch what each process made, once it has written it."""
        for worker in self._asked():
            self._end(worker)
        notes: list[str] = []
        until = time.monotonic() + _WRITING_SECONDS
        for worker in self._asked():
            self._fetch(worker, until, notes)
        return notes

    def abandon(self) -> None:
        """Call it off: a process that records then ends, and removes what it made."""
        for worker in self._known:
            with contextlib.suppress(OSError):
                Paths.of(worker.journal).remove()
        if not self._known and self._directory is not None:
            # Asked by an agent before this one, which has not found the processes again.
            _remove_asks(self._directory, lambda asked: asked == self._id)

    def forget(self) -> None:
        """Remove what is left."""
        self.abandon()

    def _asked(self) -> tuple[Worker, ...]:
        """The processes, the same from the first time on."""
        if not self._known:
            until = time.monotonic() + _GONE_SECONDS  # an agent that starts anew has to find them first
            while not (workers := tuple(self._workers())) and time.monotonic() < until:
                self._pause(_LOOK_SECONDS)
            if not workers:
                raise ToolError("the server has no process that could be captured")
            if wrong := next((one.name for one in workers if not _NAME.fullmatch(one.name)), None):
                raise ToolError(f"{wrong!r} is no name for a process")
            self._known = workers
        return self._known

    def _ask(self, seconds: float, steps: int | None, end: bool = False) -> Ask:
        options = self._options
        return Ask(
            self._id, self._tool, seconds, steps, options.cpu, options.stacks, time.monotonic_ns(), end
        )

    def _end(self, worker: Worker) -> None:
        """Tell a process that what it has recorded by now is enough, unless it has ended by itself."""
        said, paths = self._said(worker), Paths.of(worker.journal)
        if paths.ask.exists() and (said is None or said.state == "recording"):
            write(paths.ask, self._ask(self._seconds, self._steps, end=True))

    def _gone(self, worker: Worker) -> bool:
        now = time.monotonic()
        for one in self._workers():
            self._seen[one.journal] = now
        return now - self._seen.setdefault(worker.journal, now) > _GONE_SECONDS

    def _said(self, worker: Worker) -> Said | None:
        said = read_said(Paths.of(worker.journal).said)
        return said if said is not None and said.id == self._id else None

    def _look(self) -> list[Said | None]:
        found = []
        for worker in self._asked():
            said = self._said(worker)
            if said is not None and said.state == "failed":
                raise ToolError(f"{worker.name}: {said.reason}")
            if said is None or said.state == "recording":
                self._check_life(worker, said)
            found.append(said)
        return found

    def _check_life(self, worker: Worker, said: Said | None) -> None:
        if self._gone(worker):
            raise ToolError(f"{worker.name} ended while it was captured")
        waited = time.monotonic() - self._since
        if said is None and waited > _ANSWER_SECONDS:
            raise ToolError(
                f"{worker.name} did not answer within {_ANSWER_SECONDS:g} s: it hangs, or its probe gave up"
            )
        if waited > self._seconds + _ANSWER_SECONDS + _GRACE_SECONDS:
            raise ToolError(f"{worker.name} goes on recording after {waited:.0f} s")

    def _fetch(self, worker: Worker, until: float, notes: list[str]) -> None:
        paths = Paths.of(worker.journal)
        raw = self._folder / f"{RAW_PREFIX}{worker.name}.{self._tool}"
        while not raw.is_file():
            said = self._said(worker)
            if said is not None and said.state == "failed":
                raise ToolError(f"{worker.name}: {said.reason}")
            if said is not None and said.state == "done":
                self._keep(worker, said, paths.result, raw)
                break
            if self._gone(worker):
                raise ToolError(f"{worker.name} ended before its trace was written")
            if time.monotonic() > until:
                raise ToolError(f"{worker.name} did not write its trace within {_WRITING_SECONDS:g} s")
            self._pause(_LOOK_SECONDS)
        if (said := self._said(worker)) is not None:
            notes += [f"{worker.name}: {note}" for note in said.notes]
        paths.remove()

    def _keep(self, worker: Worker, said: Said, result: Path, raw: Path) -> None:
        while 0 <= time.monotonic_ns() - said.end_ns < _SETTLE_SECONDS * 1e9:
            self._pause(_LOOK_SECONDS)
        steps = journal_steps(worker.journal, said.begin_ns, said.end_ns)
        with (self._folder / f"{RAW_PREFIX}{worker.name}.npy").open("wb") as file:
            np.save(file, steps, allow_pickle=False)
        facts = {
            "name": worker.name,
            "begin_ns": said.begin_ns,
            "end_ns": said.end_ns,
            "clocks": [list(pair) for pair in said.clocks],
            "stacks": self._options.stacks,
            "device": str(worker.device.get("name", "")),
            "index": int(worker.device.get("index") or 0),
            "version": llmprobe.__version__,
        }
        write_json(self._folder / f"{RAW_PREFIX}{worker.name}.json", facts)
        draft = raw.with_name(f".{raw.name}")
        try:
            source = open_plain(result, MOST_RESULT_BYTES)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise ToolError(f"{worker.name}: what it recorded cannot be fetched: {why}") from None
        with os.fdopen(source, "rb") as taken, draft.open("wb") as file:
            shutil.copyfileobj(taken, file, 1 << 20)
        draft.chmod(0o600)
        draft.replace(raw)

    def _pause(self, seconds: float) -> None:
        if self._interrupted():
            raise Interrupted("waiting")
        time.sleep(seconds)


def sweep_asks(directory: Path, live: Collection[str]) -> None:
    """Remove what agents before this one asked for and nobody waits for any more. Raises nothing.

    Args:
        directory: the agent's shared directory.
        live: the ids of captures that go on.
    """
    _remove_asks(directory, lambda asked: asked not in live)


def _remove_asks(directory: Path, unwanted: Callable[[str | None], bool]) -> None:
    """Remove all asks of such captures, None for one that cannot be read, with what was answered."""
    with contextlib.suppress(OSError):
        for path in (directory / FOLDER).iterdir():
            if path.suffix == ".ask":
                asked = None
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    asked = str(json.loads(path.read_bytes()[:_MOST_ASK_BYTES])["id"])
                if unwanted(asked):
                    Paths(path, path.with_suffix(".said"), path.with_suffix(".result")).remove()
