"""What cannot be shown of a server, and why."""

from __future__ import annotations

from collections.abc import Sequence

from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.views import EngineView, RankView


def what_is_missing(
    ranks: Sequence[RankView], engines: Sequence[EngineView], telemetry: Telemetry | None
) -> dict[str, str]:
    """Figure → why a server has none.

    Args:
        ranks: its ranks.
        engines: as its front ends tell of them; none if no front end is recorded.
        telemetry: looks at its GPUs; None if nobody does.
    """
    missing: dict[str, str] = {}
    if not engines:
        missing["time_to_first_token_seconds"] = "no front end of this server is being recorded"
        missing["sync_gap_ratio"] = missing["no_work"] = (
            "without a front end, waiting for the host cannot be told from having no work"
        )
    if not ranks:
        missing["device_time_seconds"] = "no worker of this server is being recorded"
    for rank in ranks:
        if why := rank.no_model or rank.no_peaks:
            missing["mbu_ratio"] = missing["mfu_ratio"] = why
        if telemetry is not None:
            missing |= telemetry.missing(rank.facts)
        if not rank.kernels:
            missing["launch_gap"] = _no_windows(rank)
    return missing


def _no_windows(rank: RankView) -> str:
    """Why nobody has seen the kernels of a rank."""
    if rank.clock != "cuda":
        return "gaps inside a step need kernel windows, and those a CUDA device"
    said = rank.facts.get("kernel_windows") or {}
    why = "LLMPROBE_KERNEL_WINDOWS is off"
    if said:
        why = str(said.get("reason") or "none has seen enough steps yet")
    return f"gaps inside a step need kernel windows: {why}"
