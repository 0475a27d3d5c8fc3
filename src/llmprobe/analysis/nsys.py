"""Reading what Nsight Systems exports: SQLite of versions 2023.4 to 2025.x (export schema 3.x).

Tables appear only when they hold something, and columns come and go between versions, so each is looked for.
Columns and their meaning: https://docs.nvidia.com/nsight-systems/UserGuide/ ("SQLite Schema Reference").
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from llmprobe.analysis.database import Database, open_database
from llmprobe.analysis.events import (
    COPY,
    GRAPH,
    KERNEL,
    LATEST_NS,
    MAX_GPUS,
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
    no_activities,
    plausible,
    plausible_spans,
    printable,
)
from llmprobe.analysis.names import NameTable

KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
COPIES = "CUPTI_ACTIVITY_KIND_MEMCPY"
SETS = "CUPTI_ACTIVITY_KIND_MEMSET"
GRAPHS = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
CALLS = "CUPTI_ACTIVITY_KIND_RUNTIME"
RANGES = "NVTX_EVENTS"

#: NVTX_EVENTS.eventType
_PUSH_POP, _START_END, _DOMAIN_CREATE = 59, 60, 75
#: A serialized thread id without its lowest 24 bits is its process's id.
_PROCESS_MASK = ~0xFFFFFF
DOMAIN = "llmprobe"

#: ENUM_CUDA_MEMCPY_OPER, the kinds that LLM servers use; others are shown as "memcpy".
_COPY_NAMES = {
    1: "memcpy HtoD",
    2: "memcpy DtoH",
    3: "memcpy HtoA",
    8: "memcpy DtoD",
    9: "memcpy HtoH",
    10: "memcpy PtoP",
    11: "memcpy UVM HtoD",
    12: "memcpy UVM DtoH",
    13: "memcpy UVM DtoD",
}
_EXPORT_SECONDS = 600.0
_RANGE_COLUMNS = frozenset({"start", "end", "eventType", "domainId", "globalTid", "text"})
_PAYLOADS = ("int64Value", "uint64Value", "int32Value", "uint32Value")
#: Ranges beyond these are left out: ten an engine step would be 100 000 steps.
MAX_RANGES = 1_000_000


def read_nsys(path: Path, shown: Path | None = None) -> Trace:
    """The recording in an nsys SQLite file; ``shown`` is the path to name when another was exported to it."""
    with open_database(path) as data:
        if not any(table in data for table in ("StringIds", "META_DATA_EXPORT", KERNELS)):
            raise AnalysisError(f"{path}: a SQLite file, but not an nsys export: it has no table StringIds")
        names = NameTable()
        calls, launches = _calls(data, names)
        found, devices = _activities(data, names, launches)
        activities, implausible = plausible(found)
        return Trace(
            source=Source(
                path=str(shown or path),
                tool="nsys",
                format="nsys-rep" if shown else "nsys-sqlite",
                version=_version(data),
            ),
            names=names.names,
            devices=devices,
            activities=activities,
            ranges=_ranges(data, names),
            calls=plausible_spans(calls),
            recorded=_recorded(data),
            lost=lost_texts(data),
            implausible=implausible,
            cuda_traced=_cuda_traced(data),
        )


@contextmanager
def exported(report: Path, nsys: Path | None) -> Iterator[Path]:
    """A temporary SQLite export of an ``.nsys-rep`` file, by the ``nsys`` given or found on PATH."""
    program = str(nsys) if nsys else shutil.which("nsys")
    if not program:
        raise AnalysisError(
            f"{report}: reading .nsys-rep needs nsys, which is not on PATH; "
            f"where it is: nsys export --type sqlite -o OUT.sqlite {report.name}"
        )
    with tempfile.TemporaryDirectory(prefix="llmprobe-") as folder:
        target = Path(folder) / "export.sqlite"
        command = [program, "export", "--type", "sqlite", "--output", str(target), str(report.resolve())]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_EXPORT_SECONDS, check=False
            )
        except OSError as error:
            raise AnalysisError(f"{report}: cannot run {program}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise AnalysisError(
                f"{report}: nsys export took longer than {_EXPORT_SECONDS:.0f} s and was ended"
            ) from None
        if done.returncode or not target.is_file():
            said = (done.stderr or done.stdout).decode("utf-8", "replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), f"exit status {done.returncode}")
            raise AnalysisError(f"{report}: nsys export failed: {printable(last.strip())[:300]}")
        yield target


class _Strings:
    """Texts of StringIds by id."""

    def __init__(self, data: Database, names: NameTable) -> None:
        self._data = data
        self._names = names

    def intern(self, ids: Ints, missing: str) -> Ints:
        """Indices of the name table for string ids; an id without a text gives ``missing``."""
        distinct, inverse = np.unique(ids, return_inverse=True)
        texts = self._texts([int(value) for value in distinct])
        found = [self._names.add(texts.get(int(value), missing)) for value in distinct]
        return np.array(found, dtype=np.int64)[inverse] if len(ids) else ids

    def _texts(self, ids: list[int]) -> dict[int, str]:
        texts: dict[int, str] = {}
        if "StringIds" not in self._data:
            return texts
        for first in range(0, len(ids), 500):
            part = ids[first : first + 500]
            marks = ",".join("?" * len(part))
            query = f"SELECT id, CAST(value AS TEXT) FROM StringIds WHERE id IN ({marks})"
            for number, text in self._data.rows(query, part):
                if isinstance(number, int) and isinstance(text, str):
                    texts[number] = text
        return texts


class _Launches:
    """When and in which thread each correlation id of each process was launched."""

    def __init__(self, begin: Ints, thread: Ints, correlation: Ints) -> None:
        # A call may be recorded twice, as runtime and as driver call below it: the outer, earlier one counts.
        process = thread & _PROCESS_MASK
        order = np.argsort(begin, kind="stable")
        order = order[np.argsort(correlation[order], kind="stable")]
        if len(process) and (process != process[0]).any():
            order = order[np.argsort(process[order], kind="stable")]
        process, correlation = process[order], correlation[order]
        fresh = np.ones(len(order), dtype=np.bool_)
        fresh[1:] = (np.diff(process) != 0) | (np.diff(correlation) != 0)
        #: Which of the rows given are no calls below another one.
        self.outer = np.zeros(len(order), dtype=np.bool_)
        self.outer[order[fresh]] = True
        self._process, self._correlation = process[fresh], correlation[fresh]
        self._begin, self._thread = begin[order][fresh], thread[order][fresh]

    def of(self, process: Ints, correlation: Ints) -> tuple[Ints, Ints]:
        """Begin of the launching call and its thread, each `UNKNOWN` where it was not recorded."""
        begin = np.full(len(process), UNKNOWN, dtype=np.int64)
        thread = begin.copy()
        for number in np.unique(process):
            first = np.searchsorted(self._process, number, side="left")
            last = np.searchsorted(self._process, number, side="right")
            launches = np.arange(first, last)  # sorted by correlation id within the process
            if number == UNKNOWN:  # a schema that does not tell: they are taken to be of one process
                launches = np.argsort(self._correlation, kind="stable")
            if not len(launches):
                continue
            rows = np.flatnonzero(process == number)
            known = self._correlation[launches]
            at = np.minimum(np.searchsorted(known, correlation[rows]), len(known) - 1)
            hit = known[at] == correlation[rows]
            begin[rows[hit]] = self._begin[launches[at[hit]]]
            thread[rows[hit]] = self._thread[launches[at[hit]]]
        return begin, thread


def _calls(data: Database, names: NameTable) -> tuple[Spans, _Launches]:
    if CALLS in data:
        data.require(CALLS, "start", "correlationId")
    # Their ends are not needed, and each column of a million rows takes 0.15 s.
    begin, thread, correlation, name = data.read(CALLS, ("start", "globalTid", "correlationId", "nameId"))
    called = _Strings(data, names).intern(name, "CUDA call")
    unknown = np.full(len(begin), UNKNOWN, dtype=np.int64)
    launches = _Launches(begin, thread, correlation)
    calls = Spans(begin, unknown, called, thread, unknown)
    return calls.where(launches.outer | (correlation == UNKNOWN)), launches


def _activities(data: Database, names: NameTable, launches: _Launches) -> tuple[Activities, list[str]]:
    strings = _Strings(data, names)
    parts: list[list[Ints]] = []
    for table, kind in ((KERNELS, KERNEL), (COPIES, COPY), (SETS, SET), (GRAPHS, GRAPH)):
        if table not in data:
            continue
        data.require(table, "start", "end", "deviceId")
        what = {
            KERNEL: "demangledName|shortName|mangledName",
            COPY: "copyKind",
            SET: "memKind",
            GRAPH: "graphId|graphExecId",
        }[kind]
        begin, end, device, process, correlation, name, size = data.read(
            table, ("start", "end", "deviceId", "globalPid", "correlationId", what, "bytes")
        )
        if kind == KERNEL:
            name = strings.intern(name, "kernel without a name")
        else:
            name = _other_names(names, kind, name)
        size = np.clip(size, 0, MOST_BYTES)
        parts.append(
            [begin, end, np.full(len(begin), kind, dtype=np.int64), device, process, correlation, name, size]
        )
    if not parts:
        return no_activities(), []
    begin, end, kinds, device, process, correlation, name, size = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    launched, thread = launches.of(process, correlation)
    index, devices = _devices(data, device, process)
    return by_begin(Activities(begin, end, kinds, index, name, launched, thread, size)), devices


def _other_names(names: NameTable, kind: int, values: Ints) -> Ints:
    distinct, inverse = np.unique(values, return_inverse=True)
    texts = []
    for value in distinct:
        if kind == COPY:
            texts.append(_COPY_NAMES.get(int(value), "memcpy"))
        else:
            texts.append("memset" if kind == SET else f"CUDA graph {int(value)}")
    found = np.array([names.add(text) for text in texts], dtype=np.int64)
    return found[inverse] if len(values) else values


def _devices(data: Database, device: Ints, process: Ints) -> tuple[Ints, list[str]]:
    """Each activity's GPU as an index, and the GPUs' names.

    ``deviceId`` counts what the process sees (CUDA_VISIBLE_DEVICES), as CUDA and the other tools do. Where it
    is ambiguous, as of two processes with one GPU each, nsys's numbers of the machine's GPUs are taken, where
    the file has them. They are another count: one calls a process's GPUs 0 to 3 there 2, 0, 1 and 3.
    """
    gpu, one_to_one = device.copy(), False
    columns = data.read("TARGET_INFO_CUDA_DEVICE", ("gpuId", "cudaId", "pid"))
    seen_by = {(pid, cuda): gpu for gpu, cuda, pid in zip(*(one.tolist() for one in columns), strict=True)}
    if seen_by and len(device):
        processes, of_process = np.unique(process, return_inverse=True)
        ordinals, of_ordinal = np.unique(device, return_inverse=True)
        if len(processes) * len(ordinals) <= MAX_GPUS * MAX_GPUS:
            # A serialized process id holds the pid in bits 24 to 47.
            pids = ((processes >> 24) & 0xFFFFFF).tolist()
            table = [[seen_by.get((pid, number), number) for number in ordinals.tolist()] for pid in pids]
            gpu = np.array(table, dtype=np.int64)[of_process, of_ordinal]
            used = {divmod(one, len(ordinals)) for one in np.unique(of_process * len(ordinals) + of_ordinal)}
            pairs = {(int(ordinals[at]), table[of][at]) for of, at in used}
            one_to_one = len(pairs) == len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs})
    shown: dict[int, str] = {}
    if {"id", "name"} <= data.columns.get("TARGET_INFO_GPU", frozenset()):
        for number, name in data.rows("SELECT id, CAST(name AS TEXT) FROM TARGET_INFO_GPU LIMIT 1024"):
            if isinstance(number, int) and isinstance(name, str):
                shown[number] = printable(name)
    if one_to_one:
        gpu, shown = device, {mine: shown[theirs] for mine, theirs in pairs if theirs in shown}
    return label_devices(gpu, shown, data.path)


def own_domains(data: Database) -> set[tuple[int, int]]:
    """(Process, domain) of each NVTX domain of llmprobe; domains are numbered within each process."""
    if not data.columns.get(RANGES, frozenset()) >= _RANGE_COLUMNS:
        return set()
    join, text = _range_text(data)
    query = f"SELECT e.globalTid, e.domainId FROM {RANGES} AS e {join} WHERE e.eventType = ? AND {text} = ?"
    return {
        (thread & _PROCESS_MASK, domain)
        for thread, domain in islice(data.rows(query, (_DOMAIN_CREATE, DOMAIN)), 4096)
        if isinstance(thread, int) and isinstance(domain, int)
    }


def range_rows(
    data: Database, domains: set[tuple[int, int]]
) -> Iterator[tuple[int, int, int, int, str, int]]:
    """(Begin, end, thread, domain, name, payload) of the ranges in these domains; end -1 if cut off."""
    if not domains:
        return
    join, text = _range_text(data)
    payloads = [name for name in _PAYLOADS if name in data.columns[RANGES]]
    payload = f"coalesce({', '.join('e.' + name for name in payloads)}, -1)" if payloads else "-1"
    numbers = sorted({domain for _, domain in domains})[:256]
    marks = ",".join("?" * len(numbers))
    query = (
        "SELECT ifnull(CAST(e.start AS INTEGER), 0), ifnull(CAST(e.end AS INTEGER), -1), "
        "ifnull(CAST(e.globalTid AS INTEGER), -1), CAST(e.domainId AS INTEGER), "
        f"CAST({text} AS TEXT), CAST({payload} AS INTEGER) FROM {RANGES} AS e {join} "
        f"WHERE e.eventType IN ({_PUSH_POP}, {_START_END}) AND e.domainId IN ({marks})"
    )
    for begin, end, thread, domain, label, value in islice(data.rows(query, numbers), MAX_RANGES):
        if (thread & _PROCESS_MASK, domain) in domains:
            yield begin, end, thread, domain, label or "", value


def _range_text(data: Database) -> tuple[str, str]:
    """The join and the expression that give a range's name: in the row itself, or registered in StringIds."""
    if "textId" in data.columns[RANGES] and "StringIds" in data:
        return "LEFT JOIN StringIds AS s ON s.id = e.textId", "coalesce(e.text, s.value)"
    return "", "e.text"


