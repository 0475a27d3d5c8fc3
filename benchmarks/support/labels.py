"""What a scenario is bound by, and the rule that says so without llmprobe.

A rule sees what a client timed, the size of the weights' file, the peaks that were measured before, and what
the benchmark itself did. Its margins are wider than the verdict's thresholds: what lies between is nobody's
mistake, and the label does not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

_BYTES_PER_PARAMETER = 4  # all models here are float32
#: Such a share of the time without a core, of the thread that lacks one most, and the host may hold up the
#: device for as long as makes a verdict of its own.
_BUSY_MACHINE = 0.1


@dataclass(frozen=True)
class Machine:
    """What `llmprobe calibrate` measured for as many threads as the server gets."""

    threads: int
    bandwidth_bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Client:
    """Medians over the requests of one scenario, in seconds; None where there were none."""

    requests: int
    ttft_seconds: float | None
    tpot_seconds: float | None

    @classmethod
    def of(cls, rows: np.ndarray, output_tokens: int) -> Client:
        """From `Load.requests`."""
        if not len(rows):
            return cls(0, None, None)
        first = float(np.median(rows["first"] - rows["sent"])) / 1e9
        if output_tokens < 2:
            return cls(len(rows), first, None)
        token = float(np.median(rows["last"] - rows["first"])) / 1e9 / (output_tokens - 1)
        return cls(len(rows), first, token)


@dataclass(frozen=True)
class Facts:
    """All that a rule may look at.

    Attributes:
        client: of the scenario's own load.
        alone: of the same load without what the scenario adds; None where none ran.
        weights_bytes: size of the safetensors files.
        prompt_tokens: of each request.
        chunk_tokens: most tokens of a step.
        engine: of vLLM's own ``/metrics``, the mean over the scenario by name, and ``kv_most``.
        tokens: generated in the scenario, by the same.
        clock_ratio: the share of every span that the step clock was made to tell.
        waited_ratio: the share of the time that a thread of the server waited for a core, see `waited`.
    """

    machine: Machine
    client: Client
    alone: Client | None
    weights_bytes: int
    prompt_tokens: int
    chunk_tokens: int
    engine: dict[str, float]
    tokens: float
    clock_ratio: float = 1.0
    waited_ratio: float = 0.0

    @property
    def memory_share(self) -> float:
        """Of the time per token: reading the weights once at the machine's bandwidth."""
        tpot = self.client.tpot_seconds or float("inf")
        return self.weights_bytes / self.machine.bandwidth_bytes_per_second / tpot

    @property
    def compute_share(self) -> float:
        """Of the time per token: two FLOPs a parameter at the machine's rate."""
        tpot = self.client.tpot_seconds or float("inf")
        return 2 * self.weights_bytes / _BYTES_PER_PARAMETER / self.machine.flops_per_second / tpot

    @property
    def prefill_compute_share(self) -> float:
        """Of the time to first token: two FLOPs a parameter and prompt token, attention not counted."""
        ttft = self.client.ttft_seconds or float("inf")
        flops = 2 * self.weights_bytes / _BYTES_PER_PARAMETER * self.prompt_tokens
        return flops / self.machine.flops_per_second / ttft

    @property
    def prefill_memory_share(self) -> float:
        """Of the time to first token: reading the weights once for each chunk of the prompt."""
        ttft = self.client.ttft_seconds or float("inf")
        chunks = -(-self.prompt_tokens // self.chunk_tokens)
        return chunks * self.weights_bytes / self.machine.bandwidth_bytes_per_second / ttft

    @property
    def added_share(self) -> float:
        """Of the time per token: what it has more than without the injection."""
        if self.alone is None or not self.alone.tpot_seconds or not self.client.tpot_seconds:
            return 0.0
        return 1 - self.alone.tpot_seconds / self.client.tpot_seconds


@dataclass(frozen=True)
class Label:
    """The truth of one scenario.

    Attributes:
        classes: any of them is right.
        cause: likewise; None where the class has none or any will do.
        headline: words that it has to contain.
        rule: what decided, with its figures.
        holds: False where the rule cannot tell; nothing is scored then.
        evidence: quantities, one of which the verdict has to show; none where any evidence will do.
        advice: a finding that has to be among the advice for the phase.
    """

    classes: tuple[str, ...]
    rule: str
    holds: bool
    cause: str | None = None
    headline: str | None = None
    evidence: tuple[str, ...] = ()
    advice: str | None = None


Rule = Callable[[Facts], Label]


def _or_waits(label: Label, facts: Facts) -> Label:
    """``label``; where others had the server's cores for long, it is true too that it waits for its host.

    Or nobody can tell: they had them while the peaks were measured too, which are too low then.
    """
    waited = facts.waited_ratio
    if waited < _BUSY_MACHINE:
        return label
    rule = f"{label.rule}; but its threads waited for a core {waited:.2f} of the time (≥ {_BUSY_MACHINE})"
    classes = tuple(dict.fromkeys((*label.classes, "sync_bound", "unknown")))
    return replace(label, classes=classes, cause=None, headline=None, rule=rule)


def reads_weights(facts: Facts) -> Label:
    """memory_bound: at least 0.50 of the time per token is reading the weights at the calibrated rate.

    More than all of it: then they lie in a cache, or that rate is wrong.
    """
    share = facts.memory_share
    holds = 0.50 <= share <= 1.0 and share > facts.compute_share
    rule = f"weights ÷ TPOT ÷ peak = {share:.2f} (≥ 0.50), FLOPs {facts.compute_share:.2f}"
    return _or_waits(Label(("memory_bound",), rule, holds), facts)


def lightly_loaded(facts: Facts) -> Label:
    """As `reads_weights`, with the engine running nothing for at least 0.4 of the time."""
    label = reads_weights(facts)
    busy = facts.engine.get("running", 1.0)
    rule = f"{label.rule}; requests run {busy:.2f} of the time (≤ 0.60)"
    return replace(label, rule=rule, holds=label.holds and busy <= 0.6)


def multiplies(facts: Facts) -> Label:
    """compute_bound: at least 0.45 of the time to first token is FLOPs at the calibrated rate."""
    compute, memory = facts.prefill_compute_share, facts.prefill_memory_share
    rule = f"FLOPs ÷ TTFT ÷ peak = {compute:.2f} (≥ 0.45), weights {memory:.2f}"
    holds = compute >= 0.45 and compute > 2 * memory
    return _or_waits(Label(("compute_bound",), rule, holds), facts)


def waits_for_host(facts: Facts) -> Label:
    """sync_bound: at least 0.25 of the client's time per token came with the injection."""
    share = facts.added_share
    rule = f"1 − TPOT without ÷ with = {share:.2f} (≥ 0.25)"
    return Label(("sync_bound",), rule, share >= 0.25, cause="host_between_steps")


def by_client_alone(facts: Facts) -> Label:
    """Whichever roof the client's time per token comes near, or neither: then it waits or is inefficient."""
    memory, compute = facts.memory_share, facts.compute_share
    rule = f"memory {memory:.2f}, compute {compute:.2f} of TPOT"
    if memory > 1.1:
        return Label(("unknown",), f"{rule}: beyond the peak, weights in a cache", True, "contradiction")
    if memory >= 0.50 and memory > compute:
        return _or_waits(Label(("memory_bound",), f"{rule} (memory ≥ 0.50)", True), facts)
    if compute >= 0.45 and compute > memory:
        return _or_waits(Label(("compute_bound",), f"{rule} (compute ≥ 0.45)", True), facts)
    neither = max(memory, compute) < 0.3
    return Label(("sync_bound", "inefficient_kernels"), f"{rule} (both < 0.30)", neither)


def runs_nothing(facts: Facts) -> Label:
    """idle: vLLM itself generated no token and runs no request."""
    running = facts.engine.get("running", 1.0)
    rule = f"vLLM's own count: {facts.tokens:.0f} tokens, {running:.1f} running"
    return Label(("idle",), rule, facts.tokens == 0 and running == 0)


def waits_for_cache(facts: Facts) -> Label:
    """Pressure in the headline: by vLLM, requests wait for a cache that fills; TTFT is mostly that wait."""
    alone = facts.alone.ttft_seconds if facts.alone else None
    share = 1 - alone / facts.client.ttft_seconds if alone and facts.client.ttft_seconds else 0.0
    # A preemption frees a third of so small a cache at once, so its mean says little.
    used, waiting = facts.engine.get("kv_most", 0.0), facts.engine.get("waiting", 0.0)
    rule = f"1 − TTFT alone ÷ now = {share:.2f} (≥ 0.60), vLLM: {waiting:.1f} waiting, KV up to {used:.2f}"
    holds = share >= 0.6 and waiting >= 1 and used >= 0.9
    # The class of the device's work is another scenario's.
    return Label((), rule, holds, headline="SLOW:")


def is_lied_to(facts: Facts) -> Label:
    """unknown: the benchmark makes spans so short that weights would be read beyond the peak."""
    share = facts.memory_share / facts.clock_ratio
    rule = f"weights ÷ TPOT ÷ peak ÷ the clock's ratio = {share:.2f} (≥ 1.20)"
    return Label(("unknown",), rule, share >= 1.2, "contradiction")


def knows_no_peaks(facts: Facts) -> Label:
    """unknown: the cache that peaks are read from was made empty for this server."""
    share = facts.memory_share
    rule = f"empty XDG_CACHE_HOME; all but weights {1 - share:.2f} of TPOT"
    return _or_waits(Label(("unknown",), rule, True, "no_peaks", headline="calibrate"), facts)
