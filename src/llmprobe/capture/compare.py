"""Where what was shown live and what a capture found disagree, and which of the two to trust."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: How much the two sync-gap ratios of a phase may differ.
TOLERANCE = 0.03


def compare(report: Mapping[str, Any], during: Mapping[str, Any]) -> dict[str, Any]:
    """The sync-gap ratios shown live at the end of the recording beside those of the capture, by phase.

    Args:
        report: what `llmprobe.analysis` found, as JSON.
        during: ``{"server": …}`` with the server's entry in ``/api/status``. Its figures are of 30 s.

    Returns:
        ``phases`` (phase → ``live``, ``capture``, ``difference``), ``tolerance``, ``disagree``; if they do,
        ``trusted`` (``capture`` or ``live``) and ``why``.
    """
    live = _live(during.get("server") or {})
    seen = _captured(report)
    phases = {
        phase: {"live": live[phase], "capture": seen[phase], "difference": live[phase] - seen[phase]}
        for phase in sorted(live.keys() & seen.keys())
    }
    apart = {name: found for name, found in phases.items() if abs(found["difference"]) > TOLERANCE}
    result: dict[str, Any] = {"phases": phases, "tolerance": TOLERANCE, "disagree": bool(apart)}
    if apart:
        verdict = (report.get("trust") or {}).get("verdict")
        trusted = "live" if verdict == "untrusted" else "capture"
        said = ", ".join(
            f"{name} {found['live']:.3f} live, {found['capture']:.3f} captured"
            for name, found in apart.items()
        )
        because = (
            "the capture's own checks say not to trust it"
            if trusted == "live"
            else "it saw the kernels; the live figure has no bubbles inside steps and is of 30 s"
        )
        result.update(trusted=trusted, why=f"sync gaps disagree: {said}. Trust the {trusted} one: {because}")
    return result


def _live(server: Mapping[str, Any]) -> dict[str, float]:
    rows = (
        (phase, found.get("sync_gap_ratio"), found.get("seconds"))
        for rank in server.get("ranks") or ()
        for phase, found in (rank.get("figures") or {}).items()
    )
    return _means(rows)


def _captured(report: Mapping[str, Any]) -> dict[str, float]:
    rows = (
        (phase["name"], phase.get("sync_gap_ratio"), _seconds(phase))
        for phase in report.get("phases") or ()
        if phase.get("part") is None
    )
    return _means(rows)


def _seconds(phase: Mapping[str, Any]) -> float:
    """Of a captured phase, its gaps included; 0 where no device work could be tied to it."""
    return (phase.get("gap_seconds") or 0.0) + (phase.get("seconds") or 0.0)


def _means(rows: Iterable[tuple[str, float | None, float | None]]) -> dict[str, float]:
    """Mean ratios by phase over ranks or GPUs, each weighed with its seconds; unknown ones are left out."""
    sums: dict[str, tuple[float, float]] = {}
    for phase, ratio, seconds in rows:
        if ratio is not None and seconds:
            weighed, total = sums.get(phase, (0.0, 0.0))
            sums[phase] = (weighed + ratio * seconds, total + seconds)
    return {phase: weighed / total for phase, (weighed, total) in sums.items()}
