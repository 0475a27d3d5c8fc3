"""What llmprobe and vLLM said second by second while a scenario ran, and whether llmprobe was right."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llmprobe.agent.client import AgentError, request
from llmprobe.demo.server import VllmServer
from support.labels import Label

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_PERIOD_SECONDS = 0.5
_ENGINE_EVERY = 2  # looks of ours
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv",
}
_COUNTERS = {"vllm:generation_tokens_total": "tokens", "vllm:prompt_tokens_total": "prompts"}
#: Within which every verdict has to be right, and above which a wrong one is a failure.
RIGHT_SECONDS, SURE = 15.0, 0.5
#: What a phase may be said to be while its load changes, besides the old and the new class.
_NO_CLAIM = ("unknown", "idle")


@dataclass(frozen=True)
class Said:
    """One look at ``/api/status``: seconds into the scenario, verdicts by phase, headline, and what is
    advised for each phase, by name."""

    at: float
    verdicts: dict[str, dict[str, Any]]
    headline: str
    pressure: dict[str, Any]
    advice: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Trace:
    """All looks at one scenario."""

    said: list[Said] = field(default_factory=list)
    engine: list[dict[str, float]] = field(default_factory=list)

    def engine_figures(self) -> dict[str, float]:
        """Mean of vLLM's gauges, and the most of its cache that was in use (``kv_most``)."""
        if not self.engine:
            return {}
        names = {*_GAUGES.values()} & {name for sample in self.engine for name in sample}
        figures = {
            name: sum(sample.get(name, 0.0) for sample in self.engine) / len(self.engine) for name in names
        }
        return {**figures, "kv_most": max(sample.get("kv", 0.0) for sample in self.engine)}

    def tokens(self) -> float:
        """Generated between the first look and the last, by vLLM's counter."""
        return self.engine[-1]["tokens"] - self.engine[0]["tokens"] if self.engine else 0.0

    def prompt_tokens_per_second(self, after: float) -> float:
        """Of the looks later than ``after`` seconds, by vLLM's counter; 0 where these are fewer than two."""
        late = [sample for sample in self.engine if sample["at"] >= after]
        if len(late) < 2:
            return 0.0
        return (late[-1]["prompts"] - late[0]["prompts"]) / (late[-1]["at"] - late[0]["at"])


