"""The KV cache of one vLLM worker: what a token, a request and a (query, key) pair cost, by kind of layer.

Read off the ``KVCacheConfig`` that the worker gets, so quantised, replicated and latent layouts count as they
are stored.
"""

from __future__ import annotations

from math import prod
from typing import Any

from llmprobe.hooks.torch_model import storage_bytes, tensors_in
from llmprobe.record.layout import KV_GROUPS

#: Specs by class whose visible keys `llmprobe.hooks.attention.visible_attention` tells.
_KNOWN = {
    "FullAttentionSpec",
    "SlidingWindowSpec",
    "MLAAttentionSpec",
    "SlidingWindowMLASpec",
    "MambaSpec",
    "CrossAttentionSpec",
}


def kv_cache(worker: Any, config: Any) -> tuple[dict[str, Any], list[str]]:
    """The cache as `llmprobe.compute.facts.ModelFacts` reads it, and what of it is not modelled.

    Args:
        config: vLLM's ``KVCacheConfig``.
    """
    layers: dict[str, Any] = worker.vllm_config.compilation_config.static_forward_context
    found = _Groups()
    specs = {
        name: spec
        for group in config.kv_cache_groups
        for name, spec in _specs(group).items()
        if not _shares(layers.get(name))
    }
    for name, spec in specs.items():
        found.add(name, spec, layers.get(name), own=True)
    for name, layer in layers.items():
        # Layers that read what another layer has cached, and write nothing.
        if (spec := specs.get(_shares(layer) or "")) is not None:
            found.add(name, spec, layer, own=False)
    problems = found.problems
    if len(found.groups) > KV_GROUPS:
        problems.add(f"attention: {len(found.groups)} kinds of KV cache, more than {KV_GROUPS}")
    if not found.groups:
        problems.add("attention: this rank has no KV cache")
    parallel = worker.vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (getattr(parallel, name, 1) or 1) > 1:
            problems.add(f"attention: {name}={getattr(parallel, name)} spreads a context over ranks")
    capacity = storage_bytes(tensors_in(getattr(worker.model_runner, "kv_caches", [])))
    blocks = int(config.num_blocks)
    return (
        {
            "capacity_bytes": capacity,
            "block_bytes": capacity // blocks if blocks else 0,
            "blocks": blocks,
            "dtype": str(worker.vllm_config.cache_config.cache_dtype),
            "groups": list(found.groups.values())[:KV_GROUPS],
        },
        sorted(problems),
    )


class _Groups:
    """Layers that see the same keys, summed up."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, int | None], dict[str, Any]] = {}
        self.problems: set[str] = set()

    def add(self, name: str, spec: Any, layer: Any, own: bool) -> None:
        """One layer. ``own``: it fills the cache that it reads."""
        kind, window = self._kind(spec, layer)
        group = self.groups.setdefault(
            (kind, window),
            {
                "kind": kind,
                "window": window,
                "layers": 0,
                "bytes_per_token": 0.0,
                "bytes_written_per_token": 0.0,
                "flops_per_pair": 0.0,
                "flops_per_pair_prefill": 0.0,
                "flops_per_cached_key_prefill": 0.0,
                "bytes_per_request": 0.0,
            },
        )
        group["layers"] += 1
        if kind == "recurrent":
            group["bytes_per_request"] += _state_bytes(spec)
            return
        page = int(getattr(spec, "real_page_size_bytes", 0) or spec.page_size_bytes) / spec.block_size
        group["bytes_per_token"] += page
        group["bytes_written_per_token"] += page if own else 0.0
        decode, prefill = flops_per_pair(layer, spec)
        group["flops_per_pair"] += decode
        group["flops_per_pair_prefill"] += prefill
        if kind == "mla":
            group["flops_per_cached_key_prefill"] += _expansion(layer)
        if not decode:
            self.problems.add(f"attention: the number of query heads of {name} is not known")

    def _kind(self, spec: Any, layer: Any) -> tuple[str, int | None]:
        name = type(spec).__name__
        classes = {cls.__name__ for cls in type(spec).__mro__}
        window = getattr(spec, "sliding_window", None)
        chunk = getattr(spec, "attention_chunk_size", None)
        if name == "ChunkedLocalAttentionSpec" or chunk:
            self.problems.add("attention: in chunks, where what a query sees depends on its place")
        elif name not in _KNOWN:
            self.problems.add(f"attention: {name} is not known")
        if getattr(spec, "tokens_per_state", 1) not in (1, -1):
            self.problems.add("attention: the cache keeps one state for several tokens")
        if getattr(layer, "indexer", None) is not None or getattr(layer, "use_sparse", False):
            self.problems.add("attention: sparse, an index decides which keys are seen")
        if "MambaSpec" in classes:
            return "recurrent", None
        if "CrossAttentionSpec" in classes:
            self.problems.add("attention: the encoder's length, which cross attention sees, is not recorded")
            return "cross", None
        window = window or chunk
        if "MLAAttentionSpec" in classes or "SlidingWindowMLASpec" in classes:
            return "mla", window
        return ("sliding", int(window)) if window else ("full", None)


def flops_per_pair(layer: Any, spec: Any) -> tuple[float, float]:
    """FLOPs of a query against a key, all query heads of this rank: when decoding, and of a prompt.

    2·h·(d_qk + d_v). MLA decodes with its projections absorbed (scores over latent and rope, values over the
    latent) and takes prompts with its heads expanded (DeepSeek-V2, arXiv:2405.04434, section 2.1; vLLM's
    ``mla_attention.py`` says which when).
    """
    heads = getattr(layer, "num_heads", 0) or 0
    latent, rope = getattr(layer, "kv_lora_rank", None), getattr(layer, "qk_rope_head_dim", None)
    if latent and rope is not None:
        absorbed = float(2 * heads * (2 * latent + rope))
        expanded = (
            (getattr(layer, "qk_nope_head_dim", 0) or 0) + rope + (getattr(layer, "v_head_dim", 0) or 0)
        )
        return absorbed, float(2 * heads * expanded)
    key = getattr(spec, "head_size", 0) or 0
    flops = float(2 * heads * (key + (getattr(spec, "head_size_v", None) or key)))
    return flops, flops


def _expansion(layer: Any) -> float:
    """FLOPs that make keys and values of one cached latent again, which a later chunk of a prompt needs."""
    projection = getattr(layer, "kv_b_proj", None)
    sizes = [getattr(projection, f"{side}_size_per_partition", 0) for side in ("output", "input")]
    return 2.0 * prod(sizes)


def _specs(group: Any) -> dict[str, Any]:
    spec = group.kv_cache_spec
    return getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)


def _shares(layer: Any) -> str | None:
    """The layer whose cache this one reads, if it has none of its own."""
    return getattr(layer, "kv_sharing_target_layer_name", None)


def _state_bytes(spec: Any) -> int:
    # Pages are padded to those of the attention layers beside them.
    shapes, dtypes = getattr(spec, "shapes", ()), getattr(spec, "dtypes", ())
    exact = sum(prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
    return int(exact or spec.page_size_bytes)
