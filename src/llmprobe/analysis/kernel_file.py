"""The files of ``kernels`` captures: every kernel, copy and set of some seconds, and the steps meanwhile.

A file is numpy's ``.npz``: ``header`` (JSON as bytes), ``activities`` and ``steps``, both of one process.
"""

from __future__ import annotations

import json
import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from llmprobe.analysis.events import (
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
from llmprobe.analysis.names import NameTable

SCHEMA = 1
MAGIC = b"PK\x03\x04"
_MEMBERS = ("header.npy", "activities.npy", "steps.npy")
_MOST_BYTES = 1 << 30
_ACTIVITY = ("begin", "end", "name", "stream", "device", "kind")
_STEP = ("begin", "end", "name", "tokens")


def read_kernels(path: Path) -> Trace:
    """The recording in a file of a ``kernels`` capture.

    Raises:
        AnalysisError: it is none, or damaged.
    """
    try:
        _check(path)
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(bytes(data["header"]))
            activities, steps = data["activities"], data["steps"]
        return _trace(path, header, _columns(activities, _ACTIVITY), _columns(steps, _STEP))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
        raise AnalysisError(f"{path}: cannot be read to its end: {error}") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        MemoryError,
        RuntimeError,  # zipfile: a member that is encrypted
    ) as error:
        raise AnalysisError(f"{path}: damaged, or no file of a kernels capture: {error}") from None


def write_kernels(path: Path, header: dict[str, Any], activities: np.ndarray, steps: np.ndarray) -> None:
    """Write such a file; ``header`` as `read_kernels` wants it: see there. Raises OSError."""
    said = json.dumps({"schema": SCHEMA, **header}).encode()
    with path.open("wb") as file:
        np.savez_compressed(
            file, header=np.frombuffer(said, dtype=np.uint8), activities=activities, steps=steps
        )


def _check(path: Path) -> None:
    """A small file may unpack without end."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sorted(member.filename for member in members) != sorted(_MEMBERS):
            raise ValueError("other members")
        if sum(member.file_size for member in members) > _MOST_BYTES:
            raise AnalysisError(f"{path}: holds more than {_MOST_BYTES >> 20} MiB")
        for member in members:
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("a member that is encrypted, or packed in another way")
            _check_size(archive, member)


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """numpy asks for as much memory as a member's head says, whatever follows it."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](stream)  # type: ignore[no-untyped-call]
        if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError("a member of another size than it says")


def _columns(rows: np.ndarray, names: tuple[str, ...]) -> list[Ints]:
    if rows.ndim != 1 or rows.dtype.names is None or set(rows.dtype.names) != set(names):
        raise ValueError("other columns")
    if any(rows.dtype[name].kind not in "iu" for name in names):
        raise ValueError("columns that are no whole numbers")
    return [np.ascontiguousarray(rows[name]).astype(np.int64) for name in names]


def _trace(path: Path, header: dict[str, Any], activities: list[Ints], steps: list[Ints]) -> Trace:
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema {header['schema']!r}")
    table = NameTable()
    names = np.array([table.add(str(name)) for name in header["names"]] or [0], dtype=np.int64)
    labels = np.array([table.add(str(name)) for name in header["ranges"]] or [0], dtype=np.int64)
    begin, end, name, _, device, kind = activities
    for index, most in ((name, len(header["names"])), (steps[2], len(header["ranges"]))):
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= most):
            raise ValueError("a name is missing")
    if len(kind) and (int(kind.min()) < 0 or int(kind.max()) > SET):
        raise ValueError("activities of no known kind")
    nothing = np.full(len(begin), UNKNOWN, dtype=np.int64)
    shown = {int(number): printable(str(label))[:80] for number, label in header["devices"].items()}
    index, devices = label_devices(device, shown, path)
    known, implausible = plausible(
        Activities(begin, end, kind, index, names[name], nothing, nothing, np.zeros_like(begin))
    )
    # The engine's process drives one device as a rule; else the steps are those of the busiest.
    busiest = int(np.bincount(index).argmax()) if len(index) else 0
    marked = Spans(steps[0], steps[1], labels[steps[2]], np.full(len(steps[0]), busiest), steps[3])
    dropped = int(header["dropped"])
    return Trace(
        source=Source(
            str(path), tool="kernels", format="kernels-npz", version=printable(str(header["version"]))[:40]
        ),
        names=table.names,
        devices=devices,
        activities=by_begin(known),
        ranges=no_spans(),
        calls=no_spans(),
        device_ranges=plausible_spans(marked),
        recorded=np.array([[int(header["begin_ns"]), int(header["end_ns"])]], dtype=np.int64),
        lost=[f"{dropped} records or more have no times, or found no room"] if dropped else [],
        implausible=implausible,
    )
