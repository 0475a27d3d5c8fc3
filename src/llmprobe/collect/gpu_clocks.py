"""What keeps a GPU from its full clocks: heat, power supply, hardware, and limits that somebody set."""

from __future__ import annotations

from collections.abc import Iterable

from llmprobe.collect.nvml import IDLE_REASON, THROTTLE_REASONS, Hardware, Readings, SlowReadings

_TO_BE_MENDED = ("hardware_slowdown", "software_thermal", "hardware_thermal", "power_brake")
_LOW_CLOCK_RATIO = 0.97
_LOW_LIMIT_RATIO = 0.99


def held_down_by(hardware: Hardware, now: Readings) -> tuple[str, ...] | None:
    """Why, of heat, power supply and hardware, the SM clock is below its highest.

    Names of `llmprobe.collect.nvml.THROTTLE_REASONS`; empty if none of them holds it down; None where the GPU
    does not tell reasons.
    """
    return _reasons(hardware, now, _TO_BE_MENDED)


def power_capped(hardware: Hardware, now: Readings) -> bool | None:
    """Whether the power limit holds the SM clock down, as it does under heavy matrix products."""
    found = _reasons(hardware, now, ("software_power_cap",))
    return None if found is None else bool(found)


def held_down_note(hardware: Hardware, now: Readings, reasons: Iterable[str], when: str) -> str:
    """One line on clocks that are held down."""
    clocks = f"{_megahertz(now.sm_clock_hertz)} of {_megahertz(hardware.sm_clock_max_hertz)}"
    return f"clocks are held down {when} ({', '.join(reasons)}): SM {clocks}"


def limit_notes(hardware: Hardware, now: Readings, slow: SlowReadings) -> list[str]:
    """What somebody set below the GPU's own limits, a line each."""
    notes = []
    limit, default = slow.power_limit_watts, hardware.power_limit_default_watts
    if limit is not None and default is not None and limit < _LOW_LIMIT_RATIO * default:
        notes.append(f"its power limit is {limit:.0f} W, {default:.0f} W by default")
    clock, most = now.memory_clock_hertz, hardware.memory_clock_max_hertz
    working = now.clocks_event_reasons is not None and not now.clocks_event_reasons & IDLE_REASON
    if working and _low(clock, most):
        clocks = f"{_megahertz(clock)} of {_megahertz(most)}"
        notes.append(f"its memory runs at {clocks}; MBU is a ratio of the full clock's bandwidth")
    return notes


def _reasons(hardware: Hardware, now: Readings, names: Iterable[str]) -> tuple[str, ...] | None:
    mask = now.clocks_event_reasons
    if mask is None:
        return None
    clock, most = now.sm_clock_hertz, hardware.sm_clock_max_hertz
    if clock is not None and most is not None and not _low(clock, most):
        return ()
    return tuple(name for name in names if mask & THROTTLE_REASONS[name])


def _low(clock: float | None, most: float | None) -> bool:
    return clock is not None and most is not None and clock < _LOW_CLOCK_RATIO * most


def _megahertz(hertz: float | None) -> str:
    return "?" if hertz is None else f"{hertz / 1e6:.0f} MHz"
