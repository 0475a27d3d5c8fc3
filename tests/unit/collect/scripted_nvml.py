"""An NVML that says what a test tells it to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmprobe.collect.nvml import GpuProcess, Hardware, NvmlError, Readings, SlowReadings

H100 = Hardware(
    uuid="GPU-1",
    name="NVIDIA H100 80GB HBM3",
    driver_version="580.159",
    mig=False,
    bus_width_bits=5120,
    memory_clock_max_hertz=2619e6,
    sm_clock_max_hertz=1980e6,
    power_limit_default_watts=700.0,
)
GIB = 1 << 30


@dataclass
class ScriptedGpu:
    """One GPU; tests change its fields between looks."""

    hardware: Hardware = H100
    no_counters: str = ""
    now: Readings = field(default_factory=lambda: Readings(400.0, 1980e6, 2619e6, 0))
    slow: SlowReadings = field(default_factory=lambda: SlowReadings(45.0, 60 * GIB, 80 * GIB, 700.0))
    listed: list[GpuProcess] | None = None
    active: Mapping[str, float] = field(
        default_factory=lambda: {
            "dram_active": 0.6,
            "tensor_active": 0.1,
            "sm_active": 0.8,
            "graphics_active": 0.9,
        }
    )
    lost: bool = False
    closed: bool = False
    counted: bool = False
    looks: int = 0

    def readings(self) -> Readings:
        self._there()
        self.looks += 1
        return self.now

    def slow_readings(self) -> SlowReadings:
        self._there()
        return self.slow

    def processes(self) -> list[GpuProcess] | None:
        self._there()
        return self.listed

    def ratios(self) -> Mapping[str, float] | None:
        self._there()
        first, self.counted = not self.counted, True
        return None if first or self.no_counters else dict(self.active)

    def close(self) -> None:
        self.closed = True

    def change(self, **fields: object) -> None:
        """Of the readings and slow readings, by name."""
        for name, value in fields.items():
            if hasattr(self.now, name):
                self.now = replace(self.now, **{name: value})  # type: ignore[arg-type]
            else:
                self.slow = replace(self.slow, **{name: value})  # type: ignore[arg-type]

    def _there(self) -> None:
        if self.lost:
            raise NvmlError(f"{self.hardware.uuid}: GPU is lost")


class ScriptedNvml:
    """The library; ``opened`` counts how often it was."""

    def __init__(self, *gpus: ScriptedGpu) -> None:
        self.gpus = {gpu.hardware.uuid: gpu for gpu in gpus}
        self.problem = ""
        self.opened = 0
        self.closed = 0

    def __call__(self) -> ScriptedNvml:
        self.opened += 1
        if self.problem:
            raise NvmlError(self.problem)
        return self

    def uuids(self) -> list[str]:
        return list(self.gpus)

    def gpu(self, uuid: str) -> ScriptedGpu:
        if uuid not in self.gpus:
            raise NvmlError(f"{uuid} is no GPU that NVML shows here: Not Found")
        gpu = self.gpus[uuid]
        gpu.counted = False
        gpu._there()
        return gpu

    def close(self) -> None:
        self.closed += 1
