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
from support.nsys_idle import Idle


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder, from its configuration alone."""

    layer_params: int  # of all layers: those that a token is multiplied with
    head_params: int  # of the output head
    query_width: int  # of a layer: heads times the size of a head
    kv_bytes_per_token: int  # of a layer
    windows: tuple[int | None, ...]  # of each layer: the tokens it sees at most; None: all
    bytes_per_param: int

    @classmethod
    def of(cls, config: Mapping[str, Any], bytes_per_param: int = 2) -> Model:
        """``config`` as in a model directory's ``config.json``; dense."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head = config.get("head_dim") or hidden // heads
        layer = 2 * hidden * (heads + kv_heads) * head + 3 * hidden * config["intermediate_size"]
        kinds = config.get("layer_types") or ["full_attention"] * layers
        windows = tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
        kv = 2 * kv_heads * head * bytes_per_param
        return cls(layers * layer, config["vocab_size"] * hidden, heads * head, kv, windows, bytes_per_param)

    @property
    def weights_bytes(self) -> int:
        """Read once a decode step."""
        return (self.layer_params + self.head_params) * self.bytes_per_param

    def kv_bytes(self, context: float) -> float:
        """Read for one request's next token."""
        seen = sum(min(context, window or context) for window in self.windows)
        return seen * self.kv_bytes_per_token

    def prefill_flops(self, prompt: int) -> float:
        """Of a whole prompt: two a parameter and token, the head for its last token alone, and attention, in
        which each token meets those before it twice (scores and values)."""
        pairs = 0.0
        for window in self.windows:
            seen = min(prompt, window or prompt)
            pairs += seen * seen / 2 + (prompt - seen) * seen
        return 2 * self.layer_params * prompt + 2 * self.head_params + 4 * pairs * self.query_width


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
        prompt_rate: prompt tokens per second, by the same, once the load was steady.
        clock_ratio: the share of every span that the step clock was made to tell.
        traced: of an nsys recording under the same load, see `support.nsys_idle`; None where none was made.
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
    prompt_rate: float = 0.0
    clock_ratio: float = 1.0
    traced: Idle | None = None

    @property
    def weights_share(self) -> float:
        """Of the time per token: reading the weights once."""
        return self.model.weights_bytes / self.bandwidth / (self.client.tpot_seconds or float("inf"))

    @property
    def kv_bytes(self) -> float:
        """Read in a decode step: every request's context, half of its output on average."""
        return self.batch * self.model.kv_bytes(self.prompt_tokens + self.output_tokens / 2)

    @property
    def memory_share(self) -> float:
        """Of the time per token: reading the weights once, and every request's cache."""
        kv = self.kv_bytes / self.bandwidth / (self.client.tpot_seconds or float("inf"))
        return self.weights_share + kv

    @property
    def prefill_share(self) -> float:
        """Of the time to first token: the prompt's FLOPs."""
        work = self.model.prefill_flops(self.prompt_tokens)
        return work / self.flops / (self.client.ttft_seconds or float("inf"))

    @property
    def prompts_share(self) -> float:
        """Of all time: the FLOPs of as many prompts as the server took; what it generated is not counted."""
        prompts = self.prompt_rate / self.prompt_tokens if self.prompt_tokens else 0.0
        return prompts * self.model.prefill_flops(self.prompt_tokens) / self.flops

    @property
    def added_share(self) -> float:
        """Of the time per token: what it has more than without what the scenario adds."""
        if self.reference is None or not self.reference.tpot_seconds or not self.client.tpot_seconds:
            return 0.0
        return 1 - self.reference.tpot_seconds / self.client.tpot_seconds


Rule = Callable[[Facts], Label]
#: From this share of idle time on a run is sync-bound without doubt; the verdict's threshold is 0.20.
_IDLE = 0.25
#: Signs of a thread that wants a core and has none, as a verdict's evidence names them.
_NO_CORE = ("host_run_queue", "host_involuntary_switches")


