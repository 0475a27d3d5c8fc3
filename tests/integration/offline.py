"""A program that uses ``vllm.LLM``, as a user would write it. Takes the model's directory, and a dtype."""

from __future__ import annotations

import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    dtype = sys.argv[2] if len(sys.argv) > 2 else "float32"
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=512, dtype=dtype)
    prompts = [{"prompt_token_ids": list(range(10, 10 + length))} for length in (8, 16, 24)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True), use_tqdm=False)
    print("tokens", [len(output.outputs[0].token_ids) for output in outputs])


if __name__ == "__main__":
    main()
