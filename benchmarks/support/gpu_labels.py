"""What a run on a GPU is bound by, and the rule that says so without llmprobe.

A rule sees what a client timed, sizes worked out from the model's configuration, published peaks, the
hardware's own counters (NVML GPM) over the same seconds, and what the benchmark itself did. Its margins are
wider than the verdict's thresholds; what lies between is nobody's mistake, and the label does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from support.labels import Client, Label


@dataclass(frozen=True)
class Model:
    """Sizes of a dense decoder, from its configuration alone."""

    linear_params: int  # of all layers and the output head
    kv_bytes_per_token: int
    bytes_per_param: int

    @classmethod
    def of(cls, config: Mapping[str, Any], bytes_per_param: int = 2) -> Model:
        """``config`` as in a model directory's ``config.json``."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head = config.get("head_dim") or hidden // heads
        attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
        layer = attention + 3 * hidden * config["intermediate_size"]
        kv = 2 * layers * kv_heads * head * bytes_per_param
        return cls(layers * layer + config["vocab_size"] * hidden, kv, bytes_per_param)

    @property
    def weights_bytes(self) -> int:
        """Read once a step."""
        return self.linear_params * self.bytes_per_param


@dataclass(frozen=True)
class Facts:
    """All that a rule may look at.

    Attributes:
        bandwidth: published, bytes per second.
        flops: published for the dtype that products are computed in, per second.
        counters: means over the scenario's steady part, see `support.gpm`.
        client: of the scenario's own load.
        reference: of the same load without what the scenario adds; None where none ran.
        engine: of vLLM's own ``/metrics``, the mean over the scenario by name.
        tokens: generated in the scenario, by the same.
    """

    model: Model
    bandwidth: float
    flops: float
    counters: Mapping[str, float]
    client: Client
    reference: Client | None
    batch: int
    prompt_tokens: int
    output_tokens: int
    engine: Mapping[str, float]
    tokens: float

    @property
    def weights_share(self) -> float:
        """Of the time per token: reading the weights once."""
        return self.model.weights_bytes / self.bandwidth / (self.client.tpot_seconds or float("inf"))

    @property
    def kv_bytes(self) -> float:
        """Read in a decode step: every request's context, half of its output on average."""
        context = self.prompt_tokens + self.output_tokens / 2
        return self.batch * context * self.model.kv_bytes_per_token

    @property
    def prefill_share(self) -> float:
        """Of the time to first token: two FLOPs a parameter and prompt token, attention not counted."""
        work = 2 * self.model.linear_params * self.prompt_tokens
        return work / self.flops / (self.client.ttft_seconds or float("inf"))

    @property
    def added_share(self) -> float:
        """Of the time per token: what it has more than without what the scenario adds."""
        if self.reference is None or not self.reference.tpot_seconds or not self.client.tpot_seconds:
            return 0.0
        return 1 - self.reference.tpot_seconds / self.client.tpot_seconds


Rule = Callable[[Facts], Label]


def _counted(facts: Facts) -> str:
    return ", ".join(f"{name} {facts.counters.get(name, 0):.2f}" for name in ("dram", "tensor"))


def reads_memory(facts: Facts) -> Label:
    """memory_bound: weights and KV cache fill 0.55 of the time per token, and the DRAM counter agrees."""
    kv = facts.kv_bytes / facts.bandwidth / (facts.client.tpot_seconds or float("inf"))
    share, dram = facts.weights_share + kv, facts.counters.get("dram", 0.0)
    holds = share >= 0.55 and dram >= 0.50 and dram > facts.counters.get("tensor", 1.0)
    return Label(
        ("memory_bound",), f"(weights + KV) ÷ TPOT ÷ peak = {share:.2f} (≥ 0.55); {_counted(facts)}", holds
    )


def reads_cache(facts: Facts) -> Label:
    """As `reads_memory`, with more bytes of KV cache than of weights."""
    label = reads_memory(facts)
    more = facts.kv_bytes / facts.model.weights_bytes
    return Label(
        label.classes, f"{label.rule}; KV ÷ weights = {more:.2f} (≥ 1.2)", label.holds and more >= 1.2
    )


def multiplies(facts: Facts) -> Label:
    """compute_bound: products fill 0.45 of the time to first token, and the tensor counter leads."""
    tensor = facts.counters.get("tensor", 0.0)
    holds = facts.prefill_share >= 0.45 and tensor > facts.counters.get("dram", 1.0)
    rule = f"FLOPs ÷ TTFT ÷ peak = {facts.prefill_share:.2f} (≥ 0.45); {_counted(facts)}"
    return Label(("compute_bound",), rule, holds)


