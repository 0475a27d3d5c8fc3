"""How durations and names of kernels are written for people."""

from __future__ import annotations

_NAME_CHARS = 68


def duration(seconds: float) -> str:
    """``1.23 ms``."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return (
                f"{seconds * factor:.3g} {unit}"
                if seconds * factor < 1000
                else f"{seconds * factor:.0f} {unit}"
            )
    return f"{seconds * 1e9:.0f} ns"


def short(name: str, limit: int = _NAME_CHARS) -> str:
    """A kernel's name without its return type and arguments, cut in its middle where it is still too long."""
    name = name.removeprefix("void ")
    if len(name) > limit and "(" in name:
        name = name.split("(", 1)[0] if not name.startswith("(") else name
    if len(name) > limit:
        name = f"{name[: limit * 2 // 3 - 1]}…{name[-(limit // 3) :]}"
    return name
