"""From a profiler's file to what an operator should know: busy and idle, phases, kernels, gaps, findings.

`analyze` reads nsys SQLite exports, ``.nsys-rep`` where nsys is there to export it, torch profiler traces,
and the files of ``kernels`` captures.
"""

from __future__ import annotations

from pathlib import Path

from llmprobe.analysis.events import AnalysisError, Trace
from llmprobe.analysis.kernel_file import MAGIC as _KERNELS
from llmprobe.analysis.kernel_file import read_kernels
from llmprobe.analysis.kineto import read_kineto
from llmprobe.analysis.nsys import exported, read_nsys
from llmprobe.analysis.report import Report, make_report

__all__ = ["AnalysisError", "Report", "analyze", "read_trace"]

_SQLITE = b"SQLite format 3\0"
_RECORDINGS = (".sqlite", ".nsys-rep", ".json.gz", ".npz")
_NSYS_REPORT = b"NVIDIA Tegra Profiler Report"


def analyze(path: Path, *, nsys: Path | None = None) -> Report:
    """What is in a profiler's file.

    Args:
        path: nsys SQLite, ``.nsys-rep``, kineto JSON, gzipped or not, or the file of a ``kernels`` capture.
        nsys: the program that exports ``.nsys-rep`` files; by default the one on PATH.

    Raises:
        AnalysisError: the file is missing, damaged or of no known kind, or nsys is needed and missing; one
            line.
    """
    return make_report(read_trace(path, nsys=nsys))


def read_trace(path: Path, *, nsys: Path | None = None) -> Trace:
    """The recording in a profiler's file, told by its content, not by its name. Errors as `analyze`."""
    path = Path(path)
    try:
        if path.is_dir():
            raise AnalysisError(f"{path}: is a folder{_named_in(path)}")
        if not path.is_file():
            raise AnalysisError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as stream:
            head = stream.read(64)
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not head:
        raise AnalysisError(f"{path}: is empty")
    if head.startswith(_SQLITE):
        return read_nsys(path)
    if head.startswith(_NSYS_REPORT) or path.suffix in (".nsys-rep", ".qdrep"):
        with exported(path, nsys) as database:
            return read_nsys(database, shown=path)
    if head.startswith(_KERNELS):
        return read_kernels(path)
    return read_kineto(path)


def _named_in(folder: Path) -> str:
    """Which file of a folder may be meant."""
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(_RECORDINGS))
    return f": name a file in it, such as {folder / names[0]}" if names else ""
