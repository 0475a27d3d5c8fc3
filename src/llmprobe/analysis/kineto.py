"""Reading PyTorch profiler traces (kineto's Chrome trace JSON, plain or gzipped).

The file is read piece by piece and each event decoded alone, so memory holds columns of numbers, never the
document: a trace of 500 MB would be ten times that as Python objects.
"""

from __future__ import annotations

import math
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.analysis.events import (
    COPY,
    KERNEL,
    LATEST_NS,
    MOST_BYTES,
    SET,
    UNKNOWN,
    Activities,
    AnalysisError,
    Ints,
    Source,
    Spans,
    Trace,
    by_begin,
    label_devices,
    no_spans,
    plausible,
    plausible_spans,
    printable,
)
from llmprobe.analysis.host_operators import HostOperators
from llmprobe.analysis.json_stream import Document, opened
from llmprobe.analysis.names import NameTable
from llmprobe.compute.steps import Bools

MAX_EVENTS = 40_000_000
_MOST_THREADS = 100_000
_KEY_CHARS = 100

_DEVICE_CATEGORIES = {"kernel": KERNEL, "gpu_memcpy": COPY, "gpu_memset": SET}
_CALL_CATEGORIES = frozenset({"cuda_runtime", "cuda_driver", "runtime", "driver"})
_MARKS = frozenset({"user_annotation"})
#: What vLLM's profiler marks its forward pass with: requests (tokens) in prefill and in decode.
VLLM_STEP = re.compile(r"execute_(?:\d+_)?context_(\d+)\((?:sq)?(\d+)[^)]*\)_generation_(\d+)\((?:sq)?(\d+)")
#: Steps on the device, written into the trace from a journal.
_DEVICE_MARKS = "gpu_user_annotation"
#: A range of ours inside a torch profile.
OWN_PREFIX = "llmprobe:"
#: Until when we recorded: what torch says of operators after that may be wrong.
RECORDED_UNTIL = "llmprobe:recorded_until"


def read_kineto(path: Path) -> Trace:
    """The recording in a kineto JSON file."""
    reader = _Reader(path)
    for event in trace_events(path, reader.top_level):
        reader.take(event)
    return reader.trace()


def trace_events(path: Path, top_level: Callable[[str, Any], None]) -> Iterator[Any]:
    """The events of a Chrome trace; other values of the document go to ``top_level(key, value)``.

    Raises:
        AnalysisError: the file is no trace, or damaged.
    """
    try:
        with opened(path) as stream:
            document = Document(stream, path, top_level)
            yield from document.events()
    except (OSError, EOFError, zlib.error) as error:
        raise AnalysisError(f"{path}: cannot be read to its end: {error}") from None
    except RecursionError:
        raise AnalysisError(f"{path}: JSON nested too deeply for a trace") from None
    if not document.has_events:
        raise AnalysisError(f"{path}: JSON, but not a Chrome trace: it has no list traceEvents")


