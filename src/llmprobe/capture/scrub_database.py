"""What of an nsys SQLite export may leave the machine, table by table and column by column.

Most columns are copied as numbers, whatever a row holds, so no text can pass in them. Texts come from a few
places only, each with the form that it must have. The tables are those of the "SQLite Schema Reference" in
the Nsight Systems User Guide.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator

from llmprobe.analysis.database import Database
from llmprobe.analysis.nsys import DOMAIN, RANGES, lost_texts, own_domains, range_rows

_ON_DEVICE = "start end deviceId contextId greenContextId streamId correlationId globalPid"

#: Table → the columns that stay, as numbers.
NUMBERS = {
    "CUPTI_ACTIVITY_KIND_KERNEL": f"{_ON_DEVICE} demangledName shortName mangledName launchType cacheConfig "
    "registersPerThread gridX gridY gridZ blockX blockY blockZ staticSharedMemory dynamicSharedMemory "
    "localMemoryPerThread localMemoryTotal gridId sharedMemoryExecuted graphNodeId sharedMemoryLimitConfig "
    "graphId clusterX clusterY clusterZ",
    "CUPTI_ACTIVITY_KIND_MEMCPY": f"{_ON_DEVICE} bytes copyKind srcKind dstKind srcDeviceId dstDeviceId "
    "graphNodeId copyCount",
    "CUPTI_ACTIVITY_KIND_MEMSET": f"{_ON_DEVICE} bytes memKind graphNodeId",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": f"{_ON_DEVICE} graphId graphExecId",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": f"{_ON_DEVICE} syncType eventId eventSyncId",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end eventClass globalTid correlationId nameId returnValue",
    "CUDA_GRAPH_EVENTS": "start end eventClass globalTid nameId graphId originalGraphId graphExecId",
    "CUDA_GRAPH_NODE_EVENTS": "start end eventClass globalTid nameId graphNodeId originalGraphNodeId",
    "OSRT_API": "start end eventClass globalTid nameId nestingLevel",
    "ANALYSIS_DETAILS": "duration startTime stopTime",
    "TARGET_INFO_SESSION_START_TIME": "utcEpochNs",
    "TARGET_INFO_CUDA_DEVICE": "gpuId cudaId pid numMultiprocessors",
    "TARGET_INFO_CUDA_STREAM": "streamId hwId vmId processId contextId priority flag",
}

_NAME = re.compile(r"[A-Za-z_]\w{0,127}")
_MODEL = re.compile(r"[\w .()+-]{1,80}")
_LABEL = re.compile(r"[\w ()/:.,+&'-]{0,120}")
_VALUE = re.compile(r"[\w.:-]{0,40}")
_PATH = re.compile(r"(?:[/\\][^\s/\\,()<>:]+){2,}")

#: (table, column) that refers to StringIds → what its texts are: names of kernels, or of functions.
STRINGS = {
    ("CUPTI_ACTIVITY_KIND_KERNEL", "demangledName"): "kernel",
    ("CUPTI_ACTIVITY_KIND_KERNEL", "shortName"): "kernel",
    ("CUPTI_ACTIVITY_KIND_KERNEL", "mangledName"): "kernel",
    ("CUPTI_ACTIVITY_KIND_RUNTIME", "nameId"): "function",
    ("CUDA_GRAPH_EVENTS", "nameId"): "function",
    ("CUDA_GRAPH_NODE_EVENTS", "nameId"): "function",
    ("OSRT_API", "nameId"): "function",
}

#: Table → the numbers and the texts that stay of a table of few rows.
_GPU = (
    "id isDiscrete l2CacheSize totalMemory memoryBandwidth clockRate smCount maxWarpsPerSm computeMajor "
    "computeMinor",
    "name chipName",
)
_ENUM = re.compile(r"ENUM_(NSYS_EVENT_TYPE|NSYS_EVENT_CLASS|CUDA_[A-Z_]+|CUPTI_[A-Z_]+)")
#: Rows of META_DATA_EXPORT and META_DATA_CAPTURE that stay.
_META = re.compile(
    r"EXPORT_PRODUCT_(NAME|VERSION|DATE)|EXPORT_SCHEMA_VERSION(_[A-Z]+)?|EXPORT_(PLATFORM|ARCH)|"
    r"CAPTURE_EVENT_TYPE|RUN_DURATION_MS|PROCESS_\d{1,4}:COLLECT_(CUDA|NVTX)_TRACE|CUDA_GRAPH_TRACE_OPTIONS:MODE"
)
_META_VALUE = re.compile(r"[\w .-]{0,40}")
SCRUBBED_LOSS = "Events were lost; what the tool said about it is scrubbed."


def kernel_name(name: str) -> str:
    """A kernel's name; a path in it, as compilers put it into names of lambdas, is cut out."""
    return _PATH.sub("/…", name)[:4096]


def function_name(name: str) -> str:
    """A function's name, or a stand-in for a text that is none."""
    return name if _NAME.fullmatch(name) else "function"


def copy_allowed(data: Database, output: sqlite3.Connection) -> list[str]:
    """Copy what may stay into an empty database; the tables that were copied."""
    copied = []
    for table, names in NUMBERS.items():
        columns = [name for name in names.split() if name in data.columns.get(table, ())]
        if columns:
            _copy(data, output, table, columns)
            copied.append(table)
    _ranges(data, output, copied)
    _small(data, output, copied)
    if copied or "StringIds" in data:
        _strings(data, output, copied)
        copied.append("StringIds")
    return copied