def _counted(facts: Facts) -> str:
    return ", ".join(f"{name} {facts.counters.get(name, 0):.2f}" for name in ("dram", "tensor"))


def _waits(facts: Facts, without: str) -> tuple[str, bool]:
    """Whether the device idles 0.25 of the time: by nsys, or else by what the load takes without a thing."""
    if facts.traced is not None:
        inside = f"{facts.traced.inside:.2f} of it inside steps"
        return f"nsys: idle {facts.traced.ratio:.2f} (≥ {_IDLE}), {inside}", facts.traced.ratio >= _IDLE
    return f"1 − TPOT {without} = {facts.added_share:.2f} (≥ {_IDLE})", facts.added_share >= _IDLE


def reads_memory(facts: Facts) -> Label:
    """memory_bound: weights and KV cache fill 0.55 of the time per token, and the DRAM counter agrees."""
    share, dram = facts.memory_share, facts.counters.get("dram", 0.0)
    holds = share >= 0.55 and dram >= 0.50 and dram > facts.counters.get("tensor", 1.0)
    return Label(
        ("memory_bound",), f"(weights + KV) ÷ TPOT ÷ peak = {share:.2f} (≥ 0.55); {_counted(facts)}", holds
    )


def reads_memory_or_waits(facts: Facts) -> Label:
    """memory_bound or sync_bound: weights and KV cache fill about half of the time per token, the device
    waits for some of the rest, and nothing from outside says on which side of the line that is."""
    share, active = facts.memory_share, facts.counters.get("graphics", 1.0)
    rule = f"(weights + KV) ÷ TPOT ÷ peak = {share:.2f} (0.45 … 0.60); GPU active {active:.2f} (0.70 … 0.90)"
    return Label(("memory_bound", "sync_bound"), rule, 0.45 <= share <= 0.60 and 0.70 <= active <= 0.90)


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


def multiplies_beside_decode(facts: Facts) -> Label:
    """compute_bound: the prompts' products fill 0.45 of all time, and the tensor counter leads."""
    tensor = facts.counters.get("tensor", 0.0)
    holds = facts.prompts_share >= 0.45 and tensor > facts.counters.get("dram", 1.0)
    rule = f"FLOPs of prompts ÷ time ÷ peak = {facts.prompts_share:.2f} (≥ 0.45); {_counted(facts)}"
    return Label(("compute_bound",), rule, holds)


def multiplies_plainly(facts: Facts) -> Label:
    """compute_bound without tensor cores, as `multiplies`; the dtype is advised."""
    rule = f"FLOPs ÷ TTFT ÷ float32 peak = {facts.prefill_share:.2f} (≥ 0.45); {_counted(facts)}"
    holds = facts.prefill_share >= 0.45
    return Label(("compute_bound",), rule, holds, advice="compute_bound.dtype")


def reaches_no_roof(facts: Facts) -> Label:
    """inefficient_kernels: the GPU is busy, by nsys or else by its counter, and near neither roof."""
    dram, tensor = facts.counters.get("dram", 1.0), facts.counters.get("tensor", 1.0)
    idle = facts.traced.ratio if facts.traced else 1 - facts.counters.get("graphics", 0.0)
    by = "nsys" if facts.traced else "GPU active"
    rule = f"idle by {by} {idle:.2f} (≤ 0.10); dram {dram:.2f} (< 0.40), tensor {tensor:.2f} (< 0.30)"
    return Label(("inefficient_kernels",), rule, idle <= 0.10 and dram < 0.40 and tensor < 0.30)


def launches_one_by_one(facts: Facts) -> Label:
    """sync_bound: the device idles, mostly inside steps; or without nsys: with graphs the same load takes at
    most 0.75 of the time."""
    rule, holds = _waits(facts, "with graphs ÷ TPOT")
    holds = holds and (facts.traced is None or facts.traced.inside > facts.traced.ratio / 2)
    return Label(("sync_bound",), f"{rule}; {_counted(facts)}", holds, cause="launch_bubbles")


