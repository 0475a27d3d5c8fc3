"""What a vLLM process says about itself once: versions, flags, the model's weights and its KV cache."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from typing import Any

import llmprobe
from llmprobe.hooks.torch_model import storage_bytes, tensors_in
from llmprobe.record.layout import KV_GROUPS
from llmprobe.settings import Settings


def process_facts(settings: Settings, server: str, role: str, config: Any, engine: int) -> dict[str, Any]:
    """Facts that every vLLM process knows. ``config`` is a ``VllmConfig``."""
    import torch
    import vllm

    name = config.model_config.served_model_name
    if isinstance(name, (list, tuple)):
        name = name[0]
    return {
        "schema": 1,
        "group": os.environ.get("LLMPROBE_GROUP", settings.group or ""),
        "role": role,
        "framework": "vllm",
        "framework_version": vllm.__version__,
        "llmprobe_version": llmprobe.__version__,
        "pid": os.getpid(),
        "server": server,
        "model_name": str(name or config.model_config.model),
        "engine": engine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "started": time.time(),
        "flags": flags(config),
        "notes": [],
    }


def flags(config: Any) -> dict[str, Any]:
    """The engine settings that advice depends on, by the names of vLLM's own flags."""
    scheduler, cache, parallel = config.scheduler_config, config.cache_config, config.parallel_config
    compilation = config.compilation_config
    speculative = getattr(config, "speculative_config", None)
    sizes = getattr(compilation, "cudagraph_capture_sizes", None) or []
    values = {
        "enforce_eager": getattr(config.model_config, "enforce_eager", None),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": getattr(config.model_config, "quantization", None),
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "enable_chunked_prefill": getattr(scheduler, "enable_chunked_prefill", None),
        "async_scheduling": getattr(scheduler, "async_scheduling", None),
        "kv_cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "enable_prefix_caching": getattr(cache, "enable_prefix_caching", None),
        "gpu_memory_utilization": getattr(cache, "gpu_memory_utilization", None),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "enable_expert_parallel": getattr(parallel, "enable_expert_parallel", None),
        "disable_custom_all_reduce": getattr(parallel, "disable_custom_all_reduce", None),
        "cudagraph_mode": getattr(getattr(compilation, "cudagraph_mode", None), "name", None),
        "max_cudagraph_capture_size": max(sizes) if sizes else None,
        "speculative_method": getattr(speculative, "method", None),
        "num_speculative_tokens": getattr(speculative, "num_speculative_tokens", None),
    }
    return {name: value for name, value in values.items() if value is not None}


def model_facts(worker: Any, kv_cache_config: Any) -> dict[str, Any]:
    """Weights by operator and the KV cache of this rank; see `llmprobe.compute.facts.ModelFacts`."""
    config = worker.vllm_config
    text = config.model_config.hf_text_config
    has_head = _has_head(config)
    tied = has_head and bool(getattr(text, "tie_word_embeddings", False))
    weights = _weights(_models(worker), has_head, tied)
    unmodelled: list[str] = weights.pop("unmodelled")
    speculative = getattr(config, "speculative_config", None)
    if speculative is not None and getattr(speculative, "draft_model_config", None) is not None:
        unmodelled.append("drafts: the work of a draft model is not modelled, and lies within the sampling")
    experts = weights["operators"].get("experts")
    if experts is not None:
        experts["count"] = _first(text, "num_experts", "num_local_experts", "n_routed_experts") or 0
        experts["top_k"] = _first(text, "num_experts_per_tok", "moe_topk", "top_k_experts") or 0
        if not experts["count"] or not experts["top_k"]:
            unmodelled.append("experts: the configuration names no number of experts or experts per token")
    kv, problems = _kv_cache(worker, kv_cache_config)
    return {
        **weights,
        "compute_dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv": kv,
        "unmodelled": unmodelled + problems,
    }


def windows(kv: dict[str, Any]) -> tuple[int | None, ...]:
    """The visible window of each KV-cache group, in the order of a step record's columns."""
    return tuple(group["window"] for group in kv["groups"]) or (None,)


def _models(worker: Any) -> list[Any]:
    return [worker.model_runner.get_model()]


def _has_head(config: Any) -> bool:
    """Whether this rank computes logits: the last of a pipeline does, unless the model pools."""
    if getattr(config.model_config, "runner_type", "generate") == "pooling":
        return False
    if config.parallel_config.pipeline_parallel_size == 1:
        return True
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _weights(models: Iterable[Any], has_head: bool, tied_by_config: bool) -> dict[str, Any]:
    """Stored bytes and active matmul parameters by operator, tensors that share storage counted once."""
    operators = {name: {"bytes": 0, "params": 0} for name in ("linear", "head", "experts")}
    seen: set[int] = set()
    embedding = embedding_params = 0
    embeddings: set[int] = set()
    tied = False
    unmodelled: list[str] = []
    for model in models:
        modules = dict(model.named_modules())
        for name, module in modules.items():
            kind = _kind(name, module)
            stored = 0
            for tensor in _stored(module):
                key = tensor.untyped_storage().data_ptr()
                if key in seen:
                    tied = tied or (kind == "head" and key in embeddings)
                    continue
                seen.add(key)
                stored += tensor.numel() * tensor.element_size()
                if kind == "embedding":
                    embeddings.add(key)
            params = _matmul_params(kind, module)
            if stored == 0 and params and kind != "head":
                # vLLM's CPU kernels keep a repacked copy of the weight and empty the parameter.
                weight = getattr(module, "weight", None)
                stored = params * (weight.element_size() if weight is not None else 2)
            if kind == "embedding":
                embedding += stored
                embedding_params += _matmul_params("head", module)
            else:
                operators[kind]["bytes"] += stored
                operators[kind]["params"] += params
    head = operators["head"]
    if head["params"] == 0 and embedding and tied_by_config:
        tied = True  # one module serves as both
        head["params"] = embedding_params
    elif head["params"] == 0 and has_head:
        unmodelled.append("head: no output head was found on this rank")
    total = sum(operator["bytes"] for operator in operators.values()) + embedding
    if tied and head["params"]:
        # The head reads the embedding's storage: one copy in memory, read once a step.
        head["bytes"] += embedding
    if not operators["experts"]["bytes"]:
        del operators["experts"]
    return {
        "weights_bytes": total,
        "operators": operators,
        "embedding_bytes": embedding,
        "tied": tied,
        "unmodelled": unmodelled,
    }


