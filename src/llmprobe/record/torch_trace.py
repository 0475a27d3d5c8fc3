"""One recording by torch's own profiler, begun and ended beside the engine's thread.

``torch.profiler`` means to be used by the thread that it profiles, and ends with the interpreter lock held:
for about 6 µs an event while it sorts what it saw, and 3 µs while it writes it. With half a million events an
engine would stand still for five seconds. So where torch is one of those that were tried, its functions are
called without the lock, as they are for a recording that kineto's own thread began and ends.
"""

from __future__ import annotations

import ctypes
import gzip
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmprobe.record.asked import MOST_RESULT_BYTES
from llmprobe.record.cupti import injected
from llmprobe.record.memory import available_bytes, resident_bytes
from llmprobe.record.room import Room

#: Without so much memory left nothing is begun.
LEAST_MEMORY_BYTES = 2 << 30
#: An event takes about 0.5 KiB while it is recorded, and three times that when it is written.
MOST_GROWTH_BYTES = 384 << 20
_LEAST_DISK_BYTES = 1 << 30
_PREFIX = "llmprobe-torch-"
_LEFT_SECONDS = 3600.0
_CHUNK_BYTES = 1 << 20
_OLDEST, _NEWEST = (2, 7), (2, 13)  #: versions of torch whose functions may be called without the lock

#: As true as True, and yet another: whoever starts or stops a profiler meanwhile leaves True or False.
_OURS = 1

_DISABLE = "_ZN5torch8autograd8profiler15disableProfilerEv"
_SAVE = (
    "_ZN5torch8autograd8profiler14ProfilerResult4saveERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
)
_DESTROY = "_ZN5torch8autograd8profiler14ProfilerResultD1Ev"
_DELETE = "_ZdlPv"


class TorchTraceError(Exception):
    """No recording, or none that can be used; the message says why."""


def unavailable(cuda: bool) -> str | None:
    """Why torch's profiler cannot record this process; None if it can.

    Args:
        cuda: whether the process drives a CUDA device.
    """
    if tool := injected():
        return (
            f"a profiler was injected into this process ({tool}) and holds CUPTI: "
            "one started by `llmprobe run --nsys` is captured with nsys"
        )
    torch = sys.modules.get("torch")
    if torch is None:
        return "this process has no torch"
    try:
        if not torch.profiler.kineto_available():
            return "its torch was built without kineto"
        if not cuda:
            _all_threads(True)
    except (AttributeError, TypeError):
        return f"torch {torch.__version__} cannot record other threads: 2.7 and newer can"
    return None


def stops_the_engine(cuda: bool) -> str | None:
    """Why a recording would stop the engine for a while at its end; None if it would not.

    Args:
        cuda: whether the process drives a CUDA device.
    """
    if cuda or _Unlocked.find() is None:
        return "its end would hold the interpreter lock for several microseconds an event"
    return None


def _all_threads(cpu: bool) -> Any:
    from torch._C._profiler import _ExperimentalConfig

    return _ExperimentalConfig(profile_all_threads=True) if cpu else _ExperimentalConfig()