def launches_unseen(facts: Facts) -> Label:
    """As `launches_one_by_one` with kernel windows off: told by the counter of activity, else unknown."""
    label = launches_one_by_one(facts)
    active = facts.counters.get("graphics")
    if active is None:
        return Label(("unknown",), f"{label.rule}; nothing looks", label.holds, "no_kernel_windows")
    rule = f"{label.rule}; windows are off, GPU active {active:.2f} (≤ 0.70)"
    return Label(label.classes, rule, label.holds and active <= 0.7, label.cause)


def waits_for_host(facts: Facts) -> Label:
    """sync_bound: the host sleeps between steps, and the device idles by nsys; or without nsys: at least 0.25
    of the time per token came with the sleep."""
    rule, holds = _waits(facts, "without ÷ with")
    return Label(("sync_bound",), rule, holds, cause="host_between_steps")


def outruns_host(facts: Facts) -> Label:
    """sync_bound: nothing is injected, and by nsys, or else by the counter of activity, the device idles 0.25
    of the time under a load that never ends: its steps are shorter than what the host does for each."""
    active = facts.counters.get("graphics", 1.0)
    by, idle = ("nsys", facts.traced.ratio) if facts.traced else ("GPU active", 1 - active)
    rule = f"idle by {by} {idle:.2f} (≥ {_IDLE}); {_counted(facts)}"
    return Label(("sync_bound",), rule, idle >= _IDLE, cause="host_between_steps")


def starved(facts: Facts) -> Label:
    """sync_bound, whatever for, with the signal of the host: the engine's threads share one core with busy
    others."""
    rule, holds = _waits(facts, "without ÷ with")
    return Label(("sync_bound",), f"{rule}, one core", holds, evidence=_NO_CORE)


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
    """A model so small that even the counters see an idle GPU: sync_bound or inefficient, as nsys says; both
    are right where it was not asked."""
    sm, dram = facts.counters.get("sm", 1.0), facts.counters.get("dram", 1.0)
    rule = f"SM {sm:.2f}, {_counted(facts)} (all < 0.35)"
    small = max(sm, dram, facts.counters.get("tensor", 1.0)) < 0.35
    if facts.traced is None:
        return Label(("sync_bound", "inefficient_kernels"), rule, small)
    idle = facts.traced.ratio
    rule = f"nsys: idle {idle:.2f} (≥ {_IDLE} or ≤ 0.10); {rule}"
    said = "sync_bound" if idle >= _IDLE else "inefficient_kernels"
    return Label((said,), rule, small and not 0.10 < idle < _IDLE)


def waits_for_cache(facts: Facts) -> Label:
    """Pressure in the headline: requests wait for a cache that fills; TTFT is mostly that wait."""
    alone = facts.reference.ttft_seconds if facts.reference else None
    share = 1 - alone / facts.client.ttft_seconds if alone and facts.client.ttft_seconds else 0.0
    used, waiting = facts.engine.get("kv_most", 0.0), facts.engine.get("waiting", 0.0)
    rule = f"1 − TTFT alone ÷ now = {share:.2f} (≥ 0.60), vLLM: {waiting:.1f} waiting, KV up to {used:.2f}"
    return Label((), rule, share >= 0.6 and waiting >= 1 and used >= 0.9, headline="SLOW:")


def is_lied_to(facts: Facts) -> Label:
    """unknown: the benchmark makes spans so short that memory would be read beyond its peak."""
    share = facts.memory_share / facts.clock_ratio
    rule = f"(weights + KV) ÷ TPOT ÷ peak ÷ the clock's ratio = {share:.2f} (≥ 1.20)"
    return Label(("unknown",), rule, share >= 1.2, "contradiction")