def multiplies_plainly(facts: Facts) -> Label:
    """compute_bound without tensor cores: products fill 0.45 of the time to first token."""
    rule = f"FLOPs ÷ TTFT ÷ float32 peak = {facts.prefill_share:.2f} (≥ 0.45); {_counted(facts)}"
    return Label(("compute_bound",), rule, facts.prefill_share >= 0.45)


def launches_one_by_one(facts: Facts) -> Label:
    """sync_bound: the same load takes at most 0.75 of the time where kernels are launched as one graph."""
    rule = f"1 − TPOT with graphs ÷ TPOT = {facts.added_share:.2f} (≥ 0.25); {_counted(facts)}"
    return Label(("sync_bound",), rule, facts.added_share >= 0.25, cause="launch_bubbles")


def launches_unseen(facts: Facts) -> Label:
    """As `launches_one_by_one` with kernel windows off: told by the counter of activity, else unknown."""
    label = launches_one_by_one(facts)
    active = facts.counters.get("graphics")
    if active is None:
        return Label(("unknown",), f"{label.rule}; nothing looks", label.holds, "no_kernel_windows")
    rule = f"{label.rule}; windows are off, GPU active {active:.2f} (≤ 0.70)"
    return Label(label.classes, rule, label.holds and active <= 0.7, label.cause)


def waits_for_host(facts: Facts) -> Label:
    """sync_bound: at least 0.25 of the time per token came with the injection."""
    rule = f"1 − TPOT without ÷ with = {facts.added_share:.2f} (≥ 0.25)"
    return Label(("sync_bound",), rule, facts.added_share >= 0.25, cause="host_between_steps")


def starved(facts: Facts) -> Label:
    """sync_bound, whatever for: the engine's threads share one core with busy others."""
    rule = f"1 − TPOT without ÷ with = {facts.added_share:.2f} (≥ 0.25), one core"
    return Label(("sync_bound",), rule, facts.added_share >= 0.25)


def runs_nothing(facts: Facts) -> Label:
    """idle: vLLM generated no token and runs no request."""
    running = facts.engine.get("running", 1.0)
    rule = f"vLLM's own count: {facts.tokens:.0f} tokens, {running:.1f} running"
    return Label(("idle",), rule, facts.tokens == 0 and running == 0)


def lightly_loaded(facts: Facts) -> Label:
    """As `reads_memory` while requests run, with the GPU at work at most 0.6 of the time."""
    busy = facts.counters.get("graphics", 1.0)
    rule = f"weights ÷ TPOT ÷ peak = {facts.weights_share:.2f} (≥ 0.55); GPU active {busy:.2f} (≤ 0.60)"
    return Label(("memory_bound",), rule, facts.weights_share >= 0.55 and busy <= 0.6)


def leaves_it_idle(facts: Facts) -> Label:
    """sync_bound or inefficient: a model so small that even the counters see an idle GPU."""
    sm, dram = facts.counters.get("sm", 1.0), facts.counters.get("dram", 1.0)
    rule = f"SM {sm:.2f}, {_counted(facts)} (all < 0.35)"
    return Label(
        ("sync_bound", "inefficient_kernels"), rule, max(sm, dram, facts.counters.get("tensor", 1)) < 0.35
    )


def waits_for_cache(facts: Facts) -> Label:
    """Pressure in the headline: requests wait for a cache that fills; TTFT is mostly that wait."""
    alone = facts.reference.ttft_seconds if facts.reference else None
    share = 1 - alone / facts.client.ttft_seconds if alone and facts.client.ttft_seconds else 0.0
    used, waiting = facts.engine.get("kv_most", 0.0), facts.engine.get("waiting", 0.0)
    rule = f"1 − TTFT alone ÷ now = {share:.2f} (≥ 0.60), vLLM: {waiting:.1f} waiting, KV up to {used:.2f}"
    return Label((), rule, share >= 0.6 and waiting >= 1 and used >= 0.9, headline="SLOW:")


def is_lied_to(facts: Facts) -> Label:
    """unknown: the benchmark makes the step clock run at half its speed."""
    return Label(("unknown",), f"the clock's spans are halved; {_counted(facts)}", True, "contradiction")
