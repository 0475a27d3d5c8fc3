"""Builds torch profiler traces in kineto's form: what a GPU did is made up, the form of its events is not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


class KinetoFile:
    """One trace; times are microseconds, as in the file."""

    def __init__(self, base: float = 4572473136056.528) -> None:
        self.events: list[dict[str, Any]] = []
        self._base = base
        self._correlation = 0

    def event(self, category: str, name: str, begin: float, length: float, tid: int, **args: Any) -> None:
        """One complete event."""
        self.events.append(
            {
                "ph": "X",
                "cat": category,
                "name": name,
                "pid": args.get("device", 100),
                "tid": tid,
                "ts": self._base + begin,
                "dur": length,
                "args": args,
            }
        )

    def launch(self, name: str, begin: float, tid: int = 100) -> int:
        """A call into CUDA; its correlation id."""
        self._correlation += 1
        self.event("cuda_runtime", name, begin, 3.0, tid, correlation=self._correlation, cbid=211)
        return self._correlation

    def kernel(self, name: str, begin: float, length: float, launched: float | None, device: int = 0) -> None:
        """A kernel and its launch."""
        correlation = 0 if launched is None else self.launch("cudaLaunchKernel", launched)
        self.event("kernel", name, begin, length, 7, device=device, stream=7, correlation=correlation)

    def mark(self, name: str, begin: float, length: float, tid: int = 100) -> None:
        """A range of ``record_function``."""
        self.event("user_annotation", name, begin, length, tid)

    def document(self) -> dict[str, Any]:
        """The whole document."""
        return {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 1}],
            "cuda_runtime_version": 13000,
            "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 2},
            "host_name": "secret-host",
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": 1790857026000000000,
            "traceEvents": self.events,
            "traceName": "/secret/path/trace.json",
        }

    def write(self, path: Path) -> Path:
        """Write it, gzipped if the name ends in .gz."""
        text = json.dumps(self.document(), indent=1).encode()
        path.write_bytes(gzip.compress(text, 1) if path.suffix == ".gz" else text)
        return path


def decoding(steps: int = 60, mark: str = "execute_context_0(0)_generation_2(2)") -> KinetoFile:
    """A server that decodes: three kernels of 100 µs a step, 50 µs idle between steps."""
    file = KinetoFile()
    for number in range(steps):
        begin = 1000.0 + number * 350.0
        file.mark(mark, begin - 200.0, 60.0)
        for kernel, name in enumerate(("flash_fwd_kernel", "nvjet_tst", "ncclDevKernel_AllReduce_Sum")):
            file.kernel(name, begin + kernel * 100.0, 100.0, begin - 190.0 + kernel * 10.0)
    return file
