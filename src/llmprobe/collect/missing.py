"""What cannot be shown of a server, and why."""

from __future__ import annotations

from collections.abc import Sequence

from llmprobe.collect.peaks import why_no_peaks
from llmprobe.collect.process import Rank
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.views import EngineView, RankView


def what_is_missing(
    ranks: Sequence[tuple[RankView, Rank]], engines: Sequence[EngineView], telemetry: Telemetry | None
) -> dict[str, str]:
    """Figure → why a server has none.

    Args:
        ranks: the view of each rank and where it comes from.
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
    for view, rank in ranks:
        if rank.model is None:
            missing["mbu_ratio"] = missing["mfu_ratio"] = f"no model of the work: {rank.model_problem}"
        elif rank.peaks is None:
            device = view.facts.get("device") or {}
            name = device.get("name", "this device")
            if view.gpu is not None and view.gpu.mig:
                name = f"a MIG slice of {name}"
            missing["mbu_ratio"] = missing["mfu_ratio"] = why_no_peaks(view.facts, name)
        if telemetry is not None:
            missing |= telemetry.missing(view.facts)
        if not view.kernels:
            missing["launch_gap"] = _no_windows(view)
    return missing


def _no_windows(rank: RankView) -> str:
    """Why nobody has seen the kernels of a rank."""
    if rank.clock != "cuda":
        return "gaps inside a step need kernel windows, and those a CUDA device"
    said = rank.facts.get("kernel_windows") or {}
    why = str(said.get("reason") or "none was opened yet") if said else "LLMPROBE_KERNEL_WINDOWS is off"
    return f"gaps inside a step need kernel windows: {why}"
