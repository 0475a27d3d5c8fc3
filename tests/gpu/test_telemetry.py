"""NVML on a real GPU: what telemetry reads, held against torch, a load of a known kind, and itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprobe.collect.collector import Collector
from llmprobe.collect.gpu_users import users
from llmprobe.collect.nvml import Gpu, Nvml, NvmlError, open_nvml
from llmprobe.collect.peaks import peaks_for
from llmprobe.collect.telemetry import Telemetry
from llmprobe.compute.hardware import lookup
from llmprobe.record.recorder import Recorder

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def device_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {"type": "cuda", "name": properties.name, "index": 0, "uuid": f"GPU-{properties.uuid}"}


@pytest.fixture
def nvml() -> Iterator[Nvml]:
    library = open_nvml()
    yield library
    library.close()


@pytest.fixture
def gpu(nvml: Nvml) -> Iterator[Gpu]:
    opened = nvml.gpu(device_facts()["uuid"])
    yield opened
    opened.close()


@pytest.fixture
def counters(gpu: Gpu) -> Gpu:
    if gpu.no_counters:
        pytest.skip(gpu.no_counters)
    return gpu


def busy(work: Callable[[], object], seconds: float) -> None:
    """Do ``work`` over and over, the queue never empty for long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            work()
        torch.cuda.synchronize()


def copy() -> Callable[[], object]:
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product() -> Callable[[], object]:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def over(gpu: Gpu, work: Callable[[], object]) -> dict[str, float]:
    """Counters over two seconds of ``work``."""
    busy(work, 0.5)
    gpu.ratios()
    busy(work, 2.0)
    found = gpu.ratios()
    assert found is not None
    print({name: round(ratio, 3) for name, ratio in found.items()})
    return dict(found)


def test_the_gpu_of_torch_is_found_by_its_uuid(gpu: Gpu) -> None:
    assert gpu.hardware.name == torch.cuda.get_device_properties(0).name
    assert gpu.hardware.driver_version
    total = torch.cuda.get_device_properties(0).total_memory
    assert gpu.slow_readings().memory_total_bytes == pytest.approx(total, rel=0.05)


def test_a_gpu_that_is_not_there_is_told_by_its_name(nvml: Nvml) -> None:
    with pytest.raises(NvmlError, match="GPU-00000000-0000-0000-0000-000000000000"):
        nvml.gpu("GPU-00000000-0000-0000-0000-000000000000")


def test_bandwidth_of_bus_and_clock_is_what_is_published(gpu: Gpu) -> None:
    bandwidth = gpu.hardware.bandwidth_bytes_per_second
    print(gpu.hardware, bandwidth)
    assert bandwidth is not None
    assert bandwidth > 0
    published = lookup(gpu.hardware.name, "bfloat16")
    if published is not None:
        assert bandwidth == pytest.approx(published.bandwidth_bytes_per_second, rel=0.05)


def test_bandwidth_is_above_what_a_copy_reaches(gpu: Gpu) -> None:
    work = copy()
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        work()
    end.record()
    end.synchronize()
    reached = 20 * 2 * 4 * (1 << 28) / (begin.elapsed_time(end) / 1e3)
    bandwidth = gpu.hardware.bandwidth_bytes_per_second
    print(f"copy {reached / 1e9:.0f} GB/s of {(bandwidth or 0) / 1e9:.0f}")
    assert bandwidth is not None
    assert 0.5 * bandwidth < reached < bandwidth


def test_power_and_clocks_are_plausible_under_load(gpu: Gpu) -> None:
    busy(product(), 1.0)
    now, hardware = gpu.readings(), gpu.hardware
    print(now)
    assert now.power_watts is not None
    assert now.power_watts > 20
    assert now.sm_clock_hertz is not None
    assert hardware.sm_clock_max_hertz is not None
    assert 100e6 < now.sm_clock_hertz <= hardware.sm_clock_max_hertz
    assert now.memory_clock_hertz is not None
    assert now.clocks_event_reasons is not None


def test_memory_in_use_grows_by_what_is_allocated(gpu: Gpu) -> None:
    torch.cuda.synchronize()
    before = gpu.slow_readings().memory_used_bytes
    held = torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    after = gpu.slow_readings().memory_used_bytes
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(held.numel(), rel=0.05)
    del held
    torch.cuda.empty_cache()


def test_counters_are_ratios_also_without_a_load(counters: Gpu) -> None:
    torch.cuda.synchronize()
    counters.ratios()
    time.sleep(1.0)
    found = counters.ratios()
    assert found is not None
    assert set(found) >= {"dram_active", "tensor_active", "sm_active"}
    assert all(0 <= ratio <= 1 for ratio in found.values())
    assert found["dram_active"] < 0.2


