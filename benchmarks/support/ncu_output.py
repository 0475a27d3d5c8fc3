"""What ``ncu --csv --page raw`` printed: each launch with the bytes that it moved between L2 and DRAM.

The file holds ncu's own messages, each behind ``==PROF==``, ``==WARNING==`` or ``==ERROR==``, then one line
of column names, one of units, and one line a launch in the order of the launches. Numbers may have commas
between thousands. With ``--nvtx`` a column more, ``thread Domain:Push/Pop_Range:PL_Type:…``, holds the thread
and every range that was open when the launch was made, each quoted and its fields divided by colons.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: What to ask ncu for, in the order of `Kernel`.
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # ``--print-units base``: byte
_PUSHED = "Push/Pop_Range"
_MESSAGE = re.compile(r"==(ERROR|WARNING)== .*")
_PASSES = re.compile(r"^==PROF== Profiling .* - (\d+) pass(?:es)?$", re.MULTILINE)
_SHOWN = 20


class NcuFailed(Exception):
    """ncu or the program in it ended badly; the message says what it said last."""


@dataclass(frozen=True)
class Kernel:
    """One launch, as ncu counted it. ``in_range``: inside of the range asked for; None without ``--nvtx``."""

    name: str
    read_bytes: float
    written_bytes: float
    in_range: bool | None


def read_kernels(text: str, pushed: str) -> list[Kernel]:
    """The launches, in order.

    Args:
        pushed: the NVTX range to look for, as ``domain:name``.

    Raises:
        NcuFailed: there are none, or one lacks a figure; the message ends with what ncu complained of.
    """
    lines = text.splitlines()
    head = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise NcuFailed(f"ncu has profiled nothing:\n{complaints(text)}")
    rows = list(csv.DictReader(lines[head:]))
    missing = [name for name in METRICS if name not in rows[0]] if rows else METRICS
    if missing:
        raise NcuFailed(f"ncu's lines have no {', '.join(missing)}:\n{lines[head]}\n{complaints(text)}")
    units = next((row for row in rows if not row["ID"]), {})
    kernels = []
    for row in rows:
        if not (row["ID"] or "").isdigit():  # units, and messages behind the launches
            continue
        values = [_bytes(row, units, name, text) for name in METRICS]
        ranges = [value or "" for name, value in row.items() if name and _PUSHED in name]
        inside = any(f"{pushed}:" in value for value in ranges) if ranges else None
        kernels.append(Kernel(row["Kernel Name"], *values, inside))
    return kernels


def steps_of(kernels: Sequence[Kernel], mark: str) -> list[list[Kernel]]:
    """Divided at each kernel whose name holds ``mark``; without these, and without what lies before them."""
    steps: list[list[Kernel]] = []
    for kernel in kernels:
        if mark in kernel.name:
            steps.append([])
        elif steps:
            steps[-1].append(kernel)
    return steps


def most_passes(text: str) -> int | None:
    """How often ncu ran the launch that it ran most often. None where it does not say.

    More than once means that later passes found in the GPU's caches what the first had left there.
    """
    return max((int(found) for found in _PASSES.findall(text)), default=None)


def complaints(text: str) -> str:
    """The last errors and warnings of ncu; the last lines of the file if there are none."""
    lines = text.splitlines()
    return "\n".join([line for line in lines if _MESSAGE.match(line)][-_SHOWN:] or lines[-_SHOWN:])


def _bytes(row: Mapping[str, str], units: Mapping[str, str], name: str, text: str) -> float:
    unit = units.get(name, "")
    value = math.nan
    with contextlib.suppress(KeyError, ValueError, AttributeError):
        value = float(row[name].replace(",", "")) * _UNITS[unit]
    if not math.isfinite(value):
        launch = f"{row['ID']} ({row['Kernel Name']})"
        raise NcuFailed(f"launch {launch}: {name} is {row[name]!r} {unit!r}\n{complaints(text)}")
    return value
