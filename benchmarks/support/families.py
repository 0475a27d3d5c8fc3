"""Tiny models of every architecture whose work is modelled, made on the spot with random weights.

A few layers of a few hundred columns: small enough to be multiplied out on a CPU in seconds, and built by the
same classes as the models that people serve.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprobe.demo.model import make_model

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,  # vLLM's kernel on CPUs is made for these two
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "head_dim": 64,  # what its rotary embedding turns
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",
    **_EXPERTS,
}
_WINDOWED = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}


def integers(bits: int, activations: bool, group_size: int = 32) -> dict[str, Any]:
    """compressed-tensors: integer weights.

    Args:
        bits: of a weight.
        activations: inputs are integers too, and weights have one scale a row; else one for ``group_size``.
        group_size: weights.
    """
    row = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": row if activations else {**row, "strategy": "group", "group_size": group_size},
        "input_activations": token if activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if activations else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Family:
    """A tiny model: its type in transformers, what differs from the common sizes, how vLLM runs it.

    What is true of it is worked out elsewhere (`support.work_truth`).
    """

    name: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    #: How its weights are stored, as its configuration tells engines; None: as they are.
    quantization: Mapping[str, Any] | None = None
    #: Arguments of ``vllm.LLM``.
    engine: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Its configuration object."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **{**_SIZES, **self.changes})

    def model(self, **changes: Any) -> Any:
        """A module with random weights, ready to generate."""
        import torch
        from transformers import AutoModelForCausalLM

        config = self.config()
        for name, value in changes.items():
            setattr(config, name, value)
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def make(self, path: Path) -> Path:
        """A model directory with weights and the demo's tokenizer."""
        tokenizer = make_model(path.parent / "tokenizer")
        self.model().save_pretrained(path)
        if self.quantization:
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(
                json.dumps({**config, "quantization_config": self.quantization})
            )
        for file in tokenizer.iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                shutil.copy(file, path)
        return path


FAMILIES = (
    Family("dense", "llama"),
    Family("tied", "qwen2", {"tie_word_embeddings": True}),
    Family("multi-query, tied", "gemma", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Family("window", "mistral", {"sliding_window": 16}),
    Family("mixed windows", "gemma3_text", {"tie_word_embeddings": True, **_WINDOWED}),
    Family("experts", "mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Family("experts, normed heads", "qwen3_moe", {"num_experts": 8, **_EXPERTS}),
    Family(
        "experts and a shared one",
        "qwen2_moe",
        {"num_experts": 8, "shared_expert_intermediate_size": 96, **_EXPERTS},
    ),
    Family("latent attention", "deepseek_v3", {**_LATENT, "n_group": 2, "topk_group": 1}),
    Family("integer weights and inputs", "llama", {}, integers(8, True), {"load_format": "dummy"}),
    Family("4-bit weights", "llama", {}, integers(4, False), {"load_format": "dummy"}),
    Family("8-bit cache", "llama", engine={"kv_cache_dtype": "fp8"}),
    Family(
        "drafts by n-grams",
        "llama",
        engine={
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
        },
    ),
    Family("two shards", "llama", engine={"tensor_parallel_size": 2}),
    Family(
        "two shards of experts",
        "qwen3_moe",
        {"num_experts": 8, **_EXPERTS},
        engine={"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ),
)