class _Columns:
    """Rows of whole numbers that grow."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._flat = array("q")

    def add(self, *row: int) -> None:
        self._flat.extend(row)

    def __bool__(self) -> bool:
        return bool(self._flat)

    def arrays(self) -> list[Ints]:
        flat = np.frombuffer(self._flat, dtype=np.int64) if self._flat else np.empty(0, dtype=np.int64)
        return list(np.ascontiguousarray(flat.reshape(-1, self._width).T))


class _Reader:
    """Sorts events into columns as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = NameTable()
        self._activities = _Columns(7)  # begin, end, kind, device, name, correlation, bytes
        self._calls = _Columns(5)  # begin, end, name, thread, correlation
        self._own = _Columns(5)  # begin, end, name, thread, value
        self._engine = _Columns(5)  # the same, of ranges that the engine marked
        self._steps = _Columns(5)  # begin, end, name, device, tokens: ours, of the device's clock
        self._threads: dict[tuple[Any, Any], int] = {}
        self._operators = HostOperators()
        self._has_operators = False
        self._device_names: dict[int, str] = {}
        self._version = ""
        self._until: int | None = None
        self._events = 0

    def top_level(self, key: str, value: Any) -> None:
        """A value beside the events."""
        if key == "deviceProperties" and isinstance(value, list):
            for device in value[:1024]:
                if isinstance(device, dict) and isinstance(device.get("id"), int):
                    self._device_names[device["id"]] = printable(str(device.get("name", "")))
        elif key in ("torch_version", "pytorch_version") and isinstance(value, str):
            self._version = printable(value)[:40]

    def take(self, event: Any) -> None:
        """One event of the list."""
        if not isinstance(event, dict):
            return
        if event.get("ph") == "i" and event.get("name") == RECORDED_UNTIL:
            self._until = _ns(event.get("ts"))
        if event.get("ph") != "X":
            return
        self._events += 1
        if self._events > MAX_EVENTS:
            raise AnalysisError(f"{self._path}: more than {MAX_EVENTS} events: profile fewer steps")
        begin, length = _ns(event.get("ts")), _ns(event.get("dur", 0))
        name = event.get("name")
        if begin is None or length is None or not isinstance(name, str):
            return
        category = event.get("cat")
        if not isinstance(category, str):
            return
        category = category.lower()
        end = begin + length
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        kind = _DEVICE_CATEGORIES.get(category)
        if kind is not None:
            device = _whole(args.get("device"), _whole(event.get("pid"), 0))
            size = _whole(args.get("bytes"), 0)
            correlation = _whole(args.get("correlation"), UNKNOWN)
            name = _activity_name(name, kind)
            self._activities.add(
                begin, end, kind, device, self._names.add(name), correlation, min(max(size, 0), MOST_BYTES)
            )
            return
        if category == _DEVICE_MARKS:
            device = _whole(args.get("device"), UNKNOWN)
            # Kineto repeats a range of the host for each stream, under the same name and without a device.
            if name.startswith(OWN_PREFIX) and device != UNKNOWN:
                label = self._names.add(name[len(OWN_PREFIX) :])
                self._steps.add(begin, end, label, device, _whole(args.get("tokens"), UNKNOWN))
            return
        thread = self._thread(event)
        if category in _CALL_CATEGORIES:
            correlation = _whole(args.get("correlation"), UNKNOWN)
            self._calls.add(begin, end, self._names.add(name), thread, correlation)
            # As in PyTorch's key_averages: a call into CUDA is no own time of the operator that makes it.
            self._operators.add(thread, begin, end, name)
        elif category in _MARKS:
            self._mark(name, begin, end, thread, _whole(args.get("tokens"), UNKNOWN))
        elif category == "cpu_op":
            self._has_operators = True
            self._operators.add(thread, begin, end, name)

    def _mark(self, name: str, begin: int, end: int, thread: int, tokens: int) -> None:
        if name.startswith(OWN_PREFIX):
            label = name[len(OWN_PREFIX) :]
            self._own.add(begin, end, self._names.add(label), thread, tokens)
            return
        step = VLLM_STEP.match(name[:200])
        if step is None:
            return
        prompts, prompt_tokens, decodes, decode_tokens = (int(group[:15]) for group in step.groups())
        if not prompts and not decodes:  # nothing was scheduled: no step
            return
        label = "mixed" if prompts and decodes else "prefill" if prompts else "decode"
        self._engine.add(begin, end, self._names.add(label), thread, prompt_tokens + decode_tokens)

    def _thread(self, event: dict[str, Any]) -> int:
        key = (_key(event.get("pid")), _key(event.get("tid")))
        found = self._threads.get(key)
        if found is None:
            if len(self._threads) >= _MOST_THREADS:  # of a made-up file: they are one
                return len(self._threads)
            found = self._threads[key] = len(self._threads)
        return found

    def trace(self) -> Trace:
        """What was taken, as one trace."""
        begin, end, kind, device, name, correlation, size = self._activities.arrays()
        call_begin, call_end, call_name, call_thread, call_correlation = self._calls.arrays()
        launched, thread, outer = _launches(correlation, call_begin, call_thread, call_correlation)
        index, labels = label_devices(device, self._device_names, self._path)
        activities, implausible = plausible(Activities(begin, end, kind, index, name, launched, thread, size))
        calls = Spans(call_begin, call_end, call_name, call_thread, np.full(len(call_begin), UNKNOWN))
        calls = calls.where(outer)
        return Trace(
            source=Source(str(self._path), tool="torch", format="kineto-json", version=self._version),
            names=self._names.names,
            devices=labels,
            activities=by_begin(activities),
            # Both mark the same steps.
            ranges=plausible_spans(Spans(*(self._own.arrays() if self._own else self._engine.arrays()))),
            calls=plausible_spans(calls),
            device_ranges=_on_devices(self._steps.arrays(), device),
            implausible=implausible,
            host_operators=self._operators.result(self._until) if self._has_operators else [],
            # Without a GPU in the profile, kineto lists no devices.
            cuda_traced=bool(self._device_names) or len(begin) > 0 or len(call_begin) > 0,
        )


def _on_devices(steps: list[Ints], devices: Ints) -> Spans:
    """Ranges of devices by number as ranges of devices by index; those of devices where nothing ran go."""
    begin, end, name, number, tokens = steps
    known = np.unique(devices)
    if not len(known):
        return no_spans()
    at = np.minimum(np.searchsorted(known, number), len(known) - 1)
    return plausible_spans(Spans(begin, end, name, at, tokens).where(known[at] == number))


def _activity_name(name: str, kind: int) -> str:
    """Copies under the names that other tools' files get: ``Memcpy HtoD (Pageable -> Device)``."""
    if kind == COPY:
        words = name.split()
        return f"memcpy {words[1]}" if len(words) > 1 else "memcpy"
    return "memset" if kind == SET else name


def _launches(correlation: Ints, begin: Ints, thread: Ints, known: Ints) -> tuple[Ints, Ints, Bools]:
    """When and where each correlation id was launched: by the outermost call that carries it.

    And which calls are no calls below another one.
    """
    launched = np.full(len(correlation), UNKNOWN, dtype=np.int64)
    launcher = launched.copy()
    order = np.lexsort((begin, known))
    outer = known <= 0
    order = order[known[order] > 0]
    ids, first = np.unique(known[order], return_index=True)
    outer[order[first]] = True
    if not len(order) or not len(correlation):
        return launched, launcher, outer
    at = np.minimum(np.searchsorted(ids, correlation), len(ids) - 1)
    hit = (ids[at] == correlation) & (correlation > 0)
    launched[hit] = begin[order][first][at[hit]]
    launcher[hit] = thread[order][first][at[hit]]
    return launched, launcher, outer


def _ns(microseconds: Any) -> int | None:
    if isinstance(microseconds, bool) or not isinstance(microseconds, (int, float)):
        return None
    # In this order: an integer of thousands of digits fits no float.
    if abs(microseconds) > LATEST_NS / 1000 or not math.isfinite(microseconds):
        return None
    return round(microseconds * 1000)


def _whole(value: Any, otherwise: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62:
        return value
    return otherwise


def _key(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_KEY_CHARS]
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return value
    return repr(value)[:_KEY_CHARS]
