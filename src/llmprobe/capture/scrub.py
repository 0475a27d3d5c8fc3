"""Copies of profiler files that hold nothing of the machine, its users or the program's surroundings.

An nsys file holds the whole environment of the program and of its launchers, command lines, host and user
names, paths, and what the program printed, in a dozen places; a torch trace holds paths, source lines,
thread names and arguments. So nothing is deleted from a copy: a new file is written from what is allowed,
and what is not named stays out. What is allowed:

- times, sizes, counts and numeric ids of what ran on the GPUs and of calls into CUDA,
- names of kernels, of CUDA calls, of framework operators, and of llmprobe's own ranges,
- the GPUs' model names, the tool's version, and whether and how CUDA was traced.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llmprobe.analysis.database import open_database
from llmprobe.analysis.events import AnalysisError, printable
from llmprobe.analysis.kernel_file import MAGIC as _KERNELS
from llmprobe.analysis.nsys import exported
from llmprobe.capture.scrub_database import copy_allowed
from llmprobe.capture.scrub_trace import allowed_events, allowed_top_level

_SQLITE = b"SQLite format 3\0"
_NSYS_REPORT = b"NVIDIA Tegra Profiler Report"


Further = Callable[[int], Iterable[dict[str, Any]]]


class ScrubError(Exception):
    """A file cannot be scrubbed, and no output was left; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def scrub(
    source: Path, target: Path, *, nsys: Path | None = None, further: Further = lambda base_ns: ()
) -> None:
    """Write a copy of ``source`` without anything that could be secret or personal to ``target``.

    ``target`` appears whole or not at all, readable by its owner only, and must not exist. An ``.nsys-rep``
    is exported first (by ``nsys``, or the one on PATH), so its copy is SQLite. A trace is gzipped if
    ``target`` ends in ``.gz``.

    Args:
        further: gives events that are added to a trace, from the nanoseconds at which its times begin.

    Raises:
        ScrubError: the source is missing, damaged or of no known kind, or the target cannot be written.
    """
    source, target = Path(source), Path(target)
    head = _head(source)
    try:
        if os.path.lexists(target):
            raise ScrubError(f"{target}: is there already; remove it or name another with -o")
        with _written_whole(target) as draft:
            if head.startswith(_SQLITE):
                _scrub_database(source, draft)
            elif head.startswith(_NSYS_REPORT):
                with exported(source, nsys) as database:
                    _scrub_database(database, draft)
            else:
                _scrub_trace(source, draft, further, zipped=target.suffix == ".gz")
    except AnalysisError as error:
        raise ScrubError(str(error)) from None
    except (OSError, ValueError) as error:
        raise ScrubError(
            f"{target}: cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None


def _head(source: Path) -> bytes:
    """What tells the source's kind."""
    try:
        if not source.is_file():
            raise ScrubError(f"{source}: {'not a regular file' if source.exists() else 'no such file'}")
        with source.open("rb") as stream:
            head = stream.read(64)
    except (OSError, ValueError) as error:
        raise ScrubError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if head.startswith(_KERNELS):
        raise ScrubError(
            f"{source}: the file of a kernels capture needs no scrubbing: "
            "it was written without paths and environment"
        )
    return head


def scrubbed_name(source: Path) -> Path:
    """Where a scrubbed copy goes unless told otherwise: ``x.sqlite`` → ``x.scrubbed.sqlite``."""
    name = source.name
    for suffix in (".sqlite", ".json.gz", ".json", ".nsys-rep"):
        if name.endswith(suffix):
            kept = ".sqlite" if suffix == ".nsys-rep" else suffix
            return source.with_name(f"{name[: -len(suffix)]}.scrubbed{kept}")
    return source.with_name(f"{name}.scrubbed")


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A file beside ``target`` that becomes it, or goes away."""
    # Made by mkdtemp and mkstemp, so it is its owner's alone and follows nobody's link.
    with tempfile.TemporaryDirectory(prefix=".llmprobe-scrub-", dir=target.parent) as folder:
        draft = Path(folder) / "draft"
        yield draft
        draft.chmod(0o600)
        # A link fails where the name is taken, a rename would replace what is there.
        try:
            os.link(draft, target)
        except FileExistsError:
            raise ScrubError(f"{target}: is there already; remove it or name another with -o") from None
        except OSError:  # a file system without links
            draft.replace(target)


def _scrub_database(source: Path, draft: Path) -> None:
    with open_database(source) as data:
        output = sqlite3.connect(draft)
        try:
            output.execute("PRAGMA journal_mode = OFF")
            output.execute("PRAGMA synchronous = OFF")
            tables = copy_allowed(data, output)
            output.commit()
            output.execute("VACUUM")
        except sqlite3.Error as error:
            # Reading and writing are mixed here; a full disk says so itself.
            raise ScrubError(f"{source}: cannot be copied: {error}") from None
        finally:
            output.close()
    if not tables:
        raise ScrubError(f"{source}: nothing in it may stay: not an nsys export")


def _scrub_trace(source: Path, draft: Path, further: Further, *, zipped: bool) -> None:
    beside: dict[str, Any] = {}

    def keep(key: str, value: Any) -> None:
        with suppress(KeyError):
            beside[key] = allowed_top_level(key, value)

    with _text_file(draft, zipped) as stream:
        stream.write('{"traceEvents": [\n')
        separator = ""
        for event in allowed_events(source, keep):
            stream.write(separator + json.dumps(event, allow_nan=False))
            separator = ",\n"
        for event in further(int(beside.get("baseTimeNanoseconds", 0))):
            stream.write(separator + json.dumps(event, allow_nan=False))
            separator = ",\n"
        stream.write("\n]")
        for key, value in beside.items():
            stream.write(f",\n{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        stream.write("}\n")


def _text_file(draft: Path, zipped: bool) -> IO[str]:
    if zipped:
        # Neither the name nor the time of the file goes into its header.
        return io.TextIOWrapper(gzip.GzipFile("", "wb", 6, draft.open("wb"), 0), encoding="ascii")
    return draft.open("w", encoding="ascii")
