"""What a vLLM process says about itself once: versions, flags, the model's weights and its KV cache."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import llmprobe
from llmprobe.hooks.naming import is_serve
from llmprobe.hooks.vllm import engine_core
from llmprobe.hooks.vllm.kv_cache import kv_cache
from llmprobe.hooks.vllm.weights import weights
from llmprobe.settings import Settings

#: Speculative methods that draft on the host or by counting, without weights.
_WITHOUT_DRAFT_MODEL = (None, "ngram", "ngram_gpu", "suffix")


def process_facts(settings: Settings, server: str, role: str, config: Any, engine: int) -> dict[str, Any]:
    """Facts that every vLLM process knows. ``config`` is a ``VllmConfig``."""
    import torch
    import vllm

    return {
        "schema": 1,
        "group": os.environ.get("LLMPROBE_GROUP", settings.group or ""),
        "role": role,
        "framework": "vllm",
        "framework_version": vllm.__version__,
        "llmprobe_version": llmprobe.__version__,
        "pid": os.getpid(),
        "server": server,
        "model_name": model_name(config),
        "engine": engine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "started": time.time(),
        "flags": flags(config),
        "notes": [],
        **({engine_core.FACT: engine_core.inside()} if role == "frontend" else {}),
    }


def model_name(config: Any) -> str:
    """What clients call the model of a ``VllmConfig``."""
    name = config.model_config.served_model_name
    if isinstance(name, (list, tuple)):
        name = name[0]
    return str(name or config.model_config.model)


def engine_of(config: Any) -> int:
    """The data-parallel index of a ``VllmConfig`` for one engine, also one with a program of its own."""
    index = getattr(config.parallel_config, "data_parallel_index", None)
    return int((config.parallel_config.data_parallel_rank if index is None else index) or 0)


def engine_is_here(config: Any, engine: int) -> bool:
    """Whether an engine's core is known to be on its front end's machine, and so to have the same clock.

    Args:
        config: the front end's ``VllmConfig``.
        engine: data-parallel index.
    """
    parallel = config.parallel_config
    if parallel.data_parallel_size <= 1:
        return True
    if getattr(parallel, "data_parallel_backend", "mp") != "mp":  # Ray puts engines where it likes
        return False
    local = getattr(parallel, "data_parallel_size_local", 0)
    return bool(0 <= engine - parallel.data_parallel_rank < local)


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
        "stream_interval": getattr(scheduler, "stream_interval", None),
        "kv_cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "enable_prefix_caching": getattr(cache, "enable_prefix_caching", None),
        "gpu_memory_utilization": getattr(cache, "gpu_memory_utilization", None),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "enable_expert_parallel": getattr(parallel, "enable_expert_parallel", None),
        # Only `vllm serve` has a number of them to set.
        "api_server_count": getattr(parallel, "_api_process_count", None) if is_serve() else None,
        "numa_bind": getattr(parallel, "numa_bind", None),
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
    said = weights(worker.model_runner.get_model(), has_head, tied, worker.device.type)
    dtype = said.pop("matmul_dtype") or str(config.model_config.dtype).removeprefix("torch.")
    kv, problems = kv_cache(worker, kv_cache_config)
    problems += said.pop("unmodelled")
    method = getattr(getattr(config, "speculative_config", None), "method", None)
    if method not in _WITHOUT_DRAFT_MODEL:
        problems.append(f"drafts: the work of the draft model ({method}) is not modelled")
    if getattr(config, "lora_config", None) is not None:
        problems.append("adapters: which LoRA adapters a batch uses is not recorded")
    experts = said["operators"].get("experts")
    if experts is not None:
        experts.setdefault("count", _first(text, "num_experts", "num_local_experts", "n_routed_experts") or 0)
        experts.setdefault("top_k", _first(text, "num_experts_per_tok", "moe_topk", "top_k_experts") or 0)
        if not 0 < experts["top_k"] <= experts["count"]:
            problems.append("experts: the configuration names no number of experts or experts per token")
        if config.parallel_config.data_parallel_size > 1:
            problems.append("experts: those of this rank also serve tokens of other data-parallel ranks")
    return {**said, "compute_dtype": dtype, "kv": kv, "unmodelled": problems}


def windows(kv: dict[str, Any]) -> tuple[int | None, ...]:
    """The visible window of each KV-cache group, in the order of a step record's columns."""
    return tuple(group["window"] for group in kv["groups"]) or (None,)


def _has_head(config: Any) -> bool:
    """Whether this rank computes logits: the last of a pipeline does, unless the model pools."""
    if getattr(config.model_config, "runner_type", "generate") == "pooling":
        return False
    if config.parallel_config.pipeline_parallel_size == 1:
        return True
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
