"""The hardware's own counters over a stretch of time, read from NVML without llmprobe."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pynvml

from support.machine import has_gpu

_METRICS = {"graphics": 1, "sm": 2, "tensor": 5, "dram": 10}  # NVML_GPM_METRIC_*


class Counters:
    """Means over the time from entering the ``with`` block to leaving it.

    ``ratios`` has ``graphics``, ``sm``, ``tensor`` and ``dram`` (0 to 1) of the first GPU afterwards,
    ``each`` those of every GPU asked for; empty where this GPU has no counters, or there is none.
    """

    def __init__(self, gpus: int = 1) -> None:
        self._number = gpus
        self.each: list[dict[str, float]] = []

    @property
    def ratios(self) -> dict[str, float]:
        """Of the first GPU."""
        return self.each[0] if self.each else {}

    def __enter__(self) -> Counters:
        self.each = []
        self._samples: list[tuple[Any, list[Any]]] = []
        if not has_gpu():
            return self
        pynvml.nvmlInit()
        for gpu in gpus()[: self._number]:
            pair = [pynvml.nvmlGpmSampleAlloc() for _ in range(2)]
            pynvml.nvmlGpmSampleGet(gpu, pair[0])
            self._samples.append((gpu, pair))
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._samples:
            return
        for gpu, pair in self._samples:
            pynvml.nvmlGpmSampleGet(gpu, pair[1])
        for _, pair in self._samples:
            self.each.append(_between(pair))
            for sample in pair:
                pynvml.nvmlGpmSampleFree(sample)
        pynvml.nvmlShutdown()


def _between(pair: list[Any]) -> dict[str, float]:
    asked: Any = pynvml.c_nvmlGpmMetricsGet_t()
    asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    asked.numMetrics = len(_METRICS)
    asked.sample1, asked.sample2 = pair
    for index, metric in enumerate(_METRICS.values()):
        asked.metrics[index].metricId = metric
    pynvml.nvmlGpmMetricsGet(asked)
    ratios = {}
    for index, name in enumerate(_METRICS):
        found = asked.metrics[index]
        if found.nvmlReturn == pynvml.NVML_SUCCESS:
            ratios[name] = float(ctypes.c_double(found.value).value) / 100
    return ratios


def gpus() -> list[Any]:
    """NVML's handles of the GPUs that CUDA shows this process, in its order; NVML shows them all.

    Several servers can so be measured beside each other, each on a GPU of its own. Call after ``nvmlInit``.
    """
    found = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    names = [name.strip() for name in visible.split(",") if name.strip()]
    by_uuid = pynvml.nvmlDeviceGetHandleByUUID
    return [found[int(name)] if name.isdigit() else by_uuid(name) for name in names]


def bandwidth() -> float:
    """Nominal bytes per second of the first GPU's memory: bus width x highest clock x 2."""
    pynvml.nvmlInit()
    gpu = gpus()[0]
    width = pynvml.nvmlDeviceGetMemoryBusWidth(gpu)
    clock = pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_MEM)
    pynvml.nvmlShutdown()
    return float(width / 8 * clock * 1e6 * 2)


def name() -> str:
    """Of the first GPU, as NVML says it."""
    pynvml.nvmlInit()
    found = pynvml.nvmlDeviceGetName(gpus()[0])
    pynvml.nvmlShutdown()
    return found.decode() if isinstance(found, bytes) else str(found)


def memory_used() -> int | None:
    """Bytes in use on all GPUs that CUDA shows this process, by whomever; None without a GPU."""
    if not has_gpu():
        return None
    pynvml.nvmlInit()
    used = sum(int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) for gpu in gpus())
    pynvml.nvmlShutdown()
    return used


def device_memory(pid: int) -> int:
    """Bytes of the first GPU's memory in use, those of ``pid`` alone where NVML knows them."""
    pynvml.nvmlInit()
    gpu = gpus()[0]
    mine = [item for item in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu) if item.pid == pid]
    used = (
        mine[0].usedGpuMemory if mine and mine[0].usedGpuMemory else pynvml.nvmlDeviceGetMemoryInfo(gpu).used
    )
    pynvml.nvmlShutdown()
    return int(used)
