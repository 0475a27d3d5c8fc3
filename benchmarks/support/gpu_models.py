"""Configurations of the size that people serve, without weights: engines fill them with random numbers.

How long a step takes does not depend on what the weights say.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmprobe.demo.model import make_model

_COMMON = {"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}

#: By name: dense models of 8 and of 2 billion parameters, one of another family with 12 billion, a mixture of
#: experts, one whose layers mostly see a window, one with latent attention and experts, and one of 8 billion
#: parameters whose rows start at odd addresses: no kernel can load them by the vector, and tensor cores of
#: today want them aligned to 16 bytes.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "small": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "sliding": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(34)],
        "query_pre_attn_scalar": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
CONFIGURATIONS["latent"] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 102400,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Sizes that no tile of a kernel divides, nor eight.
CONFIGURATIONS["odd"] = {**CONFIGURATIONS["dense"], "hidden_size": 4095, "intermediate_size": 12287}


def make_configuration(name: str, path: Path, **changes: Any) -> Path:
    """A model directory with that configuration and the demo's tokenizer; to be served with dummy weights.

    Args:
        changes: go over the configuration, such as ``num_hidden_layers``.
    """
    tiny = make_model(path.parent / "tokenizer")
    path.mkdir(parents=True, exist_ok=True)
    for file in tiny.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, path)
    configuration = {**CONFIGURATIONS[name], **_COMMON, **changes}
    (path / "config.json").write_text(json.dumps(configuration, indent=1))
    _give_every_token_text(path / "tokenizer.json", configuration["vocab_size"])
    return path


def _give_every_token_text(file: Path, vocab: int) -> None:
    """Let a tokenizer know all the tokens that the model may choose.

    One that has no text keeps a server's incremental detokenizer from getting on: it decodes the whole
    prompt again at each token, and its front end, not the engine, is what is measured.
    """
    known = json.loads(file.read_text())
    tokens = known["model"]["vocab"]
    used = {*tokens.values(), *(token["id"] for token in known["added_tokens"])}
    tokens.update({f"_{number}": number for number in range(vocab) if number not in used})
    file.write_text(json.dumps(known))


def served(model: str, folder: Path) -> tuple[Path, list[str]]:
    """A model's directory and the flags of ``vllm serve`` that go with it.

    Args:
        model: a name of `CONFIGURATIONS`, made in ``folder``; or a directory.
    """
    if model in CONFIGURATIONS:
        return make_configuration(model, folder / model), ["--load-format", "dummy"]
    return Path(model), []
