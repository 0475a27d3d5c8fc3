"""A tiny model that says it is on some device, for tests of what that changes."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class Model(transformers.LlamaForCausalLM):
    """Its weights are on the CPU, whatever it says."""

    at: Any = None

    @property
    def device(self) -> Any:
        return self.at


def model(at: str) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = Model(config)
    made.at = torch.device(at)
    return made
