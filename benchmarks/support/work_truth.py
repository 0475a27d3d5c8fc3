"""What is true of a model's work, found without llmprobe: files, configurations, counted products, masks.

* weights: the tensors of a safetensors file, by their names in transformers;
* matrix products: torch's ``FlopCounterMode`` around the module itself;
* attention: the True entries of the very masks that the module's attention is given.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_COUNTED = "counted"


@dataclass
class Products:
    """FLOPs of one forward by operator class, and the (query, key) pairs that its masks let through."""

    linear: int = 0
    experts: int = 0
    head: int = 0
    attention: int = 0
    pairs: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def file_bytes(path: Path) -> dict[str, int]:
    """Bytes of safetensors files: ``all``, and of these ``embedding``, ``head``, ``experts``, ``linear``."""
    found = dict.fromkeys(("all", "linear", "experts", "head", "embedding"), 0)
    for name, entry in _tensors(path):
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        found["all"] += size
        found[_operator_of(name)] += size
    return found


def stored_bytes(path: Path, bits: int, group: int | None) -> int:
    """Bytes of the linear layers if stored as integers: weights, a scale a row or group, what stays as it is.

    Args:
        group: columns that share a bfloat16 scale; None: one float32 scale a row.
    """
    total = 0
    for name, entry in _tensors(path):
        if _operator_of(name) != "linear":
            continue
        rows, *columns = entry["shape"]
        if columns:
            scales = 4 * rows if group is None else 2 * rows * columns[0] // group
            total += rows * columns[0] * bits // 8 + scales
        else:
            total += 2 * rows
    return total


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        header.pop("__metadata__", None)
        yield from header.items()


def kv_bytes_per_token(config: Any, element: int, latent: bool) -> int:
    """Keys and values of one token in all layers, from the configuration.

    Args:
        element: bytes of a number in the cache.
        latent: whether the engine caches MLA's latent vector, not what is made of it.
    """
    layers = config.num_hidden_layers
    if getattr(config, "kv_lora_rank", None):
        if latent:
            return layers * (config.kv_lora_rank + config.qk_rope_head_dim) * element
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return layers * config.num_attention_heads * width * element
    return layers * 2 * config.num_key_value_heads * config.head_dim * element


def absorbed_flops_per_pair(config: Any) -> int:
    """FLOPs of a query against a cached latent, all heads of one layer.

    Scores over the latent and its rotary part, values over the latent (DeepSeek-V2, arXiv:2405.04434, 2.1.2).
    """
    return int(2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim))


def replicated(path: Path) -> tuple[int, int]:
    """Bytes, and parameters of matrices, that every tensor-parallel shard has whole: norms and routers."""
    size = matrices = 0
    for name, entry in _tensors(path):
        if "norm" in name or ".mlp.gate." in name:
            size += entry["data_offsets"][1] - entry["data_offsets"][0]
            matrices += math.prod(entry["shape"]) if len(entry["shape"]) > 1 else 0
    return size, matrices


@contextmanager
def counted(model: Any) -> Iterator[list[Products]]:
    """Count every forward of a transformers model, also those inside ``generate``.

    Products of attention itself are not taken from the counter, because they cover what the mask hides.
    """
    found: list[Products] = []
    forward = model.forward
    before = model.config._attn_implementation
    counter = FlopCounterMode(display=False)
    expanding = [weight for name, weight in model.named_parameters() if name.endswith("kv_b_proj.weight")]

    @functools.wraps(forward)  # generate looks at what it takes
    def count(*args: Any, **kwargs: Any) -> Any:
        found.append(Products())
        already = _by_operator(counter)
        result = forward(*args, **kwargs)
        now = {name: flops - already[name] for name, flops in _by_operator(counter).items()}
        # What expands latents cached earlier grows with the context: a part of attention.
        tokens = kwargs["input_ids"].numel()
        again = now.pop("expanded") - sum(2 * weight.numel() * tokens for weight in expanding)
        for name, flops in now.items():
            setattr(found[-1], name, flops)
        found[-1].linear -= again
        found[-1].attention += again
        return result

    AttentionInterface.register(_COUNTED, _attention_that_counts(found))
    AttentionMaskInterface.register(_COUNTED, eager_mask)
    model.set_attn_implementation(_COUNTED)
    model.config._experts_implementation = "eager"  # expert by expert, so that only real products count
    model.forward = count
    try:
        with counter:
            yield found
    finally:
        del model.forward
        model.set_attn_implementation(before)


def _by_operator(counter: FlopCounterMode) -> dict[str, int]:
    """FLOPs of every product but batched ones: those are of rotary tables."""
    found = dict.fromkeys(("linear", "experts", "head", "expanded"), 0)
    for module, operations in counter.get_flop_counts().items():
        flops = sum(count for operation, count in operations.items() if "bmm" not in str(operation))
        last = module.rpartition(".")[2]
        if module == "Global":
            found["linear"] += flops
        elif last in ("lm_head", "experts"):
            found["head" if last == "lm_head" else "experts"] += flops
            found["linear"] -= flops
        elif last == "kv_b_proj":
            found["expanded"] += flops
    return found


def _attention_that_counts(found: list[Products]) -> Any:
    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any
    ) -> tuple[Any, None]:
        rows, heads, queries, width = query.shape
        keys = key.shape[2]
        if mask is None:  # a single query, from which nothing is hidden
            visible = rows * queries * keys
        else:
            shown = mask[..., :keys]
            visible = int((shown if shown.dtype == torch.bool else shown == 0).expand(rows, 1, -1, -1).sum())
        found[-1].pairs += visible
        found[-1].attention += visible * 2 * heads * (width + value.shape[3])
        with _disable_current_modes():
            key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
            scores = query @ key.transpose(2, 3) * scaling
            if mask is not None:
                scores = scores + mask[..., :keys]
            result = scores.softmax(-1).to(value.dtype) @ value
        return result.transpose(1, 2).contiguous(), None

    return attend


def _operator_of(name: str) -> str:
    parts = name.split(".")
    if "lm_head" in parts:
        return "head"
    if "embed_tokens" in parts:
        return "embedding"
    return "experts" if "experts" in parts else "linear"