def _copy(data: Database, output: sqlite3.Connection, table: str, columns: list[str]) -> None:
    _create(output, table, dict.fromkeys(columns, "INTEGER"))
    fields = ", ".join(f'CAST("{name}" AS INTEGER)' for name in columns)
    _insert(output, table, len(columns), data.rows(f'SELECT {fields} FROM "{table}"'))


def _ranges(data: Database, output: sqlite3.Connection, copied: list[str]) -> None:
    """llmprobe's own ranges; other ranges' texts are whatever a program put into them."""
    if RANGES not in data:
        return
    columns = dict.fromkeys(
        [
            "start",
            "end",
            "eventType",
            "rangeId",
            "globalTid",
            "endGlobalTid",
            "textId",
            "domainId",
            "int64Value",
        ],
        "INTEGER",
    )
    _create(output, RANGES, {**columns, "text": "TEXT"})
    domains = own_domains(data)
    created = ((0, None, 75, None, thread, None, None, domain, None, DOMAIN) for thread, domain in domains)
    _insert(output, RANGES, 10, created)
    rows = (
        (begin, None if end == -1 else end, 59, None, thread, None, None, domain, value, function_name(text))
        for begin, end, thread, domain, text, value in range_rows(data, domains)
    )
    _insert(output, RANGES, 10, rows)
    copied.append(RANGES)


def _small(data: Database, output: sqlite3.Connection, copied: list[str]) -> None:
    for table in sorted(data.columns):
        if table == "TARGET_INFO_GPU":
            _copy_labelled(data, output, table, *_GPU, _MODEL)
        elif _ENUM.fullmatch(table):
            _copy_labelled(data, output, table, "id", "name label", _LABEL)
        elif table in ("META_DATA_EXPORT", "META_DATA_CAPTURE"):
            _copy_meta(data, output, table)
        else:
            continue
        copied.append(table)
    if lost_texts(data):
        _create(output, "DIAGNOSTIC_EVENT", {"text": "TEXT"})
        _insert(output, "DIAGNOSTIC_EVENT", 1, iter([(SCRUBBED_LOSS,)]))
        copied.append("DIAGNOSTIC_EVENT")


def _copy_labelled(
    data: Database, output: sqlite3.Connection, table: str, numbers: str, texts: str, form: re.Pattern[str]
) -> None:
    columns = {name: "INTEGER" for name in numbers.split() if name in data.columns[table]}
    columns.update({name: "TEXT" for name in texts.split() if name in data.columns[table]})
    if not columns:
        return
    _create(output, table, columns)
    fields = ", ".join(f'CAST("{name}" AS {kind})' for name, kind in columns.items())
    rows = (
        tuple(value if not isinstance(value, str) or form.fullmatch(value) else None for value in row)
        for row in data.rows(f'SELECT {fields} FROM "{table}" LIMIT 10000')
    )
    _insert(output, table, len(columns), rows)


def _copy_meta(data: Database, output: sqlite3.Connection, table: str) -> None:
    _create(output, table, {"name": "TEXT", "value": "TEXT"})
    if not {"name", "value"} <= data.columns[table]:
        return
    found = data.rows(f"SELECT CAST(name AS TEXT), CAST(value AS TEXT) FROM {table} LIMIT 100000")
    rows = (
        (name, value)
        for name, value in found
        if isinstance(name, str)
        and isinstance(value, str)
        and _META.fullmatch(name)
        and _META_VALUE.fullmatch(value)
    )
    _insert(output, table, 2, rows)


def _strings(data: Database, output: sqlite3.Connection, copied: list[str]) -> None:
    """The texts that the copied columns refer to, each in the form that its column calls for."""
    output.execute("CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL)")
    if not {"id", "value"} <= data.columns.get("StringIds", frozenset()):
        return
    kinds: dict[int, str] = {}
    for (table, column), kind in STRINGS.items():
        if table in copied and column in data.columns[table]:
            for (number,) in output.execute(f'SELECT DISTINCT "{column}" FROM "{table}"'):
                if isinstance(number, int):
                    kinds.setdefault(number, kind)
    numbers = sorted(kinds)
    for first in range(0, len(numbers), 500):
        part = numbers[first : first + 500]
        marks = ",".join("?" * len(part))
        rows = (
            (number, kernel_name(text) if kinds[number] == "kernel" else function_name(text))
            for number, text in data.rows(
                f"SELECT id, CAST(value AS TEXT) FROM StringIds WHERE id IN ({marks})", part
            )
            if isinstance(number, int) and isinstance(text, str)
        )
        output.executemany("INSERT OR IGNORE INTO StringIds VALUES (?, ?)", rows)


def _create(output: sqlite3.Connection, table: str, columns: dict[str, str]) -> None:
    fields = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
    output.execute(f'CREATE TABLE "{table}" ({fields})')


def _insert(output: sqlite3.Connection, table: str, width: int, rows: Iterator[tuple[object, ...]]) -> None:
    output.executemany(f'INSERT INTO "{table}" VALUES ({",".join("?" * width)})', rows)