def _ranges(data: Database, names: NameTable) -> Spans:
    """llmprobe's own ranges."""
    rows = sorted(
        (begin, end, names.add(label), thread, value)
        for begin, end, thread, _, label, value in range_rows(data, own_domains(data))
    )
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return plausible_spans(Spans(*np.ascontiguousarray(columns)))


def _version(data: Database) -> str:
    if {"name", "value"} <= data.columns.get("META_DATA_EXPORT", frozenset()):
        for (text,) in data.rows(
            "SELECT CAST(value AS TEXT) FROM META_DATA_EXPORT WHERE name = 'EXPORT_PRODUCT_VERSION'"
        ):
            return printable(str(text))[:40]
    return ""


def _recorded(data: Database) -> Ints | None:
    if {"startTime", "stopTime"} <= data.columns.get("ANALYSIS_DETAILS", frozenset()):
        begin, end = data.read("ANALYSIS_DETAILS", ("startTime", "stopTime"))
        if len(begin) and 0 <= begin.min() < end.max() <= LATEST_NS:
            return np.array([[begin.min(), end.max()]], dtype=np.int64)
    return None


def lost_texts(data: Database) -> list[str]:
    """What nsys itself says about events it could not keep.

    Not what it says whenever a program goes on behind the recording: activities that ran when it was stopped
    are dropped as incomplete. That is a cut end. Launches without a kernel are looked for by `judge`.
    """
    if "text" not in data.columns.get("DIAGNOSTIC_EVENT", frozenset()):
        return []
    wanted = " OR ".join(
        f"text LIKE '%{word}%'" for word in ("drop", "lost", "overflow", "may be incomplete")
    )
    query = (
        f"SELECT CAST(text AS TEXT) FROM DIAGNOSTIC_EVENT WHERE ({wanted}) "
        "AND text NOT LIKE '%incomplete CUPTI events%' LIMIT 20"
    )
    return [printable(str(text))[:200] for (text,) in data.rows(query)]


def _cuda_traced(data: Database) -> bool:
    """Whether CUDA was traced; scrubbed and old files that do not tell count as if it was."""
    if KERNELS in data or CALLS in data or "META_DATA_CAPTURE" not in data:
        return True
    if not {"name", "value"} <= data.columns["META_DATA_CAPTURE"]:
        return True
    said = [
        str(value)
        for (value,) in data.rows("SELECT value FROM META_DATA_CAPTURE WHERE name LIKE '%COLLECT_CUDA_TRACE'")
    ]
    return not said or any(value == "true" for value in said)
