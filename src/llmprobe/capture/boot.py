"""Which boot of the machine this is: clocks that nobody sets begin anew with each."""

from __future__ import annotations

from pathlib import Path


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Unlike that of any other boot; empty where the kernel does not say."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
