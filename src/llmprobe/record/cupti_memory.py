"""How many kernels CUPTI may record in one process: of each it may keep memory on the device, for good.

It notes times in buffers on the device, and in a vLLM server uses none of them twice: 4 MiB for some 110 000
kernels, whatever is disabled and flushed in between. After 250 of them, its default limit, kernels get times
that are none. Simple programs have it use them again; which do not is not known, so it is taken to be all
(CUPTI 13.0, docs/decisions/kernel-windows.md).
"""

from __future__ import annotations

#: Windows go on by themselves, so they end by what 150 MiB hold.
WINDOWS_AT_MOST = 4_000_000
#: Captures are asked for one by one; what is left to CUPTI's own limit is for torch's, which nobody counts.
CAPTURES_AT_MOST = 16_000_000
_BYTES_EACH = (4 << 20) / 110_000


class Recorded:
    """Kernels that llmprobe let CUPTI record since this process began; written by whoever holds CUPTI."""

    kernels = 0


def windows_spent() -> str | None:
    """Why no further window may be opened; None if one may."""
    return _spent(WINDOWS_AT_MOST, "start the engine anew for more windows, or ask for a capture")


def captures_spent() -> str | None:
    """Why no further capture of kernels may be made; None if one may."""
    return _spent(CAPTURES_AT_MOST, "start the engine anew, or with `llmprobe run --nsys`")


def _spent(most: int, what_helps: str) -> str | None:
    seen = Recorded.kernels
    if seen < most:
        return None
    return (
        f"{seen} kernels were recorded in this process, and CUPTI may keep memory on the device for each "
        f"(up to {seen * _BYTES_EACH / 2**20:.0f} MiB by now): {what_helps}"
    )
