"""What a transformers program says about its model: weights, KV cache groups, flags.

Names of configuration fields differ between models and versions; what cannot be found is named under
``unmodelled`` rather than guessed.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from typing import Any

import llmprobe
from llmprobe.hooks.torch_model import (
    Weights,
    device_facts,
    dtype_name,
    weights,
)
from llmprobe.record.layout import KV_GROUPS
from llmprobe.settings import Settings

# Parts of multimodal and encoder-decoder models that run before the decoding loop, not in its steps.
_OUTSIDE = {
    "encoder",
    "vision_tower",
    "vision_model",
    "visual",
    "vision_embed_tokens",
    "audio_tower",
    "audio_encoder",
    "multi_modal_projector",
}
_RECURRENT = {"linear_attention", "mamba", "conv", "recurrent", "ssm", "gated_deltanet"}


@dataclass
class ModelDescription:
    """A model as steps need it: its facts, and the kind and window of each KV group, in their order."""

    facts: dict[str, Any]
    groups: tuple[tuple[str, int | None], ...]
    #: The group of each decoder layer.
    layer_groups: list[int] = field(default_factory=list)
    #: Bytes of one token's latents in all layers, if the model has MLA, and FLOPs that expand them: a step
    #: does so for its whole context if latents are what the cache holds, as in later versions.
    latent_bytes: float = 0.0
    expansion: float = 0.0


def program_facts(settings: Settings, server: str, model: Any, clock: str) -> dict[str, Any]:
    """Everything but the model itself; see docs/how-it-works.md, "What a journal says about its process"."""
    import torch
    import transformers

    return {
        "schema": 1,
        "group": os.environ.get("LLMPROBE_GROUP") or settings.group or "",
        "role": "program",
        "framework": "transformers",
        "framework_version": transformers.__version__,
        "runner": "generate",
        "llmprobe_version": llmprobe.__version__,
        "pid": os.getpid(),
        "server": server,
        "model_name": model_name(model),
        "engine": 0,
        "rank": 0,
        "device": device_facts(model.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "clock": clock,
        "flags": flags(model),
        "started": time.time(),
        "notes": [],
    }


def model_name(model: Any) -> str:
    """The last part of where the model was loaded from, else its class."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return name.rstrip("/").rpartition("/")[2] or type(model).__name__


