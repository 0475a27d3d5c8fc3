"""Captures on disk: a folder each, how much they may take together, and the way to their files.

Nothing here takes a path from outside: ids and file names are checked against their form and an allow-list,
and every file is opened relative to its folder without following links.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmprobe.capture.session import FINAL, Capture, is_id

STATE_NAME = "capture.json"
#: What a finished capture shows; the scrubbed file, never the one that the tool wrote.
REPORT_JSON = "report.json"
REPORT_TEXT = "report.txt"
SCRUBBED = "capture.sqlite"
LIVE = "live.json"
#: Holds the target's whole environment.
RAW = "capture.nsys-rep"
PUBLIC_FILES = (REPORT_JSON, REPORT_TEXT, SCRUBBED, LIVE)
RAW_FILES = (RAW,)
#: One of each worker process; ``.raw`` ones are kept only where Python's calls were asked for.
_WORKER_FILES = re.compile(
    r"(torch|kernels)-((engine\d{1,5}-)?rank\d{1,5}(-\d{1,3})?)\.(json\.gz|npz)", re.ASCII
)
_RAW_WORKER_FILES = re.compile(r"torch-(engine\d{1,5}-)?rank\d{1,5}(-\d{1,3})?\.raw\.json\.gz", re.ASCII)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: Less than this free, and nothing is started.
LEAST_FREE_BYTES = 512 << 20
#: Less than this free, and a recording is ended early.
STOP_FREE_BYTES = 256 << 20
#: A folder without a state is one that is being made, for so long.
_BEING_MADE_SECONDS = 60.0
#: So many captures that have ended are kept, failed ones too.
MOST_ENDED = 200


def is_public(name: str) -> bool:
    """Whether a file of this name may be asked for."""
    return name in PUBLIC_FILES or _WORKER_FILES.fullmatch(name) is not None


def is_raw(name: str) -> bool:
    """Whether one of this name may be, by who says that he wants it all the same."""
    return name in RAW_FILES or _RAW_WORKER_FILES.fullmatch(name) is not None


class StoreError(Exception):
    """The capture directory cannot be used; the message names it and what to do."""


def default_directory(directory: Path) -> Path:
    """Where captures are kept unless ``LLMPROBE_CAPTURE_DIR`` says so: on disk, beside other temporary files.

    Not in the agent's own directory, which lies in shared memory. Whether it can be used is for
    `Store.prepare` to find out: `tempfile.gettempdir` tries by writing, and raises on a full disk, where an
    agent has to start too.
    """
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"{directory.name}-captures"


class Store:
    """The captures in one directory."""

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        least_free_bytes: int = LEAST_FREE_BYTES,
        most_ended: int = MOST_ENDED,
    ) -> None:
        """
        Args:
            root: ``LLMPROBE_CAPTURE_DIR``; made at the first capture.
            max_bytes: what all captures together may take; the oldest go first, the newest stays until the
                next is asked for.
            clock: Unix seconds.
            least_free_bytes: of the file system, without which no capture starts.
            most_ended: how many captures that have ended are kept; the oldest go first.
        """
        self.root = root
        self.max_bytes = max_bytes
        self._clock = clock
        self._least_free = least_free_bytes
        self._most_ended = most_ended

    def prepare(self) -> None:
        """Make sure that a capture can be kept.

        Raises:
            StoreError: the directory cannot be made or written, is somebody else's, or its disk is full.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._open_root() as root:
                found = os.fstat(root)
                if found.st_uid != os.getuid():
                    raise StoreError(
                        f"{self.root} belongs to another user; set LLMPROBE_CAPTURE_DIR to a folder of yours"
                    )
                if stat.S_IMODE(found.st_mode) & 0o022:
                    raise StoreError(
                        f"others may write in {self.root}: chmod 700 it, or set LLMPROBE_CAPTURE_DIR"
                    )
                probe = f".probe-{secrets.token_hex(6)}"
                os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=root))
                os.unlink(probe, dir_fd=root)
            free = self.free_bytes()
        except OSError as error:
            raise self._unusable("captures cannot be kept in", error) from None
        if free < self._least_free:
            raise StoreError(
                f"{self.root} has {free >> 20} MiB free, and a capture wants {self._least_free >> 20}: "
                "make room, or set LLMPROBE_CAPTURE_DIR to another disk"
            )

    def _unusable(self, what: str, error: OSError) -> StoreError:
        no_folder = error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP)
        why = "that is no folder" if no_folder else os.strerror(error.errno or 0)
        hint = "set LLMPROBE_CAPTURE_DIR to a folder that the server's user may write, and start it again"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = f"mount a writable volume at {self.root}, or {hint}"
        return StoreError(f"{what} {self.root}: {why}; {hint}")

    def free_bytes(self) -> int:
        """What is free where captures are kept."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def new_id(self) -> str:
        """An id that sorts by time."""
        return time.strftime("%Y%m%d-%H%M%S-", time.gmtime(self._clock())) + secrets.token_hex(3)

    def create(self, capture: Capture) -> Path:
        """Make a capture's folder, and room for it: the oldest finished captures go.

        Raises:
            StoreError: it cannot be made.
        """
        self.trim()  # first: what fills the disk may be ours
        self.prepare()
        folder = self.folder(capture.id)
        try:
            folder.mkdir(mode=0o700)
            self.write(capture)
        except OSError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise StoreError(f"cannot make {folder}: {os.strerror(error.errno or 0)}") from None
        return folder

    def folder(self, capture_id: str) -> Path:
        """The folder of a capture. Raises KeyError for what is no id."""
        if not is_id(capture_id):
            raise KeyError(capture_id)
        return self.root / capture_id

    def write(self, capture: Capture) -> None:
        """Keep a capture's state, whole or not at all."""
        write_json(self.folder(capture.id) / STATE_NAME, capture.to_json())

    def read(self, capture_id: str) -> Capture:
        """A capture as it was kept. Raises KeyError if there is none."""
        try:
            with self.open(capture_id, STATE_NAME, (STATE_NAME,)) as fd:
                return Capture.from_json(json.loads(_read_all(fd)))
        except (OSError, ValueError, RecursionError):
            raise KeyError(capture_id) from None

    def all(self) -> list[Capture]:
        """Every capture that can be read, newest first."""
        found = []
        for name in self._names():
            with contextlib.suppress(KeyError):
                found.append(self.read(name))
        return found

    def _names(self) -> list[str]:
        """The ids that have folders, newest first."""
        try:
            return sorted((path.name for path in self.root.iterdir() if is_id(path.name)), reverse=True)
        except OSError:
            return []

    def remove(self, capture_id: str) -> None:
        """Delete a capture and its files.

        Raises:
            KeyError: there is none.
            StoreError: it cannot be deleted.
        """
        folder = self.folder(capture_id)
        if folder.is_symlink() or not folder.is_dir():
            raise KeyError(capture_id)
        # Renamed first: what a crash leaves half deleted is no capture any more.
        doomed = self.root / f".removed-{capture_id}"
        try:
            folder.rename(doomed)
        except FileNotFoundError:  # somebody was faster
            raise KeyError(capture_id) from None
        except OSError as error:
            raise self._unusable("nothing can be removed from", error) from None
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what an agent before this one had begun to delete."""
        with contextlib.suppress(OSError):
            for path in self.root.glob(".removed-*"):
                shutil.rmtree(path, ignore_errors=True)

    def trim(self, keep: str | None = None) -> list[str]:
        """Delete the oldest captures that have ended until the rest is neither too large nor too many.

        And, where that helps, until a capture may start: the disk may be full of ours.

        Args:
            keep: the id of one that stays, whatever it takes.

        Returns:
            Their ids.
        """
        states = {capture.id: capture.state for capture in self.all()}
        names = self._names()
        sizes = {name: self.size(name) for name in names}
        ended = [name for name in names if (states[name] in FINAL if name in states else self._lost(name))]
        may_go = [name for name in reversed(ended) if name != keep]
        too_many, too_large = len(ended) - self._most_ended, sum(sizes.values()) - self.max_bytes
        missing = self._missing_bytes()
        if missing > sum(sizes[one] for one in may_go):
            missing = 0  # of no use: something else fills the disk
        removed = []
        for one in may_go:
            if max(too_many, too_large, missing) <= 0:
                break
            with contextlib.suppress(StoreError, KeyError):
                self.remove(one)
                removed.append(one)
                too_many, too_large, missing = too_many - 1, too_large - sizes[one], missing - sizes[one]
        return removed

    def _lost(self, capture_id: str) -> bool:
        """Whether a capture's state is torn or gone: shown nowhere, it takes room all the same."""
        try:
            with self.open(capture_id, STATE_NAME, (STATE_NAME,)) as fd:
                Capture.from_json(json.loads(_read_all(fd)))
            return False
        except OSError as error:
            if error.errno != errno.ENOENT:  # there may be one, and it may run
                return False
        except (ValueError, RecursionError):
            pass
        with contextlib.suppress(OSError):
            return self._clock() - self.folder(capture_id).stat().st_mtime > _BEING_MADE_SECONDS
        return False

    def _missing_bytes(self) -> int:
        """How much more must be free for a capture to start."""
        with contextlib.suppress(OSError):
            return self._least_free - self.free_bytes()
        return 0

    def tidy(self, capture_id: str, *, files: bool = True) -> None:
        """Delete what lies in a capture's folder and is not shown, as far as that can be done.

        Args:
            files: whether what is shown stays; its state always does.
        """
        with contextlib.suppress(OSError):
            for path in list(self.folder(capture_id).iterdir()):
                shown = files and (is_public(path.name) or is_raw(path.name))
                if path.name == STATE_NAME or shown:
                    continue
                with contextlib.suppress(OSError):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()

    def size(self, capture_id: str) -> int:
        """Bytes that a capture takes."""
        total = 0
        with contextlib.suppress(OSError), os.scandir(self.folder(capture_id)) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_size
        return total

    def files(self, capture_id: str) -> dict[str, int]:
        """The files of a capture that may be asked for, with their size in bytes."""
        found: dict[str, int] = {}
        try:
            names = sorted(path.name for path in self.folder(capture_id).iterdir())
        except OSError:
            return found
        for name in (*PUBLIC_FILES, *(name for name in names if name not in PUBLIC_FILES)):
            with contextlib.suppress(OSError, KeyError), self.open(capture_id, name) as fd:
                found[name] = os.fstat(fd).st_size
        return found

    @contextlib.contextmanager
    def open(self, capture_id: str, name: str, allowed: tuple[str, ...] | None = None) -> Iterator[int]:
        """A file of a capture, as a descriptor to read from.

        Raises:
            KeyError: no such capture, or no such file may be asked for.
            OSError: it is not there, or not a plain file of ours.
        """
        may = name in allowed if allowed is not None else is_public(name) or is_raw(name)
        if not is_id(capture_id) or not may:
            raise KeyError(name)
        with contextlib.ExitStack() as held:
            root = held.enter_context(self._open_root())
            folder = os.open(capture_id, _DIRECTORY, dir_fd=root)
            held.callback(os.close, folder)
            file = os.open(name, _FILE, dir_fd=folder)
            held.callback(os.close, file)
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.getuid():
                raise OSError(errno.EPERM, "not a plain file of ours", name)
            yield file

    @contextlib.contextmanager
    def _open_root(self) -> Iterator[int]:
        # The root itself may lie behind a link: it is the operator's to choose.
        root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield root
        finally:
            os.close(root)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, also after a crash. Mode 0600."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_all(fd: int) -> str:
    with os.fdopen(os.dup(fd), "r") as file:
        return file.read(1 << 20)
