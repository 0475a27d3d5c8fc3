"""How much the KV cache of one ``generate`` call holds, from shapes and storages: nothing synchronises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmprobe.hooks.torch_model import storage_bytes, tensors_in
from llmprobe.hooks.transformers_model import ModelDescription


def cache_among(inputs: Mapping[str, Any]) -> Any:
    """The cache that a forward is given, or None: ``past_key_values`` up to 5.19, ``cache`` in 5.24."""
    found = inputs.get("cache")
    return inputs.get("past_key_values") if found is None else found


def cache_of(outputs: Any) -> Any:
    """The cache that a forward gives back, or None.

    Where outputs know the newer name, the older one would leave a warning in the program's log.
    """
    return outputs.cache if hasattr(outputs, "cache") else getattr(outputs, "past_key_values", None)


def cache_length(cache: Any) -> int | None:
    """Tokens in a cache before a forward, if shapes tell; None for static caches (a tensor would: a sync)."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        first = cache[0][0] if cache and cache[0] else None
        return int(first.shape[-2]) if first is not None else 0
    inner = getattr(cache, "self_attention_cache", cache)
    if is_static(inner) or not hasattr(inner, "get_seq_length"):
        return None
    length = inner.get_seq_length()
    return length if isinstance(length, int) else None


def is_static(cache: Any) -> bool:
    """Whether a cache has its final size from the start."""
    cache = getattr(cache, "self_attention_cache", cache)
    name = type(cache).__name__
    return bool(getattr(cache, "is_compileable", False)) or "Static" in name or "Hybrid" in name


def _layers(cache: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(keys, values, layer or None) of each layer of a self-attention cache."""
    if isinstance(cache, (tuple, list)):
        for layer in cache:
            yield (*layer[:2], None)
    elif hasattr(cache, "layers"):
        for layer in cache.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None), layer
    elif hasattr(cache, "key_cache"):
        for keys, values in zip(cache.key_cache, cache.value_cache, strict=False):
            yield keys, values, None


@dataclass(frozen=True)
class CacheSize:
    """How large a cache is, and how it grows: measured once, then followed by the number of tokens."""

    bytes: int
    length: int
    #: (bytes a token of the whole batch, length at which that part stops growing)
    growth: tuple[tuple[float, float], ...]

    def at(self, length: int) -> int:
        """Resident bytes when the cache holds ``length`` tokens a row."""
        total = float(self.bytes)
        for rate, cap in self.growth:
            total += rate * (min(length, cap) - min(self.length, cap))
        return int(total)


def measure_cache(cache: Any, length: int) -> CacheSize:
    """Walk a whole cache (some 10 µs a layer): at the first steps of a request only."""
    resident = storage_bytes(tensors_in(cache))
    growth: dict[float, float] = {}
    own = getattr(cache, "self_attention_cache", cache)
    if not is_static(own):
        for keys, values, layer in _layers(own):
            window = getattr(layer, "sliding_window", None)
            cap = float(window) if isinstance(window, int) else float("inf")
            growth[cap] = growth.get(cap, 0.0) + _token_bytes(keys) + _token_bytes(values)
    return CacheSize(resident, length, tuple((rate, cap) for cap, rate in growth.items() if rate))


def measure_groups(description: ModelDescription, cache: Any, rows: int) -> dict[str, Any] | None:
    """Facts with bytes a token as the cache really stores them, or None if they are right already.

    The configuration does not tell how many heads multi-query models keep, nor latent or quantised layouts.
    """
    groups = [dict(group) for group in description.facts["kv"]["groups"]]
    measured = [[0.0, 0.0] for _ in groups]
    for index, (keys, values, layer) in enumerate(_layers(getattr(cache, "self_attention_cache", cache))):
        if index >= len(description.layer_groups) or description.layer_groups[index] >= len(groups):
            return None
        per_token, per_request = measured[description.layer_groups[index]]
        per_token += (_token_bytes(keys) + _token_bytes(values)) / rows
        states = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states")]
        per_request += storage_bytes(tensors_in(states)) / rows
        measured[description.layer_groups[index]] = [per_token, per_request]
    for group, (per_token, per_request) in zip(groups, measured, strict=True):
        if per_token and group["kind"] != "cross":
            share = group["layers"] / len(description.layer_groups)
            if description.expansion and per_token == description.latent_bytes * share:
                expanded = description.expansion * share
                group["flops_per_cached_key"] = group["flops_per_cached_key_prefill"] = expanded
            group["bytes_per_token"] = per_token
        group["bytes_per_request"] = per_request or group["bytes_per_request"]
    if groups == description.facts["kv"]["groups"]:
        return None
    description.facts["kv"]["groups"] = groups
    return description.facts


def _token_bytes(tensor: Any) -> float:
    """Bytes that one more token adds to a (batch, heads, tokens, width) tensor, for the whole batch."""
    if tensor is None or not hasattr(tensor, "shape") or len(tensor.shape) != 4 or not tensor.shape[2]:
        return 0.0
    return float(tensor.numel() // tensor.shape[2] * tensor.element_size())
