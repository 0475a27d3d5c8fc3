"""Watches one GPU: what NVML says now, and what its counters said over the last 10 s."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from llmprobe.collect.gpu_clocks import held_down_by, held_down_note, limit_notes, power_capped
from llmprobe.collect.gpu_users import Users
from llmprobe.collect.nvml import (
    THROTTLE_REASONS,
    Gpu,
    GpuProcess,
    Hardware,
    Readings,
    SlowReadings,
)
from llmprobe.collect.views import GpuView
from llmprobe.compute.evidence import CounterEvidence

WINDOW_SECONDS = 10.0
_WINDOW_NS = round(WINDOW_SECONDS * 1e9)
_SLOW_EVERY_NS = 5 * 10**9
#: Beyond it nobody knows what was so between two looks.
_LONGEST_GAP_NS = 5 * 10**9
_LOOKS_WITH_COUNTERS = 3

#: What NVML lists and the memory in use → who uses the GPU.
WhoUses = Callable[["list[GpuProcess] | None", "int | None"], Users]


class _Look(NamedTuple):
    """What was between two looks. ``ratios`` are means over it; the rest is as of its end."""

    begin_ns: int
    end_ns: int
    ratios: dict[str, float]
    held_down_by: tuple[str, ...] | None
    power_capped: bool | None

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.begin_ns


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
        while self._looks and self._looks[0].end_ns <= now_ns - _WINDOW_NS:
            self._looks.popleft()
        while len(self._users) > 1 and self._users[1][0] <= now_ns - _WINDOW_NS:
            self._users.popleft()

    def view(self) -> GpuView:
        """As of the last look."""
        hardware, now, slow = self.hardware, self._readings, self._slow
        reasons = now.clocks_event_reasons
        users = self._users_now()
        return GpuView(
            uuid=hardware.uuid,
            name=hardware.name,
            driver_version=hardware.driver_version,
            mig=hardware.mig,
            bandwidth_bytes_per_second=hardware.bandwidth_bytes_per_second,
            dram_active_ratio=self._ratio("dram_active"),
            tensor_active_ratio=self._ratio("tensor_active"),
            sm_active_ratio=self._ratio("sm_active"),
            sm_occupancy_ratio=self._ratio("sm_occupancy"),
            graphics_active_ratio=self._ratio("graphics_active"),
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
            throttled_ratio=self._throttled_ratio(),
            power_capped_ratio=self._mean(lambda look: look.power_capped),
            shared=users.shared,
            notes=tuple(self._notes(users)),
        )

    def counters(self, seconds: float) -> CounterEvidence | None:
        """Counters over the last ``seconds``, at most 10; None where there are none, or not yet."""
        window_ns = round(seconds * 1e9)
        dram, tensor = (self._ratio(name, window_ns) for name in ("dram_active", "tensor_active"))
        if dram is None or tensor is None:
            return None
        sm_active, active = (self._ratio(name, window_ns) for name in ("sm_active", "graphics_active"))
        return CounterEvidence(dram, tensor, sm_active, 0.0, self._users_now().shared, active)

    @property
    def no_counters(self) -> str:
        """Why there are none; empty if there are, or will be after a few looks."""
        if self._gpu.no_counters:
            return self._gpu.no_counters
        mute = len(self._looks) >= _LOOKS_WITH_COUNTERS and self.counters(WINDOW_SECONDS) is None
        return "NVML counts on this GPU, but gives no values for its memory and tensor cores" if mute else ""

    def close(self) -> None:
        """Look no more."""
        self._gpu.close()

    def _take(self, begin_ns: int, end_ns: int, ratios: dict[str, float]) -> None:
        hardware, now = self.hardware, self._readings
        held, capped = held_down_by(hardware, now), power_capped(hardware, now)
        look = _Look(begin_ns, end_ns, ratios, held, capped)
        self._looks.append(look)
        if ratios:
            seconds = look.length_ns / 1e9
            self._counted += seconds
            for name, ratio in ratios.items():
                self._active[name] = self._active.get(name, 0.0) + ratio * seconds

    def _mean(self, value: Callable[[_Look], float | None], window_ns: int = _WINDOW_NS) -> float | None:
        """Over the window, of the looks that have one."""
        since = (self._at_ns or 0) - window_ns
        looks = [look for look in self._looks if look.end_ns > since]
        known = [(look.length_ns, found) for look in looks if (found := value(look)) is not None]
        total = sum(length for length, _ in known)
        return sum(length * found for length, found in known) / total if total else None

    def _ratio(self, counter: str, window_ns: int = _WINDOW_NS) -> float | None:
        return self._mean(lambda look: look.ratios.get(counter), window_ns)

    def _throttled_ratio(self) -> float | None:
        return self._mean(lambda look: None if look.held_down_by is None else float(bool(look.held_down_by)))

    def _users_now(self) -> Users:
        """Whoever was there in the window; else as of the last look."""
        seen = [users for _, users in self._users]
        return next((users for users in reversed(seen) if users.shared), seen[-1] if seen else Users(None))

    def _notes(self, users: Users) -> list[str]:
        notes = []
        if throttled := self._throttled_ratio():
            reasons = dict.fromkeys(reason for look in self._looks for reason in look.held_down_by or ())
            when = f"{throttled:.0%} of the time"
            notes.append(held_down_note(self.hardware, self._readings, reasons, when))
        notes += limit_notes(self.hardware, self._readings, self._slow)
        return [*notes, users.note] if users.note else notes