def _stored(module: Any) -> Iterable[Any]:
    """The tensors of one module that come from the checkpoint: no rotary tables, no scalar scales."""
    computed = getattr(module, "_non_persistent_buffers_set", ())
    buffers = [buffer for name, buffer in module._buffers.items() if name not in computed]
    yield from (tensor for tensor in module._parameters.values() if tensor is not None and tensor.numel())
    yield from (buffer for buffer in buffers if buffer is not None and buffer.numel() > 1)


def _kind(name: str, module: Any) -> str:
    classes = {cls.__name__ for cls in type(module).__mro__}
    if "ParallelLMHead" in classes or name.rpartition(".")[2] == "lm_head":
        return "head"
    if "VocabParallelEmbedding" in classes or "Embedding" in classes:
        return "embedding"
    if "FusedMoE" in classes or "RoutedExperts" in classes or ".experts" in f".{name}":
        return "experts"
    return "linear"


def _matmul_params(kind: str, module: Any) -> int:
    """Logical parameters that take part in matrix products, whatever their stored form."""
    if kind == "embedding":
        return 0
    rows, columns = (getattr(module, f"{side}_size_per_partition", None) for side in ("output", "input"))
    if isinstance(rows, int) and isinstance(columns, int):
        return rows * columns
    if kind == "head":
        vocabulary = getattr(module, "num_embeddings_per_partition", 0) or 0
        return int(vocabulary) * int(getattr(module, "embedding_dim", 0) or 0)
    if kind == "experts":
        hidden, inner = (
            getattr(module, "hidden_size", 0),
            getattr(module, "intermediate_size_per_partition", 0),
        )
        local = getattr(module, "local_num_experts", 0)
        if hidden and inner and local:
            return 3 * int(hidden) * int(inner) * int(local)
    weight = module._parameters.get("weight")
    return int(weight.numel()) if weight is not None and weight.dim() >= 2 else 0


def _kv_cache(worker: Any, config: Any) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    layers: dict[str, Any] = worker.vllm_config.compilation_config.static_forward_context
    by_window: dict[tuple[str, int | None], dict[str, Any]] = {}
    block_bytes = 0
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
        for layer_name, layer_spec in specs.items():
            kind, window = _spec_kind(layer_spec)
            entry = by_window.setdefault(
                (kind, window),
                {
                    "kind": kind,
                    "window": window,
                    "layers": 0,
                    "bytes_per_token": 0.0,
                    "flops_per_pair": 0.0,
                    "bytes_per_request": 0.0,
                },
            )
            entry["layers"] += 1
            page = int(getattr(layer_spec, "real_page_size_bytes", 0) or layer_spec.page_size_bytes)
            if kind == "recurrent":
                entry["bytes_per_request"] += page
            else:
                entry["bytes_per_token"] += page / layer_spec.block_size
                entry["flops_per_pair"] += _flops_per_pair(layers.get(layer_name), layer_spec)
                if not entry["flops_per_pair"]:
                    problems.append(f"attention: the number of query heads of {layer_name} is not known")
    blocks = int(config.num_blocks)
    capacity = storage_bytes(tensors_in(getattr(worker.model_runner, "kv_caches", [])))
    if blocks:
        block_bytes = capacity // blocks
    if any(kind == "cross" for kind, _ in by_window):
        problems.append("attention: the encoder's length, which cross attention sees, is not recorded")
    if len(by_window) > KV_GROUPS:
        problems.append(f"attention: {len(by_window)} kinds of KV cache, more than {KV_GROUPS}")
    return (
        {
            "capacity_bytes": capacity,
            "block_bytes": block_bytes,
            "blocks": blocks,
            "dtype": str(worker.vllm_config.cache_config.cache_dtype),
            "groups": list(by_window.values())[:KV_GROUPS],
        },
        sorted(set(problems)),
    )


def _spec_kind(spec: Any) -> tuple[str, int | None]:
    classes = {cls.__name__ for cls in type(spec).__mro__}
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    if "MambaSpec" in classes:
        return "recurrent", None
    if "CrossAttentionSpec" in classes:
        return "cross", None
    if "MLAAttentionSpec" in classes:
        return "mla", window
    return ("sliding", int(window)) if window else ("full", None)


def _flops_per_pair(layer: Any, spec: Any) -> float:
    """FLOPs of one query against one key in one layer, all query heads of this rank: 2·h·(d_qk + d_v)."""
    heads = getattr(layer, "num_heads", 0) or 0
    latent, rope = getattr(layer, "kv_lora_rank", None), getattr(layer, "qk_rope_head_dim", None)
    if latent and rope is not None:
        # MLA with the projections absorbed: scores over latent and rope, values over the latent.
        return float(2 * heads * (2 * latent + rope))
    key = getattr(spec, "head_size", 0) or 0
    return float(2 * heads * (key + (getattr(spec, "head_size_v", None) or key)))


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