class Watching(threading.Thread):
    """Looks twice a second until told to stop."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._ended = threading.Event()
        self._begin = time.monotonic()
        self.trace = Trace()

    def so_far(self) -> Trace:
        """A copy, which does not go on."""
        return Trace(list(self.trace.said), list(self.trace.engine))

    def run(self) -> None:
        looks = 0
        while not self._ended.wait(_PERIOD_SECONDS):
            # A look that fails is one look less; too few of them and nothing is right.
            with contextlib.suppress(AgentError, OSError, ValueError, IndexError):
                self._look(engine=looks % _ENGINE_EVERY == 0)
            looks += 1

    def __enter__(self) -> Watching:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()

    def _look(self, engine: bool) -> None:
        code, answer = request(self._server.directory, "GET", "/api/status")
        if code == 200:
            entry = answer["servers"][0]
            keep = (
                "bottleneck",
                "cause",
                "confidence",
                "reason",
                "evidence",
                "steps_per_second",
                "share_ratio",
            )
            verdicts = {
                phase: {name: verdict.get(name) for name in keep}
                for phase, verdict in entry["verdicts"].items()
            }
            advice = {
                about: tuple(found["finding"] for found in findings)
                for about, findings in (entry.get("advice") or {}).items()
            }
            at = time.monotonic() - self._begin
            pressure = entry.get("pressure") or {}
            self.trace.said.append(Said(at, verdicts, entry["headline"], pressure, advice))
        if engine:
            figures = engine_figures(self._server)
            self.trace.engine.append({"at": time.monotonic() - self._begin, **figures})


def engine_figures(server: VllmServer) -> dict[str, float]:
    """vLLM's own gauges and counts of tokens."""
    with _OPENER.open(f"{server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = dict.fromkeys(_COUNTERS.values(), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _GAUGES:
                found[_GAUGES[sample.name]] = sample.value
            elif sample.name in _COUNTERS:
                found[_COUNTERS[sample.name]] += sample.value
    return found


@dataclass(frozen=True)
class Score:
    """A label held against a trace.

    Attributes:
        right_after: seconds from when the load was steady to the first right verdict; None: never.
        flips: changes of class or cause after that, in ``steady_seconds``.
        third: classes that were neither the old nor the new one of their phase.
        wrong: the wrong verdict with the most confidence later than `RIGHT_SECONDS` after that, if above
            `SURE`.
        last: what was said at the end, of the phase that was judged.
        right_at_end: whether that was right.
    """

    right_after: float | None
    flips: int
    third: tuple[str, ...]
    wrong: str | None
    last: dict[str, Any]
    headline: str
    faults: tuple[str, ...]
    steady_seconds: float
    right_at_end: bool


def score(
    trace: Trace, label: Label, phase: str | None, before: dict[str, str], steady_at: float = 0.0
) -> Score:
    """Hold a label against what was said.

    Args:
        trace: of one scenario.
        label: its truth.
        phase: the one judged; None for all of them.
        before: the class of each phase when the load changed to this one.
        steady_at: when the load was steady; seconds from its start.
    """
    right = [_right(said, label, phase) for said in trace.said]
    first = right.index(True) if True in right else None
    # Where the headline is the label, only whether it is right may not flip.
    shown: list[Any] = [_key(said, phase) for said in trace.said] if label.classes else list(right)
    shown = [] if first is None else shown[first:]
    flips = sum(old != new for old, new in itertools.pairwise(shown))
    third = _third(trace.said, label, phase, before)
    wrong = _wrong(trace.said, label, phase, steady_at + RIGHT_SECONDS)
    last = trace.said[-1] if trace.said else Said(0.0, {}, "", {})
    judged = next(iter(last.verdicts.values()), {}) if phase is None else last.verdicts.get(phase, {})
    after = None if first is None else max(trace.said[first].at - steady_at, 0.0)
    faults = []
    if after is None:
        faults.append("never right")
    elif after > RIGHT_SECONDS:
        faults.append(f"right only after {after:.0f} s")
    elif not right[-1]:
        faults.append("not right at the end")
    faults += [f"wrong: {wrong}"] if wrong else []
    faults += [f"third class: {', '.join(third)}"] if third else []
    faults += [f"{flips} flips"] if flips else []
    steady = 0.0 if first is None else last.at - trace.said[first].at
    at_end = bool(right and right[-1])
    return Score(after, flips, third, wrong, judged, last.headline, tuple(faults), steady, at_end)


def unchanged_seconds(trace: Trace, phase: str | None) -> float:
    """For how long the last classes and causes have been said."""
    said = list(trace.said)  # the looks go on
    if not said:
        return 0.0
    last = _key(said[-1], phase)
    same = itertools.takewhile(lambda look: _key(look, phase) == last, reversed(said))
    return said[-1].at - [look.at for look in same][-1]


def classes(trace: Trace) -> dict[str, str]:
    """The class of each phase at the end."""
    return (
        {phase: item["bottleneck"] for phase, item in trace.said[-1].verdicts.items()} if trace.said else {}
    )


def as_json(trace: Trace) -> dict[str, Any]:
    """Everything that was seen, without what did not change since the look before."""
    said: list[dict[str, Any]] = []
    for look in trace.said:
        if not said or (look.headline, _key(look, None)) != (said[-1]["headline"], said[-1]["key"]):
            said.append({**asdict(look), "key": _key(look, None)})
    return {"looks": [look.at for look in trace.said], "said": said, "engine": trace.engine}


def _judged(said: Said, phase: str | None) -> Sequence[tuple[str, dict[str, Any]]]:
    return [(name, item) for name, item in said.verdicts.items() if phase in (None, name)]


def _right(said: Said, label: Label, phase: str | None) -> bool:
    if label.headline is not None and label.headline not in said.headline:
        return False
    if not label.classes:
        return True
    found = _judged(said, phase)
    return bool(found) and all(
        _agrees(item, label)
        and _shows(item, label)
        and (label.advice is None or label.advice in said.advice.get(name, ()))
        for name, item in found
    )


def _agrees(item: dict[str, Any], label: Label) -> bool:
    return item["bottleneck"] in label.classes and label.cause in (None, item["cause"])


def _shows(item: dict[str, Any], label: Label) -> bool:
    shown = {evidence["quantity"] for evidence in item.get("evidence") or ()}
    return not label.evidence or not shown.isdisjoint(label.evidence)


def _key(said: Said, phase: str | None) -> list[tuple[str, str, str | None]]:
    return [(name, item["bottleneck"], item["cause"]) for name, item in _judged(said, phase)]


def _third(looks: Sequence[Said], label: Label, phase: str | None, before: dict[str, str]) -> tuple[str, ...]:
    if not label.classes:
        return ()
    found: dict[str, None] = {}
    for said in looks:
        for name, item in said.verdicts.items():
            new = label.classes if phase in (None, name) else ()
            # A phase that the load holds little of is judged too, and no scenario says what it is.
            little = phase is not None and name != phase and name not in before
            if not little and item["bottleneck"] not in (*_NO_CLAIM, before.get(name), *new):
                found[f"{name} {item['bottleneck']} at {said.at:.0f} s"] = None
    return tuple(found)


def _wrong(looks: Sequence[Said], label: Label, phase: str | None, since: float) -> str | None:
    if not label.classes:
        return None
    wrong = [
        (item["confidence"], f"{name} {item['bottleneck']} ({item['confidence']:.2f}) at {said.at:.0f} s")
        for said in looks
        if said.at > since
        for name, item in _judged(said, phase)
        if not _agrees(item, label) and item["bottleneck"] != "unknown" and item["confidence"] > SURE
    ]
    return max(wrong)[1] if wrong else None
