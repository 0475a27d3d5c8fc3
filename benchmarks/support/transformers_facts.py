"""A program: generate with one tiny model and llmprobe, and print what its journal says.

Takes the model's directory and, as JSON, the ``device`` to put it on; each of two prompts is generated from
on its own. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vllm_facts import PROMPTS, TOKENS, recorded


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    device = json.loads(sys.argv[2])["device"]
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to(device)
    for length in PROMPTS:
        ids = torch.tensor([[10 + token % 7 for token in range(length)]], device=device)
        model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    found = recorded(Path(os.environ["LLMPROBE_DIR"]), "program")
    print("JSON " + json.dumps({"workers": found}))


if __name__ == "__main__":
    main()