def flags(model: Any) -> dict[str, Any]:
    """Settings that advice depends on, by transformers' own names; those at their defaults are left out."""
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    places = getattr(model, "hf_device_map", None)
    values = {
        "dtype": dtype_name(model.dtype),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "cache_implementation": getattr(
            getattr(model, "generation_config", None), "cache_implementation", None
        ),
        "quantization": str(getattr(method, "value", method)) if method is not None else None,
        "device_map": sorted({str(place) for place in places.values()}) if places else None,
        "compiled": True if _compiled(model) else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _compiled(model: Any) -> bool:
    forward = vars(model).get("forward")
    return getattr(model, "_compiled_call_impl", None) is not None or hasattr(
        forward, "_torchdynamo_orig_callable"
    )


def parameter_bytes(model: Any) -> int:
    """What all parameters show, shared ones once: changes if something unpacks or converts them."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def describe(model: Any) -> ModelDescription:
    """Weights by operator and the KV groups as the configuration tells; see also `measure_groups`."""
    text = model.config.get_text_config(decoder=True)
    unmodelled: list[str] = []
    found = weights(model, _classifier(model, text), model.device.type)
    operators: dict[str, Any] = {
        kind: {"bytes": found.bytes[kind], "params": found.params[kind]} for kind in ("linear", "head")
    }
    unmodelled += found.unmodelled
    if found.bytes["experts"]:
        _add_experts(operators, found, text, unmodelled)
    if found.bytes["other"]:
        unmodelled.append(f"encoder: {found.bytes['other']} bytes outside of the decoding loop")
    if not found.params["head"]:
        unmodelled.append("head: the model names no output embeddings")
    if any(parameter.device.type != model.device.type for parameter in model.parameters()):
        unmodelled.append("offload: weights that are moved in for each use")
    groups, layer_groups = _kv_groups(model, text, unmodelled)
    experts = operators.get("experts")
    experts_used = experts["top_k"] / experts["count"] if experts is not None else 1.0
    facts = {
        "weights_bytes": found.total_bytes,
        "compute_dtype": found.matmul_dtype(experts_used) or dtype_name(model.dtype),
        "operators": operators,
        "embedding_bytes": found.embedding_bytes,
        "tied": found.tied,
        "kv": {"capacity_bytes": None, "dtype": dtype_name(model.dtype), "groups": groups},
        "unmodelled": unmodelled,
    }
    expansion = sum(
        2.0 * module.in_features * module.out_features
        for name, module in model.named_modules()
        if name.endswith(".kv_b_proj") and hasattr(module, "in_features")
    )
    kinds = tuple((group["kind"], group["window"]) for group in groups)
    latent = (_first(text, "kv_lora_rank") or 0) + (_first(text, "qk_rope_head_dim") or 0)
    latent_bytes = float(latent * model.dtype.itemsize * len(layer_groups))
    return ModelDescription(facts, kinds, layer_groups, latent_bytes, expansion)


def _classifier(model: Any, text: Any) -> Any:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts_outside = model.config.is_encoder_decoder or text is not model.config

    def kind_of(name: str, module: Any) -> str:
        parts = name.split(".")
        if module is head or parts[-1] == "lm_head":
            return "head"
        if any(cls.__name__ == "Embedding" for cls in type(module).__mro__):
            return "embedding"
        if parts_outside and not _OUTSIDE.isdisjoint(parts):
            return "other"
        return "experts" if "experts" in parts else "linear"

    return kind_of


def _add_experts(operators: dict[str, Any], found: Weights, text: Any, unmodelled: list[str]) -> None:
    count = _first(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    top_k = _first(text, "num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token", "moe_k")
    count = count or found.experts
    weights_of = {"bytes": found.bytes["experts"], "params": found.params["experts"]}
    if count and top_k and top_k <= count:
        operators["experts"] = {**weights_of, "count": count, "top_k": top_k}
        return
    unmodelled.append("experts: the configuration does not tell how many serve a token; all are counted")
    operators["linear"]["bytes"] += weights_of["bytes"]
    operators["linear"]["params"] += weights_of["params"]


def _kv_groups(model: Any, text: Any, unmodelled: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The groups of decoder layers that see the same keys, and the group of each layer."""
    layers = _first(text, "num_decoder_layers", "decoder_layers", "num_hidden_layers") or 0
    heads = _first(text, "decoder_attention_heads", "num_attention_heads")
    types = _layer_types(text, layers, heads)
    element = model.dtype.itemsize
    pair = token = 0.0
    if heads:
        width = _first(text, "head_dim", "d_kv") or (_first(text, "hidden_size", "d_model") or 0) // heads
        key, value = _first(text, "qk_head_dim") or width, _first(text, "v_head_dim") or width
        pair = 2.0 * heads * (key + value)
        token = float((_first(text, "num_key_value_heads") or heads) * (key + value) * element)
    groups: list[dict[str, Any]] = []
    known: list[tuple[str, int | None]] = []
    layer_groups = []
    for kind, window in types:
        if (kind, window) not in known:
            known.append((kind, window))
            groups.append(_empty_group(kind, window))
        index = known.index((kind, window))
        group = groups[index]
        group["layers"] += 1
        if kind != "recurrent":
            group["bytes_per_token"] += token
            group["flops_per_pair"] += pair
        layer_groups.append(index)
    if model.config.is_encoder_decoder:
        groups.append(_empty_group("cross", None))
        groups[-1].update(layers=layers, bytes_per_token=token * layers, flops_per_pair=pair * layers)
        unmodelled.append("cross-attention projections: run once a prompt, counted in every step")
    if getattr(text, "attention_chunk_size", None) and "chunked_attention" in (_types_of(text) or ()):
        unmodelled.append("chunked attention: counted as a sliding window of the same size")
    if len(groups) > KV_GROUPS:
        unmodelled.append(f"attention: {len(groups)} kinds of layers, more than {KV_GROUPS}")
    return groups[:KV_GROUPS], layer_groups


def _empty_group(kind: str, window: int | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "window": window,
        "layers": 0,
        "bytes_per_token": 0.0,
        "flops_per_pair": 0.0,
        "bytes_per_request": 0.0,
    }


def _types_of(text: Any) -> list[str] | None:
    types = getattr(text, "layer_types", None)
    return list(types) if isinstance(types, (list, tuple)) else None


def _layer_types(text: Any, layers: int, heads: int | None) -> list[tuple[str, int | None]]:
    """(kind, window) of each decoder layer, as transformers' own caches decide it."""
    sliding, chunk = _first(text, "sliding_window"), _first(text, "attention_chunk_size")
    types = _types_of(text)
    if types is None:
        if not heads:
            return [("recurrent", None)] * layers
        if sliding and getattr(text, "use_sliding_window", True):
            return [("sliding", sliding)] * layers
        return [("sliding", chunk) if chunk else ("full", None)] * layers
    found: list[tuple[str, int | None]] = []
    for name in types:
        if name in _RECURRENT:
            found.append(("recurrent", None))
        elif name.startswith("sliding") and sliding:
            found.append(("sliding", sliding))
        elif name == "chunked_attention" and chunk:
            found.append(("sliding", chunk))
        else:
            found.append(("full", None))
    return found


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
