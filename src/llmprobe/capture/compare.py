"""Where what was shown live and what a capture found disagree, and which of the two to trust."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

#: How much the two sync-gap ratios of a phase may differ.
TOLERANCE = 0.03
_WORTH_SAYING = 0.01


def compare(
    report: Mapping[str, Any], during: Mapping[str, Any], meanwhile: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The live sync-gap ratios beside those of the capture, by phase.

    Args:
        report: what `llmprobe.analysis` found, as JSON.
        during: ``{"server": …}`` with the server's entry in ``/api/status`` at the end of the recording. Its
            figures are of 30 s: compared only where those of the recording's own seconds are not known.
        meanwhile: these, as `llmprobe.capture.meanwhile.meanwhile` makes them.

    Returns:
        ``phases`` (phase → ``live``, ``capture``: the report's ``comparable_sync_gap_ratio``,
        ``difference``, ``live_is_lower_bound``: bubbles inside steps are not in it, where it is known by
        what share of their time the recording itself made the steps longer, ``lengthened_ratio`` and
        ``undisturbed``: the capture's ratio without that, all of which is taken for idle time, and
        ``counted``: what the verdict at the end took from the GPU's counter, at least so much and of
        seconds of its own), ``same_seconds`` (whether the live ones are of the recording's own, neither of
        30 s nor of seconds known only roughly), ``tolerance``, ``disagree``; if they do, ``trusted``
        (``capture`` or ``live``) and ``why``. They agree where the live one, or the counted one, is within
        the tolerance of the capture's, of the undisturbed one, or between.
    """
    ranks = (meanwhile or {}).get("ranks") or ()
    live = _live(ranks)
    same_seconds, seconds = False, "30 s"
    if live:
        same_seconds = not (meanwhile or {}).get("rough")
        seconds = "the same seconds" if same_seconds else "about the same seconds"
    else:
        ranks = (during.get("server") or {}).get("ranks") or ()
        live = _live(ranks)
    seen, longer, counted = _captured(report), _lengthened(ranks), _counted(during.get("server") or {})
    phases: dict[str, dict[str, Any]] = {}
    for phase in sorted(live.keys() & seen.keys()):
        phases[phase] = {
            "live": live[phase],
            "capture": seen[phase],
            "difference": live[phase] - seen[phase],
            "live_is_lower_bound": _is_bound(ranks, phase),
        }
        if phase in longer:
            phases[phase]["lengthened_ratio"] = longer[phase]
            phases[phase]["undisturbed"] = _without(seen[phase], longer[phase])
        if phase in counted:
            phases[phase]["counted"] = counted[phase]
    apart = {name: found for name, found in phases.items() if not _agree(found)}
    result: dict[str, Any] = {
        "phases": phases,
        "same_seconds": same_seconds,
        "tolerance": TOLERANCE,
        "disagree": bool(apart),
    }
    if apart:
        verdict = (report.get("trust") or {}).get("verdict")
        trusted = "live" if verdict == "untrusted" else "capture"
        said = ", ".join(_said(name, found) for name, found in apart.items())
        because = (
            "the capture's own checks say not to trust it"
            if trusted == "live"
            else f"it saw {_what_was_seen(report)}; the live figure {_what_it_is(ranks, apart, seconds)}"
        )
        result.update(trusted=trusted, why=f"sync gaps disagree: {said}. Trust the {trusted} one: {because}")
    return result


def _what_was_seen(report: Mapping[str, Any]) -> str:
    reasons = (report.get("trust") or {}).get("reasons") or ()
    whole = any(reason.get("check") == "graphs_unseen" for reason in reasons)
    return "when kernels and whole CUDA graphs ran" if whole else "the kernels"


def _without(captured: float, lengthened: float) -> float:
    """A captured ratio less the idle time that the recording made."""
    return max(captured - lengthened, 0.0) / (1 - lengthened) if lengthened < 1 else captured


def _agree(found: Mapping[str, Any]) -> bool:
    least = found.get("undisturbed", found["capture"]) - TOLERANCE
    shown = (found["live"], found.get("counted", found["live"]))
    return any(least <= ratio <= found["capture"] + TOLERANCE for ratio in shown)


def _said(phase: str, found: Mapping[str, Any]) -> str:
    words = f"{phase} {found['live']:.3f} live"
    if "counted" in found:
        words += f" (at least {found['counted']:.3f} by the GPU's counter)"
    words += f", {found['capture']:.3f} captured"
    if found.get("lengthened_ratio", 0.0) >= _WORTH_SAYING:
        share = f"{found['lengthened_ratio']:.0%} of the steps' time"
        words += f" ({found['undisturbed']:.3f} without the {share} that the recording added)"
    elif "lengthened_ratio" not in found and found["capture"] > found["live"]:
        words += " (how much of it the recording made is not known)"
    return words


def _is_bound(ranks: Iterable[Mapping[str, Any]], phase: str) -> bool:
    figures = [(rank.get("figures") or {}).get(phase) for rank in ranks]
    return any(found.get("sync_gap_is_lower_bound", True) for found in figures if found)


def _what_it_is(ranks: Iterable[Mapping[str, Any]], phases: Collection[str], seconds: str) -> str:
    """Where the live figures of these phases fall short of a capture's."""
    bound = any(_is_bound(ranks, phase) for phase in phases)
    inside = "has no bubbles inside steps" if bound else "takes bubbles inside steps from kernel windows"
    return f"{inside} and is of {seconds}"


def _live(ranks: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    rows = (
        (phase, found.get("sync_gap_ratio"), found.get("seconds"))
        for rank in ranks
        for phase, found in (rank.get("figures") or {}).items()
    )
    return _means(rows)


def _lengthened(ranks: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    rows = (
        (phase, found.get("lengthened_ratio"), found.get("seconds"))
        for rank in ranks
        for phase, found in (rank.get("figures") or {}).items()
    )
    return _means(rows)


def _counted(server: Mapping[str, Any]) -> dict[str, float]:
    """By phase, where the server's verdict took its sync gap from the GPU's counter of activity."""
    return {
        phase: item["value"]
        for phase, verdict in (server.get("verdicts") or {}).items()
        for item in verdict.get("evidence") or ()
        if (item.get("quantity"), item.get("source")) == ("sync_gap_ratio", "counter")
        and item.get("value") is not None
    }


def _captured(report: Mapping[str, Any]) -> dict[str, float]:
    rows = (
        (phase["name"], phase.get("comparable_sync_gap_ratio"), _seconds(phase))
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
