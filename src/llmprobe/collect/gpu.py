"""Watches one GPU: what NVML says now, and what its counters said over the last 10 s."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from llmprobe.collect.gpu_users import Users
from llmprobe.collect.nvml import (
    IDLE_REASON,
    THROTTLE_REASONS,
    Gpu,
    GpuProcess,
    Hardware,
    Readings,
    SlowReadings,
)
from llmprobe.collect.views import GpuView
from llmprobe.compute.evidence import CounterEvidence

WINDOW_NS = 10 * 10**9
_SLOW_EVERY_NS = 5 * 10**9
#: Beyond it nobody knows what was so between two looks.
_LONGEST_GAP_NS = 5 * 10**9
_LOOKS_WITH_COUNTERS = 3
_HELD_DOWN = ("hardware_slowdown", "software_thermal", "hardware_thermal", "power_brake")
_LOW_CLOCK_RATIO = 0.97

#: What NVML lists and the memory in use → who uses the GPU.
WhoUses = Callable[["list[GpuProcess] | None", "int | None"], Users]


class _Look(NamedTuple):
    """One second, or what was between two looks. ``ratios`` are means over it."""

    begin_ns: int
    end_ns: int
    ratios: dict[str, float]
    held_down: bool | None
    power_capped: bool | None
    reasons: int


class GpuWatch:
    """One GPU, looked at about once a second. Methods raise `NvmlError` once it is gone.

    Args:
        gpu: an open GPU.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._looks: deque[_Look] = deque()
        self._users: deque[tuple[int, Users]] = deque()
        self._active: dict[str, float] = {}
        self._counted = 0.0
        self._readings = Readings(None, None, None, None)
        self._slow = SlowReadings(None, None, None, None)
        self._slow_ns: int | None = None
        self._at_ns: int | None = None

    @property
    def hardware(self) -> Hardware:
        """What does not change."""
        return self._gpu.hardware

    def sample(self, now_ns: int, who_uses: WhoUses) -> None:
        """Look now.

        Args:
            now_ns: CLOCK_MONOTONIC nanoseconds.
            who_uses: asked every few seconds.
        """
        ratios = self._gpu.ratios()
        self._readings = self._gpu.readings()
        if self._slow_ns is None or now_ns - self._slow_ns >= _SLOW_EVERY_NS:
            self._slow_ns = now_ns
            self._slow = self._gpu.slow_readings()
            self._users.append((now_ns, who_uses(self._gpu.processes(), self._slow.memory_used_bytes)))
        if self._at_ns is not None and now_ns - self._at_ns < _LONGEST_GAP_NS:
            self._take(self._at_ns, now_ns, dict(ratios or {}))
        self._at_ns = now_ns
        while self._looks and self._looks[0].end_ns <= now_ns - WINDOW_NS:
            self._looks.popleft()
        while len(self._users) > 1 and self._users[1][0] <= now_ns - WINDOW_NS:
            self._users.popleft()

    def view(self) -> GpuView:
        """As of the last look."""
        hardware, now, slow = self.hardware, self._readings, self._slow
        reasons = now.clocks_event_reasons
        means = {name: self._mean(name) for name in ("dram_active", "tensor_active", "sm_active")}
        users = self._users_now()
        return GpuView(
            uuid=hardware.uuid,
            name=hardware.name,
            driver_version=hardware.driver_version,
            mig=hardware.mig,
            bandwidth_bytes_per_second=hardware.bandwidth_bytes_per_second,
            dram_active_ratio=means["dram_active"],
            tensor_active_ratio=means["tensor_active"],
            sm_active_ratio=means["sm_active"],
            sm_occupancy_ratio=self._mean("sm_occupancy"),
            graphics_active_ratio=self._mean("graphics_active"),
            active_seconds=dict(self._active),
            counted_seconds=self._counted,
            power_watts=now.power_watts,
            power_limit_watts=slow.power_limit_watts,
            sm_clock_hertz=now.sm_clock_hertz,
            sm_clock_max_hertz=hardware.sm_clock_max_hertz,
            memory_clock_hertz=now.memory_clock_hertz,
            memory_clock_max_hertz=hardware.memory_clock_max_hertz,
            memory_used_bytes=slow.memory_used_bytes,
            memory_capacity_bytes=slow.memory_total_bytes,
            temperature_celsius=slow.temperature_celsius,
            throttle_reasons=None
            if reasons is None
            else {name: bool(reasons & bit) for name, bit in THROTTLE_REASONS.items()},
            throttled_ratio=self._share([(look, look.held_down) for look in self._looks]),
            power_capped_ratio=self._share([(look, look.power_capped) for look in self._looks]),
            shared=users.shared,
            notes=tuple(self._notes(users)),
        )

    def counters(self, age_seconds: float) -> CounterEvidence | None:
        """Counters over the last 10 s; None where there are none, or not yet."""
        dram, tensor = self._mean("dram_active"), self._mean("tensor_active")
        if dram is None or tensor is None:
            return None
        shared = self._users_now().shared
        return CounterEvidence(dram, tensor, self._mean("sm_active"), age_seconds, shared)

    @property
    def no_counters(self) -> str:
        """Why there are none; empty if there are, or will be after a few looks."""
        if self._gpu.no_counters:
            return self._gpu.no_counters
        mute = len(self._looks) >= _LOOKS_WITH_COUNTERS and self.counters(0.0) is None
        return "NVML counts on this GPU, but gives no values for its memory and tensor cores" if mute else ""

    def close(self) -> None:
        """Look no more."""
        self._gpu.close()

    def _take(self, begin_ns: int, end_ns: int, ratios: dict[str, float]) -> None:
        reasons, clock = self._readings.clocks_event_reasons, self._readings.sm_clock_hertz
        most = self.hardware.sm_clock_max_hertz
        low = clock is None or most is None or clock < _LOW_CLOCK_RATIO * most
        held = capped = None
        if reasons is not None:
            held = low and any(reasons & THROTTLE_REASONS[name] for name in _HELD_DOWN)
            capped = low and bool(reasons & THROTTLE_REASONS["software_power_cap"])
        self._looks.append(_Look(begin_ns, end_ns, ratios, held, capped, reasons or 0))
        if ratios:
            seconds = (end_ns - begin_ns) / 1e9
            self._counted += seconds
            for name, ratio in ratios.items():
                self._active[name] = self._active.get(name, 0.0) + ratio * seconds

    def _mean(self, name: str) -> float | None:
        known = [
            (look.end_ns - look.begin_ns, look.ratios[name]) for look in self._looks if name in look.ratios
        ]
        total = sum(length for length, _ in known)
        return sum(length * ratio for length, ratio in known) / total if total else None

    @staticmethod
    def _share(looks: list[tuple[_Look, bool | None]]) -> float | None:
        known = [(look.end_ns - look.begin_ns, found) for look, found in looks if found is not None]
        total = sum(length for length, _ in known)
        return sum(length for length, found in known if found) / total if total else None

    def _users_now(self) -> Users:
        """Whoever was there in the window; else as of the last look."""
        seen = [users for _, users in self._users]
        return next((users for users in reversed(seen) if users.shared), seen[-1] if seen else Users(None))

    def _notes(self, users: Users) -> list[str]:
        hardware, now, slow = self.hardware, self._readings, self._slow
        notes = []
        throttled = self._share([(look, look.held_down) for look in self._looks])
        if throttled:
            seen = 0
            for look in self._looks:
                seen |= look.reasons if look.held_down else 0
            why = ", ".join(name for name in _HELD_DOWN if seen & THROTTLE_REASONS[name])
            clocks = f"{_megahertz(now.sm_clock_hertz)} of {_megahertz(hardware.sm_clock_max_hertz)}"
            notes.append(f"clocks are held down {throttled:.0%} of the time ({why}): SM {clocks}")
        limit, default = slow.power_limit_watts, hardware.power_limit_default_watts
        if limit is not None and default is not None and limit < 0.99 * default:
            notes.append(f"its power limit is {limit:.0f} W, {default:.0f} W by default")
        clock, most = now.memory_clock_hertz, hardware.memory_clock_max_hertz
        working = now.clocks_event_reasons is not None and not now.clocks_event_reasons & IDLE_REASON
        if working and clock is not None and most is not None and clock < _LOW_CLOCK_RATIO * most:
            clocks = f"{_megahertz(clock)} of {_megahertz(most)}"
            notes.append(f"its memory runs at {clocks}; MBU is a ratio of the full clock's bandwidth")
        if users.note:
            notes.append(users.note)
        return notes


def _megahertz(hertz: float | None) -> str:
    return "?" if hertz is None else f"{hertz / 1e6:.0f} MHz"
