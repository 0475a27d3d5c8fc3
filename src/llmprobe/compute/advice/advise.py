"""Fits findings to one server: which apply, what to change, what it can gain."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmprobe.compute.advice.entry import OF_NOW, Change, Entry
from llmprobe.compute.advice.gain import GAINS
from llmprobe.compute.advice.table import ENTRIES
from llmprobe.compute.figures import PhaseFigures
from llmprobe.compute.pressure import EngineLoad, Pressure
from llmprobe.compute.stall import Stall
from llmprobe.compute.verdict import Verdict

#: What is still possible once a run has ended.
_RECORD, _AGAIN = "llmprobe run --nsys -- COMMAND", "llmprobe run -- COMMAND"
_SERVED = re.compile(r"vllm-(\d+)")  # the label of a server that was given none
#: What is of no use, or of another process, once a run has ended.
_PASSING = ("{pid}", "{core_pid}", "{pids}", "{metrics}")
MOST = 4  #: findings a phase: more is no advice


@dataclass(frozen=True)
class Target:
    """What is advised: a server, its engine's flags by their own names, and the process of one rank.

    ``clock`` is that of its steps. ``measurable``: ``llmprobe calibrate`` measures what it multiplies in.
    """

    server: str
    framework: str
    flags: Mapping[str, Any]
    pid: int | None = None
    running: bool = True  # else a finished run is advised upon
    core_pid: int | None = None  # of the process that schedules, where that is another
    clock: str = ""
    measurable: bool = True


@dataclass(frozen=True)
class Advice:
    """One finding that applies. ``change`` is ready to be read out: what is set now and what to try."""

    finding: str
    reason: str
    flag: str | None
    current: Any
    proposed: Any
    change: str
    gain: str
    gain_seconds: float | None  # a step, at most
    gain_throughput: float | None  # times as many tokens per second, at most
    risk: str
    look: str


def advise(verdict: Verdict, figures: PhaseFigures | None, target: Target) -> tuple[Advice, ...]:
    """What applies to one phase, likeliest first, at most `MOST`."""
    facts = {
        **target.flags,
        "@framework": target.framework,
        "@clock": verdict.clock,
        "@measurable": target.measurable,
        "@phase": verdict.phase,
        "@operator": verdict.bound_by_operator,
        "@healthy": verdict.healthy,
        **{f"@sign.{name}": True for name in verdict.signs},
        **_batch(figures, target.flags),
    }
    found = (
        _advice(entry, target, facts, verdict, figures)
        for entry in _applying(verdict.bottleneck, verdict.cause, facts)
    )
    return tuple(item for item in found if item is not None)[:MOST]


def advise_pressure(pressure: Pressure, load: EngineLoad, target: Target) -> tuple[Advice, ...]:
    """What applies to one kind of pressure that is active."""
    facts = {
        **target.flags,
        "@framework": target.framework,
        "@clock": target.clock or None,
        "@waiting": load.waiting,
        "@kv_usage": load.kv_most,
        "@running": load.running,
        "@running_ratio": _of_limit(load.running, target.flags),
        "@front_end_wait": (load.front_end.run_queue_ratio or 0.0) if load.front_end else None,
    }
    found = (_advice(entry, target, facts) for entry in _applying("pressure", pressure.kind, facts))
    return tuple(item for item in found if item is not None)[:MOST]


def advise_stall(stall: Stall, target: Target) -> tuple[Advice, ...]:
    """What to look at while a rank does not get on. ``target`` names its process."""
    facts = {**target.flags, "@framework": target.framework, "@clock": target.clock or None}
    found = (_advice(entry, target, facts) for entry in _applying("stall", stall.where, facts))
    return tuple(item for item in found if item is not None)[:MOST]


def _batch(figures: PhaseFigures | None, flags: Mapping[str, Any]) -> dict[str, float | None]:
    """How many sequences decode in a step; not known where each may have several tokens in it."""
    if figures is None or not figures.steps or not figures.decode_tokens or flags.get("speculative_method"):
        return {}
    batch = figures.decode_tokens / figures.steps
    return {"@batch": batch, "@batch_ratio": _of_limit(batch, flags)}


def _of_limit(sequences: float | None, flags: Mapping[str, Any]) -> float | None:
    limit = flags.get("max_num_seqs")
    if sequences is None or isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0:
        return None
    return sequences / limit


def _applying(bottleneck: str, cause: str | None, facts: Mapping[str, Any]) -> Iterable[Entry]:
    return (
        entry
        for entry in ENTRIES
        if entry.bottleneck == bottleneck
        and entry.is_of(cause)
        and all(condition.holds(facts) for condition in entry.when)
    )


def _advice(
    entry: Entry,
    target: Target,
    facts: Mapping[str, Any],
    verdict: Verdict | None = None,
    figures: PhaseFigures | None = None,
) -> Advice | None:
    current = proposed = None
    change = ""
    if entry.change is not None:
        current = target.flags.get(entry.change.told_by or entry.change.flag)
        proposed = entry.change.proposed(current, facts)
        if proposed is None or proposed == current:
            return None
        change = _said(entry.change, current, proposed, target.framework)
    gain = None
    if entry.gain and verdict is not None and figures is not None and figures.steps:
        gain = GAINS[entry.gain](verdict, figures)
    return Advice(
        finding=entry.finding,
        reason=entry.reason,
        flag=entry.change.flag if entry.change else None,
        current=current,
        proposed=proposed,
        change=change,
        gain=gain.text if gain else "",
        gain_seconds=gain.seconds if gain else None,
        gain_throughput=gain.throughput if gain else None,
        risk=entry.risk,
        look=_look(entry.look, target),
    )


def _look(look: str, target: Target) -> str:
    if not target.running:
        if "{server}" in look:
            return _RECORD
        if any(name in look for name in _PASSING) or look in OF_NOW:
            return _AGAIN
    served = _SERVED.fullmatch(target.server)
    return look.format(
        server=shlex.quote(target.server),
        pid=target.pid or "PID",
        core_pid=target.core_pid or target.pid or "PID",
        pids=",".join(str(pid) for pid in dict.fromkeys((target.core_pid, target.pid)) if pid) or "PID",
        metrics=f"http://{f'localhost:{served[1]}' if served else 'HOST:PORT'}/metrics",
    )


def _said(change: Change, current: Any, proposed: Any, framework: str) -> str:
    now = "not set" if current is None else f"{change.told_by} {current}".lstrip()
    return f"{setting(change.flag, proposed, framework)} (now: {now})"


def setting(flag: str, value: Any, framework: str) -> str:
    """How a setting is written for this engine: vLLM's command line, or a keyword argument."""
    if framework != "vllm":
        return f"{flag}={value!r}"
    option = flag.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {shlex.quote(str(value))}"