class TorchTrace:
    """`start`, `look` now and then, `stop`, `save`: all on one thread, which is none of the engine's."""

    def __init__(self, cuda: bool, cpu: bool, stacks: bool) -> None:
        """
        Args:
            cuda: record kernels, copies and calls into CUDA.
            cpu: record operators on the host, of all threads.
            stacks: with the Python calls around them.
        """
        self._cuda = cuda
        self._cpu = cpu or stacks or not cuda
        self._stacks = stacks
        self._profiler: Any = None
        self._unlocked: _Unlocked | None = None
        self._result: Any = None
        self._resident = 0
        self.notes: list[str] = []

    def start(self) -> None:
        """Record from now on. Raises TorchTraceError."""
        left = available_bytes()
        if left is not None and left < LEAST_MEMORY_BYTES:
            raise TorchTraceError(
                f"{left >> 20} MiB of memory are left, and a torch capture wants {LEAST_MEMORY_BYTES >> 20}"
            )
        from torch.autograd.profiler import profile

        self._profiler = profile(
            use_kineto=True,
            use_cpu=self._cpu,
            use_device="cuda" if self._cuda else None,
            with_stack=self._stacks,
            experimental_config=_all_threads(self._cpu),
        )
        # Python frames are put in order by Python code, which wants the lock. On CUDA devices nobody has seen
        # it end without: what throws there ends the process, so the lock is held.
        self._unlocked = None if self._stacks or self._cuda else _Unlocked.find()
        if self._unlocked is None:
            self.notes.append("the interpreter lock was held while the trace was put together")
        try:
            self._profiler._prepare_trace()
            self._profiler._start_trace()
        except RuntimeError as error:
            _flag(False)
            raise TorchTraceError(f"torch's profiler did not start: {error}") from None
        _flag(_OURS)
        # From here on: what the first start sets up is no event. CUPTI alone brings some hundred MiB.
        self._resident = resident_bytes()

    def look(self) -> str | None:
        """Why it must end now, if it must. Raises TorchTraceError if another profiler came in between."""
        if not _undisturbed():
            raise TorchTraceError("another torch profiler began in this process")
        grown = resident_bytes() - self._resident
        if grown > MOST_GROWTH_BYTES:
            return f"ended early: the process grew by {grown >> 20} of {MOST_GROWTH_BYTES >> 20} MiB allowed"
        return None

    def stop(self) -> None:
        """End the recording and put the trace together. Raises TorchTraceError."""
        from torch.autograd.profiler import _disable_profiler

        undisturbed = _undisturbed() and (self._cpu or _of_this_thread())
        try:
            if self._unlocked is not None and undisturbed:
                self._result = self._unlocked.disable()
            else:  # where it fails it raises; without the lock it would end the process
                self._unlocked = None
                self._result = _disable_profiler()
        except RuntimeError as error:
            raise TorchTraceError(f"torch's profiler did not end: {error}") from None
        finally:
            if undisturbed:
                _flag(False)
        if not undisturbed:
            raise TorchTraceError("another torch profiler began in this process")

    def save(self, target: Path) -> None:
        """Write the trace, gzipped. Raises TorchTraceError or OSError; then nothing is left behind."""
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            if shutil.disk_usage(folder).free < _LEAST_DISK_BYTES:
                raise TorchTraceError(f"less than {_LEAST_DISK_BYTES >> 20} MiB are free in {folder.parent}")
            raw = folder / "trace.json"
            if self._unlocked is not None:
                self._unlocked.save(self._result, str(raw))
            else:
                self._result.save(str(raw))
            self.forget()
            if not raw.is_file():
                raise TorchTraceError("torch's profiler wrote nothing")
            _zip(raw, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def forget(self) -> None:
        """Give the memory back."""
        result, self._result = self._result, None
        if self._unlocked is not None and result:
            self._unlocked.free(result)


def _flag(value: Any) -> None:
    """Torch's own note that a profiler runs, in whatever thread."""
    sys.modules["torch.autograd.profiler"]._is_profiler_enabled = value  # type: ignore[attr-defined]


def _undisturbed() -> bool:
    found = sys.modules["torch.autograd.profiler"]._is_profiler_enabled
    return type(found) is int and found == _OURS


def _of_this_thread() -> bool:
    import torch

    return bool(torch._C._autograd._profiler_enabled())


def _zip(raw: Path, target: Path) -> None:
    """Compression gives the interpreter lock away, so this stops nobody."""
    target.parent.mkdir(mode=0o700, exist_ok=True)
    room = Room(target.parent)
    draft = target.with_name(f".{target.name}.part")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with (
            raw.open("rb") as source,
            os.fdopen(fd, "wb") as file,
            gzip.GzipFile("", "wb", 3, file, 0) as packed,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                room.check(_CHUNK_BYTES)
                packed.write(chunk)
                if file.tell() > MOST_RESULT_BYTES:
                    raise TorchTraceError(
                        f"the trace is larger than {MOST_RESULT_BYTES >> 20} MiB: record less of it"
                    )
        draft.replace(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _sweep() -> None:
    """What an engine left that died while it wrote a trace."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            found = path.lstat()
        except OSError:
            continue
        if found.st_uid == os.getuid() and time.time() - found.st_mtime > _LEFT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


class _String(ctypes.Structure):
    """A ``std::string`` of libstdc++'s present ABI, whose text lies elsewhere."""

    _fields_ = [
        ("data", ctypes.c_char_p),
        ("size", ctypes.c_size_t),
        ("capacity", ctypes.c_size_t),
        ("unused", ctypes.c_size_t),
    ]


class _Returned(ctypes.Structure):
    """A ``std::unique_ptr`` comes back through memory, which ctypes does only for what is larger than one."""

    _fields_ = [("pointer", ctypes.c_void_p), ("unused", ctypes.c_void_p * 3)]


class _Unlocked:
    """Three functions of torch, by the names that fix their arguments; ctypes gives the lock away."""

    def __init__(self, library: Any) -> None:
        self._disable = library[_DISABLE]
        self._disable.restype, self._disable.argtypes = _Returned, []
        self._save = library[_SAVE]
        self._save.restype, self._save.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
        self._destroy = library[_DESTROY]
        self._destroy.restype, self._destroy.argtypes = None, [ctypes.c_void_p]
        self._delete = ctypes.CDLL("libstdc++.so.6")[_DELETE]
        self._delete.restype, self._delete.argtypes = None, [ctypes.c_void_p]

    @classmethod
    def find(cls) -> _Unlocked | None:
        """None where torch, or the machine, is not one of those that were tried."""
        import torch

        numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
        tried = numbers is not None and _OLDEST <= (int(numbers[1]), int(numbers[2])) <= _NEWEST
        if not tried or sys.platform != "linux" or platform.machine() != "x86_64":
            return None
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        try:
            return cls(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW))
        except (OSError, AttributeError):
            return None

    def disable(self) -> int:
        """Ends the recording of this thread; the result's address."""
        return int(self._disable().pointer or 0)

    def save(self, result: int, path: str) -> None:
        """Writes it."""
        text = path.encode()
        held = _String(text, len(text), len(text), 0)
        self._save(result, ctypes.addressof(held))

    def free(self, result: int) -> None:
        """Gives its memory back."""
        self._destroy(result)
        self._delete(result)