def test_a_copy_is_seen_in_the_dram_counter(counters: Gpu) -> None:
    found = over(counters, copy())
    assert found["dram_active"] > 0.5
    assert found["tensor_active"] < 0.1


def test_a_product_is_seen_in_the_tensor_counter(counters: Gpu) -> None:
    found = over(counters, product())
    assert found["tensor_active"] > 0.4
    assert found["dram_active"] < 0.5


def test_this_process_alone_is_not_taken_for_another(gpu: Gpu) -> None:
    torch.ones(1, device="cuda")
    listed, used = gpu.processes(), gpu.slow_readings().memory_used_bytes
    found = users(listed, {os.getpid()}, 1, used)
    print(listed, used, found)
    assert found.shared is not True


def test_another_process_is_seen_while_it_uses_the_gpu(gpu: Gpu, tmp_path: Path) -> None:
    torch.ones(1, device="cuda")
    if os.getpid() not in {process.pid for process in gpu.processes() or ()}:
        pytest.skip("NVML lists pids of another namespace")
    over, began = tmp_path / "over", tmp_path / "began"
    program = (
        "import os, pathlib, sys, time, torch\n"
        "held = torch.ones(1 << 20, device='cuda')\n"
        "pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))\n"
        "end = time.monotonic() + 120\n"  # whatever becomes of the test
        "while time.monotonic() < end and not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
    )
    # Through a shell that ends: a child of this process would be the server's own.
    shell = ["setsid", "sh", "-c", '"$@" &', "sh", sys.executable, "-c", program, str(over), str(began)]
    subprocess.run(shell, check=True)
    try:
        other = int(_until(lambda: began.exists() and began.read_text(), "the other process"))
        print(gpu.processes())
        _until(lambda: _shared(gpu) is True, "a note of it")
        assert str(other) in users(gpu.processes(), {os.getpid()}, 1, None).note
    finally:
        over.touch()
    _until(lambda: _shared(gpu) is not True, "end of it")


def _shared(gpu: Gpu) -> bool | None:
    return users(gpu.processes(), {os.getpid()}, 1, gpu.slow_readings().memory_used_bytes).shared


def _until(ready: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 60
    while not (found := ready()):
        assert time.monotonic() < deadline, f"no {what} after 60 s"
        time.sleep(0.2)
    return found


def test_a_rank_gets_counters_and_the_bandwidth_nvml_tells(tmp_path: Path, counters: Gpu) -> None:
    facts = {"role": "program", "group": "g", "server": "s", "framework": "transformers", "pid": os.getpid()}
    facts |= {"device": device_facts(), "model": {"compute_dtype": "bfloat16"}}
    recorder = Recorder.open(tmp_path, "program", facts)
    telemetry = Telemetry()
    collector = Collector(
        tmp_path,
        peaks=lambda facts: peaks_for(facts, tmp_path / "none", telemetry.hardware(facts)),
        telemetry=telemetry,
        own_writers=lambda: {recorder.writer.path: recorder.writer},
    )
    try:
        collector.tick(final=True)
        busy(copy(), 14.0)  # longer than the window of the counters
        collector.tick(final=True)
        (view,) = collector.views()
        (rank,) = view.ranks
        print(rank.gpu, rank.counters, view.notes, view.missing)
        assert rank.gpu is not None
        assert rank.gpu.uuid == device_facts()["uuid"]
        assert rank.gpu.age_seconds < 3
        assert rank.counters is not None
        assert rank.counters.dram_active_ratio > 0.5
        assert rank.counters.shared is not True
        assert rank.gpu.active_seconds["dram_active"] <= rank.gpu.counted_seconds
        assert rank.peaks is not None
        assert rank.peaks.bandwidth_bytes_per_second == rank.gpu.bandwidth_bytes_per_second
        assert "NVML" in rank.peaks.detail
        assert "gpu_dram_active_ratio" not in view.missing
    finally:
        collector.close()
        telemetry.close()
        recorder.close()


def test_what_a_look_costs_is_printed(counters: Gpu) -> None:
    """No bar: the machine's speed is not ours to test."""
    for name, ask in (
        ("counters", counters.ratios),
        ("power and clocks", counters.readings),
        ("temperature and memory", counters.slow_readings),
        ("processes", counters.processes),
    ):
        took, used, times = 0.0, 0.0, 20
        for _ in range(times):
            time.sleep(0.1)
            wall, cpu = time.perf_counter(), time.thread_time()
            ask()
            took, used = took + time.perf_counter() - wall, used + time.thread_time() - cpu
        print(f"{name}: {took / times * 1e6:.0f} µs, {used / times * 1e6:.0f} µs of them on the CPU")
