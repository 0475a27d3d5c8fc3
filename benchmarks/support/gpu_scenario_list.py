"""The runs on a GPU that are bound by one thing: their servers, loads, injections and rules."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from llmprobe.demo.server import VllmServer
from support import gpu_labels
from support.busy_core import one_busy_core
from support.load import Load
from support.serving import NAME


@dataclass(frozen=True)
class Requests:
    """A closed loop of the client's."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    pause_seconds: float = 0.0

    def on(self, server: VllmServer) -> Load:
        return Load(
            server.port, NAME, self.concurrency, self.prompt_tokens, self.output_tokens, self.pause_seconds
        )

    def shrunk(self) -> Requests:
        """The like of it for a processor, where only the machinery is tried."""
        prompt, output = max(self.prompt_tokens // 16, 16), min(self.output_tokens, 64)
        return Requests(min(self.concurrency, 8), prompt, output, self.pause_seconds)


Disturb = Callable[[VllmServer], AbstractContextManager[None]]


@dataclass(frozen=True)
class Before:
    """The load that runs until the scenario begins, without a pause between them.

    Attributes:
        load: the same as the scenario's goes on; another one ends as the scenario's begins.
        phase: has to have a verdict by then; without one a change of it says nothing.
        slow_steps: as in `Scenario`, until then.
    """

    load: Requests
    phase: str
    slow_steps: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """A run that is bound by one thing.

    Attributes:
        kind: of its server, in `support.gpu_scenario_servers.KINDS`.
        rule: gives the label.
        phase: the one judged; None for all.
        load: None for none.
        reference: the scenario that ran before on the same load, without what this one adds.
        slow_steps: the host sleeps for so many times the reference's time per token between two steps.
        slow_seconds: or for so long.
        clock_ratio: the step clock tells that share of every span; 0: the truth.
        disturb: goes on meanwhile.
        before: None where nothing runs in the second before.
        least_seconds: shorter, it says nothing: its first request would not be over.
    """

    name: str
    kind: str
    rule: gpu_labels.Rule
    phase: str | None
    load: Requests | None
    reference: str | None = None
    slow_steps: float = 0.0
    slow_seconds: float = 0.0
    clock_ratio: float = 0.0
    disturb: Disturb | None = None
    before: Before | None = None
    least_seconds: float = 0.0


_ONE, _LONG_PROMPT = Requests(1, 128, 256), Requests(1, 8000, 1)
_MANY = Requests(128, 64, 512)
#: Two prompts fill a step, and each request is in 16 of them: enough wait that every step is full.
_MIXED = Requests(40, 4000, 16)
_ALONE, _OTHER = "decode, batch 1, graphs", "another model, batch 1"
#: In this order: each begins with the load of the one before it just gone, which is a change of load too.
SCENARIOS = (
    Scenario(_ALONE, "graphs", gpu_labels.reads_memory, "decode", _ONE),
    Scenario("decode, batch 128", "graphs", gpu_labels.reads_memory, "decode", _MANY),
    Scenario("prefill, 8000 tokens", "graphs", gpu_labels.multiplies, "prefill", _LONG_PROMPT),
    Scenario("mixed, chunked prefill", "graphs", gpu_labels.multiplies_beside_decode, "mixed", _MIXED),
    Scenario(
        "decode, 16 x 9000 tokens", "graphs", gpu_labels.reads_cache, "decode", Requests(16, 8800, 1400),
        least_seconds=45,
    ),
    Scenario("idle", "graphs", gpu_labels.runs_nothing, None, None),
    Scenario("light load", "graphs", gpu_labels.lightly_loaded, "decode", Requests(1, 128, 100, 1.5)),
    Scenario("bursts", "graphs", gpu_labels.lightly_loaded, "decode", Requests(4, 128, 300, 4.0)),
    Scenario(
        "host between steps, async", "graphs", gpu_labels.waits_for_host, "decode", _ONE, _ALONE,
        slow_steps=1.5,
    ),
    Scenario(
        "change: the host becomes slow", "graphs", gpu_labels.waits_for_host, "decode", _ONE, _ALONE,
        slow_steps=1.5, before=Before(_ONE, "decode"),
    ),
    Scenario(
        "change: the host recovers", "graphs", gpu_labels.reads_memory, "decode", _ONE, _ALONE,
        before=Before(_ONE, "decode", slow_steps=1.5),
    ),
    Scenario(
        "change: decode to prefill", "graphs", gpu_labels.multiplies, "prefill", _LONG_PROMPT,
        before=Before(_ONE, "decode"),
    ),
    Scenario(
        "engine on one busy core", "graphs", gpu_labels.starved, "decode", _ONE, _ALONE,
        disturb=one_busy_core,
    ),
    Scenario("a clock that lies", "graphs", gpu_labels.is_lied_to, "decode", _ONE, clock_ratio=0.5),
    Scenario(
        "decode, batch 1, no async", "sync", gpu_labels.reads_memory_or_waits, "decode", Requests(1, 512, 512)
    ),
    Scenario(
        "host between steps, 3 ms", "sync", gpu_labels.waits_for_host, "decode", Requests(1, 512, 512),
        "decode, batch 1, no async", slow_seconds=0.003,
    ),
    Scenario(
        "KV cache too small", "sync", gpu_labels.waits_for_cache, "decode", Requests(32, 512, 512),
        "decode, batch 1, no async",
    ),
    Scenario("decode, batch 1, eager", "eager", gpu_labels.launches_one_by_one, "decode", _ONE, _ALONE),
    Scenario("eager, windows off", "blind", gpu_labels.launches_unseen, "decode", _ONE, _ALONE),
    Scenario("tiny model, graphs", "tiny", gpu_labels.leaves_it_idle, "decode", _ONE),
    Scenario(
        "prefill, float32", "float32", gpu_labels.multiplies_plainly, "prefill", Requests(1, 3500, 1)
    ),
    Scenario("odd shapes, prefill", "odd", gpu_labels.reaches_no_roof, "prefill", _LONG_PROMPT),
    Scenario("odd shapes, batch 64", "odd", gpu_labels.reaches_no_roof, "decode", Requests(64, 64, 256)),
    Scenario(_OTHER, "other", gpu_labels.reads_memory, "decode", _ONE),
    Scenario("another model, batch 128", "other", gpu_labels.reads_memory, "decode", _MANY),
    Scenario("another model, prefill", "other", gpu_labels.multiplies, "prefill", _LONG_PROMPT),
    Scenario("another model, mixed", "other", gpu_labels.multiplies_beside_decode, "mixed", _MIXED),
    Scenario(
        "another model, light load", "other", gpu_labels.lightly_loaded, "decode", Requests(1, 128, 100, 1.5)
    ),
    Scenario(
        "another model, host", "other", gpu_labels.waits_for_host, "decode", _ONE, _OTHER, slow_steps=1.5
    ),
    Scenario(
        "another model, the host becomes slow", "other", gpu_labels.waits_for_host, "decode", _ONE, _OTHER,
        slow_steps=1.5, before=Before(_ONE, "decode"),
    ),
    Scenario(
        "another model, one busy core", "other", gpu_labels.starved, "decode", _ONE, _OTHER,
        disturb=one_busy_core,
    ),
    Scenario(
        "another model, a clock that lies", "other", gpu_labels.is_lied_to, "decode", _ONE, clock_ratio=0.3
    ),
    Scenario("sliding windows, prefill", "windows", gpu_labels.multiplies, "prefill", _LONG_PROMPT),
    Scenario("sliding windows, mixed", "windows", gpu_labels.multiplies_beside_decode, "mixed", _MIXED),
    Scenario("sliding windows, batch 128", "windows", gpu_labels.outruns_host, "decode", _MANY),
)  # fmt: skip


def rehearsed(scenario: Scenario) -> Scenario:
    """The same with small loads."""
    before = scenario.before
    return replace(
        scenario,
        load=scenario.load and scenario.load.shrunk(),
        before=before and replace(before, load=before.load.shrunk()),
        least_seconds=0.0,
    )


def with_references(chosen: list[Scenario], known: set[str]) -> list[Scenario]:
    """Those, and before them what they refer to on the same server and is not known; in their order."""
    wanted = {item.name for item in chosen}
    for item in chosen:
        if item.reference is not None and item.reference not in known:
            (reference,) = (other for other in SCENARIOS if other.name == item.reference)
            if reference.kind == item.kind:
                wanted.add(reference.name)
    return [item for item in SCENARIOS if item.name in wanted]
