"""A program that generates with transformers, on one thread, until it is told to stop."""

from __future__ import annotations

import os
import signal
import threading

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Says who it is once it generates."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )
    prompt = torch.ones(1, 8, dtype=torch.long)
    print(f"generating as {os.getpid()} {os.environ.get('PLANTED_SECRET', '')}", flush=True)
    while not stop.wait(0.05):
        model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)


if __name__ == "__main__":
    main()
