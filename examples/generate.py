"""Answer prompts one after another with a local model, printing the text as it is generated.

LLMPROBE=1 python examples/generate.py MODEL     its metrics can be scraped while it runs
llmprobe run -- python examples/generate.py MODEL     a summary at its end
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

PROMPTS = (
    "Tell me about the history of the railway, please.",
    "Why is the sky blue?",
    "Explain what a compiler does, and why a large program is compiled one file at a time.",
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a model's directory or name")
parser.add_argument("--seconds", type=float, default=20.0, help="how long to go on")
parser.add_argument("--tokens", type=int, default=64, help="how many to generate for each prompt")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model).to(device)
streamer = TextStreamer(tokenizer, skip_prompt=True)

end = time.monotonic() + options.seconds
answers = 0
while time.monotonic() < end:
    inputs = tokenizer(PROMPTS[answers % len(PROMPTS)], return_tensors="pt").to(device)
    model.generate(
        **inputs,
        streamer=streamer,
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        do_sample=True,
    )
    answers += 1
print(f"{answers} answers of {options.tokens} tokens")
