"""Measuring what a device reaches: a stream-like copy and matrix products, best of several repeats.

Bandwidth counts bytes read and bytes written, as STREAM's "copy" does (McCalpin 1995); FLOPs of a product of
n x n matrices are 2 n³.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from llmprobe.collect.peaks import CPU_DTYPES, GPU_DTYPES, Calibration, cpu_key

#: (what is being measured, number of the device's measurement, how many there are)
Progress = Callable[[str, int, int], None]

#: The first compute capability whose tensor cores have the type.
_SINCE = {"fp8": (8, 9), "int8": (7, 5)}
_COPY_BYTES = 256 << 20  # well beyond any cache that the copy should not live in
_GPU_COPY_BYTES = 2 << 30


def measure_cpu(name: str, seconds: float, threads: int | None, progress: Progress) -> Calibration:
    """Measure this machine's processor with torch, or with numpy where there is no torch.

    Args:
        name: the processor's model name.
        seconds: about how long each measurement may take.
        threads: None for as many as torch uses by itself.
        progress: called before each measurement.
    """
    try:
        import torch
    except ImportError:
        return _measure_numpy(name, seconds, progress)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    used = torch.get_num_threads()
    try:
        progress("copy", 0, 1 + len(CPU_DTYPES))
        bandwidth = _cpu_copy_rate(torch, seconds)
        rates = {}
        for number, dtype in enumerate(CPU_DTYPES, 1):
            progress(f"{dtype} product", number, 1 + len(CPU_DTYPES))
            rates[dtype] = _cpu_product_rate(torch, getattr(torch, dtype), seconds)
    finally:
        torch.set_num_threads(before)
    cpus = os.cpu_count() or 1
    versions = {"torch": str(torch.__version__)}
    return Calibration(cpu_key(name, cpus, used), name, bandwidth, rates, time.time(), used, versions)


def _cpu_copy_rate(torch: Any, seconds: float) -> float:
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _best(partial(target.copy_, source), seconds)


def _cpu_product_rate(torch: Any, dtype: Any, seconds: float) -> float:
    # Small first: types that the processor does not have are a hundred times slower than those it has.
    size = 256
    rate = 0.0
    while True:
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        target = torch.empty(size, size, dtype=dtype)
        elapsed = _best(partial(torch.mm, a, b, out=target), seconds / 4)
        rate = max(rate, 2 * size**3 / elapsed)
        if size >= 2048 or 8 * elapsed > seconds / 2:
            return rate
        size *= 2


def _measure_numpy(name: str, seconds: float, progress: Progress) -> Calibration:
    import numpy as np

    progress("copy", 0, 2)
    source = np.ones(_COPY_BYTES // 4, dtype=np.float32)
    target = np.empty_like(source)
    # One thread copies: numpy has no parallel copy. The product uses the BLAS's own threads.
    bandwidth = 2 * _COPY_BYTES / _best(lambda: np.copyto(target, source), seconds)
    progress("float32 product", 1, 2)
    a = np.ones((2048, 2048), dtype=np.float32)
    rate = 2 * 2048**3 / _best(lambda: np.matmul(a, a), seconds)
    cpus = os.cpu_count() or 1
    versions = {"numpy": np.__version__}
    return Calibration(
        cpu_key(name, cpus, cpus), name, bandwidth, {"float32": rate}, time.time(), cpus, versions
    )


def measure_gpus(seconds: float, progress: Progress) -> Iterator[Calibration]:
    """Measure each CUDA device that torch sees; nothing where there is none."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        yield _measure_gpu(torch, index, seconds, progress)


def _measure_gpu(torch: Any, index: int, seconds: float, progress: Progress) -> Calibration:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    dtypes = [dtype for dtype in GPU_DTYPES if capability >= _SINCE.get(dtype, (0, 0))]
    progress(f"GPU {index}: copy", 0, 1 + len(dtypes))
    bandwidth = _gpu_copy_rate(torch, device, seconds)
    rates = {}
    for number, dtype in enumerate(dtypes, 1):
        progress(f"GPU {index}: {dtype} product", number, 1 + len(dtypes))
        width = 4096 if dtype == "float32" else 8192
        try:
            elapsed = _best_on_gpu(torch, device, product(torch, dtype, width, device), seconds)
        except (RuntimeError, AttributeError, TypeError, ValueError):
            if dtype not in _SINCE:
                raise
            continue  # this torch, or its build, cannot; what was not measured is absent
        rates[dtype] = 2 * width**3 / elapsed
    torch.cuda.empty_cache()
    versions = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    return Calibration(
        f"GPU-{properties.uuid}", properties.name, bandwidth, rates, time.time(), None, versions
    )


def product(torch: Any, dtype: str, width: int, device: Any) -> Callable[[], Any]:
    """What multiplies two matrices of ``width`` x ``width`` in ``dtype`` (as of `GPU_DTYPES`).

    Values are normal, as in a model: products of constants draw less power and clock higher. In FP8 the
    second matrix lies by columns, as the hardware wants it, and sums are kept as the engines' kernels keep
    them (``use_fast_accum``); the result is bfloat16 there, and int32 of int8.
    """
    a, b = (torch.randn(width, width, device=device) for _ in range(2))
    if dtype == "fp8":
        one = torch.ones((), device=device)
        a, b = (part.to(torch.float8_e4m3fn) for part in (a, b))
        return partial(
            torch._scaled_mm,
            a,
            b.t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    if dtype == "int8":
        a, b = ((part * 32).clamp(-127, 127).to(torch.int8) for part in (a, b))
        return partial(torch._int_mm, a, b.t())
    a, b = (part.to(getattr(torch, dtype)) for part in (a, b))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _gpu_copy_rate(torch: Any, device: Any, seconds: float) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    size = int(min(_GPU_COPY_BYTES, free // 4)) // 4  # of four bytes, each read and written
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    return 8.0 * size / _best_on_gpu(torch, device, partial(target.copy_, source), seconds)


def _best_on_gpu(torch: Any, device: Any, work: Callable[[], object], seconds: float) -> float:
    """Shortest device time of ``work`` in seconds."""
    best = float("inf")
    with torch.cuda.device(device):
        work()
        torch.cuda.synchronize(device)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            last.synchronize()
            best = min(best, first.elapsed_time(last) / 1e3)
    return best


def _best(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of ``work`` in seconds; at least three runs, the first not counted."""
    work()
    best, runs, end = float("inf"), 0, time.monotonic() + seconds
    while runs < 2 or time.monotonic() < end:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
        runs += 1
    return best
