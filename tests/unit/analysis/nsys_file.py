"""Builds SQLite files as nsys exports them, with tables of the real schema.

The tables' columns are those of the "SQLite Schema Reference" of Nsight Systems. What a GPU did is made up,
its form is not.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

PID = 4321
#: A serialized process id: hardware and virtual machine above, the pid in bits 24 to 47.
PROCESS = (1 << 56) | (PID << 24)
THREAD = PROCESS | 4330

_DEVICE = (
    "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, "
    "greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER"
)
SCHEMA = {
    "StringIds": "id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL",
    "CUPTI_ACTIVITY_KIND_KERNEL": _DEVICE
    + ", demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, "
    "launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER NOT NULL, "
    "gridX INTEGER NOT NULL, gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, "
    "blockX INTEGER NOT NULL, blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL, "
    "staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL, "
    "localMemoryPerThread INTEGER NOT NULL, localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, "
    "sharedMemoryExecuted INTEGER, graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMCPY": _DEVICE
    + ", bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, deprecatedSrcId INTEGER, srcKind INTEGER, "
    "dstKind INTEGER, srcDeviceId INTEGER, srcContextId INTEGER, dstDeviceId INTEGER, dstContextId INTEGER, "
    "migrationCause INTEGER, graphNodeId INTEGER, virtualAddress INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMSET": _DEVICE
    + ", value INTEGER NOT NULL, bytes INTEGER NOT NULL, graphNodeId INTEGER, memKind INTEGER",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": _DEVICE + ", graphId INTEGER NOT NULL, graphExecId INTEGER NOT NULL",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start INTEGER NOT NULL, end INTEGER NOT NULL, "
    "eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, "
    "returnValue INTEGER NOT NULL, callchainId INTEGER",
    "NVTX_EVENTS": "start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, "
    "category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, "
    "domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, "
    "int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT",
    "TARGET_INFO_GPU": "vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT, "
    "isDiscrete INTEGER, l2CacheSize INTEGER, totalMemory INTEGER, memoryBandwidth INTEGER, "
    "clockRate INTEGER, smCount INTEGER, pwGpuId INTEGER, uuid TEXT, luid INTEGER, chipName TEXT, "
    "cuDevice INTEGER, ctxswDevPath TEXT, ctrlDevPath TEXT",
    "TARGET_INFO_CUDA_DEVICE": "gpuId INTEGER, cudaId INTEGER NOT NULL, pid INTEGER NOT NULL, uuid TEXT, "
    "numMultiprocessors INTEGER",
    "ANALYSIS_DETAILS": "globalVid INTEGER NOT NULL, duration INTEGER NOT NULL, startTime INTEGER NOT NULL, "
    "stopTime INTEGER NOT NULL",
    "META_DATA_CAPTURE": "name TEXT NOT NULL, value TEXT",
    "META_DATA_EXPORT": "name TEXT NOT NULL, value TEXT",
    "DIAGNOSTIC_EVENT": "timestamp INTEGER, timestampType INTEGER, source INTEGER, severity INTEGER, "
    "text TEXT, globalPid INTEGER",
    "ENUM_CUDA_MEMCPY_OPER": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
    "ENUM_CUDA_MEM_KIND": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
}


class NsysFile:
    """One file; tables appear when the first row goes in, as in real exports."""

    def __init__(self, path: Path, without: tuple[str, ...] = ()) -> None:
        self.path = path
        self._data = sqlite3.connect(path)
        self._data.execute("PRAGMA synchronous = OFF")
        self._without = without
        self._strings: dict[str, int] = {}
        self._correlation = 0
        self._columns: dict[str, list[str]] = {}
        self.row("META_DATA_EXPORT", name="EXPORT_PRODUCT_VERSION", value="2025.3.1.90")
        self.row("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="3.20.0")
        self.string("[Unknown]")

    def close(self) -> Path:
        """Write it; the file's path."""
        self._data.commit()
        self._data.close()
        return self.path

    def string(self, text: str) -> int:
        """The id of a text."""
        found = self._strings.get(text)
        if found is None:
            found = self._strings[text] = len(self._strings)
            self.row("StringIds", id=found, value=text)
        return found

    def row(self, table: str, **values: object) -> None:
        """One row; columns that must not be NULL and are not given hold 0."""
        if table not in self._columns:
            columns = [
                column
                for column in SCHEMA[table].split(", ")
                if f"{table}.{column.split()[0]}" not in self._without
            ]
            self._data.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            self._columns[table] = columns
        names = [column.split()[0] for column in self._columns[table]]
        filled = [
            values.get(name, 0 if "NOT NULL" in column else None)
            for name, column in zip(names, self._columns[table], strict=True)
        ]
        self._data.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(filled))})", filled)

    def gpu(self, number: int = 0, name: str = "NVIDIA H100 80GB HBM3") -> None:
        """A GPU of the machine."""
        self.row("TARGET_INFO_GPU", id=number, name=name, uuid=f"GPU-secret-uuid-{number}")

    def call(self, name: str, begin: int, end: int | None = None, thread: int = THREAD) -> int:
        """A call into CUDA; its correlation id."""
        self._correlation += 1
        self.row(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=begin,
            end=begin + 3000 if end is None else end,
            globalTid=thread,
            correlationId=self._correlation,
            nameId=self.string(name),
        )
        return self._correlation

    def kernel(
        self,
        name: str,
        begin: int,
        end: int,
        *,
        launched: int | None = None,
        correlation: int | None = None,
        device: int = 0,
        thread: int = THREAD,
    ) -> None:
        """A kernel, and the call that launched it unless that is given or unknown."""
        if correlation is None and launched is not None:
            correlation = self.call("cudaLaunchKernel_v7000", launched, thread=thread)
        self.row(
            "CUPTI_ACTIVITY_KIND_KERNEL",
            start=begin,
            end=end,
            deviceId=device,
            streamId=7,
            correlationId=correlation,
            globalPid=thread & ~0xFFFFFF,
            demangledName=self.string(name),
            shortName=self.string(name.split("<")[0]),
        )

    def copy(
        self, kind: int, begin: int, end: int, size: int, device: int = 0, launched: int | None = None
    ) -> None:
        """A copy, its kind as in ENUM_CUDA_MEMCPY_OPER, and the call that launched it if that is known."""
        self.row(
            "CUPTI_ACTIVITY_KIND_MEMCPY",
            start=begin,
            end=end,
            deviceId=device,
            copyKind=kind,
            bytes=size,
            correlationId=None if launched is None else self.call("cudaMemcpyAsync_v3020", launched),
            globalPid=PROCESS,
        )

    def set(self, begin: int, end: int, size: int = 4) -> None:
        """A memset."""
        self.row("CUPTI_ACTIVITY_KIND_MEMSET", start=begin, end=end, bytes=size, globalPid=PROCESS)

    def graph(self, begin: int, end: int, launched: int) -> None:
        """A CUDA graph recorded whole."""
        correlation = self.call("cudaGraphLaunch_v10000", launched)
        self.row(
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE",
            start=begin,
            end=end,
            correlationId=correlation,
            globalPid=PROCESS,
            graphId=3,
        )

    def domain(self, name: str = "llmprobe", number: int = 1, thread: int = THREAD) -> None:
        """An NVTX domain."""
        self.row("NVTX_EVENTS", start=1, eventType=75, text=name, globalTid=thread, domainId=number)

    def range(
        self,
        name: str,
        begin: int,
        end: int | None,
        *,
        tokens: int | None = None,
        registered: bool = True,
        domain: int = 1,
        thread: int = THREAD,
    ) -> None:
        """An NVTX range; its name registered (as ours are) or in the row itself."""
        self.row(
            "NVTX_EVENTS",
            start=begin,
            end=end,
            eventType=59,
            globalTid=thread,
            domainId=domain,
            int64Value=tokens,
            **({"textId": self.string(name)} if registered else {"text": name}),
        )


def serving(path: Path, steps: int = 60, *, step_ns: int = 1_000_000, gap_ns: int = 100_000) -> Path:
    """A server that decodes: each step one prefill or decode range, ten kernels without space between.

    Steps follow each other with ``gap_ns`` of idle time; every 20th is a prefill.
    """
    file = NsysFile(path)
    file.gpu()
    file.domain()
    names = ("nvjet_hsh_128x64_TNT", "flash_fwd_splitkv_kernel<Traits>", "triton_red_fused_add_rms_norm_1")
    clock = 1_000_000_000
    for number in range(steps):
        phase = "prefill" if number % 20 == 0 else "decode"
        host = clock - 200_000
        file.range(phase, host, host + 150_000, tokens=512 if phase == "prefill" else 4)
        file.range("forward", host + 1_000, host + 100_000)
        file.range("sample", host + 101_000, host + 149_000)
        for kernel in range(10):
            begin = clock + kernel * step_ns // 10
            launched = host + 2_000 + kernel * 9_000 if kernel < 9 else host + 110_000
            name = "topk_topp_sampling_kernel" if kernel == 9 else names[kernel % 3]
            file.kernel(name, begin, begin + step_ns // 10, launched=launched)
        clock += step_ns + gap_ns
    return file.close()
