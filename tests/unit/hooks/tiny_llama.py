"""A Llama of one layer, made on the spot; also one that says it is on some device."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class _Elsewhere(transformers.LlamaForCausalLM):
    """Its weights are on the CPU, whatever it says."""

    at: Any = None

    @property
    def device(self) -> Any:
        return self.at


def tiny_llama() -> Any:
    return transformers.LlamaForCausalLM(_config()).eval()


def tiny_llama_on(device: str) -> Any:
    made = _Elsewhere(_config())
    made.at = torch.device(device)
    return made


def _config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
