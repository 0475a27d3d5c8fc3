"""A program: serve one tiny model offline with vLLM and llmprobe, and print what the worker's journal says.

Takes the model's directory and the arguments of ``vllm.LLM`` as JSON; prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = (40, 24)  #: tokens of the two prompts
TOKENS = 6  #: that each of them generates
_WRITTEN_SECONDS = 1.0  # a thread writes steps of a CPU device four times a second
COLUMNS = (
    "phase",
    "requests",
    "prefill_requests",
    "prompt_tokens",
    "decode_tokens",
    "draft_tokens",
    "sampled",
    "context_prefill",
    "context_decode",
    "pairs_prefill",
    "pairs_decode",
)


def main() -> None:
    from vllm import LLM, SamplingParams

    engine: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "dtype": "bfloat16",
        "disable_log_stats": True,
    }
    try:
        llm = LLM(sys.argv[1], **{**engine, **json.loads(sys.argv[2])})
    except NotImplementedError as error:  # by this processor
        print("JSON " + json.dumps({"workers": [], "engine_flops": {}, "failure": str(error)}), flush=True)
        os._exit(0)
    prompts = [{"prompt_token_ids": [10 + token % 7 for token in range(length)]} for length in PROMPTS]
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    failure = ""
    try:
        llm.generate(prompts, sampling, use_tqdm=False)
    except (
        AttributeError,
        RuntimeError,
    ) as error:  # kernels that this processor lacks; it has loaded, though
        failure = f"{type(error).__name__}: {error}"
    time.sleep(_WRITTEN_SECONDS)
    said = {
        "workers": recorded(Path(os.environ["LLMPROBE_DIR"])),
        "engine_flops": own_estimate(llm.llm_engine.vllm_config),
        "failure": failure,
    }
    print("JSON " + json.dumps(said), flush=True)
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # whatever a failed engine leaves running


def own_estimate(config: Any) -> dict[str, int]:
    """FLOPs of the first decode step by ``vllm.v1.metrics.perf``, by its names."""
    from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics

    batch = ExecutionContext()
    for length in PROMPTS:
        batch.add(1, length + 1, is_prefill=False)
    try:
        found = ModelMetrics(config).get_num_flops_breakdown(batch)
    except Exception as error:  # noqa: BLE001 - it is only shown beside the rest
        print(f"perf.py gives nothing: {error!r}", file=sys.stderr)
        return {}
    return {str(name): int(flops) for name, flops in found.items()}


def recorded(directory: Path, role: str = "worker") -> list[dict[str, Any]]:
    """The facts and steps of every journal of a role."""
    from llmprobe.record.journal_reader import JournalReader

    found = []
    for path in sorted((directory / "journals").glob(f"{role}-*.journal")):
        reader = JournalReader(path)
        steps = reader.read().steps
        rows = [{name: row[name].tolist() for name in COLUMNS} for row in steps]
        found.append({"facts": reader.facts(), "steps": rows})
    return found


if __name__ == "__main__":
    main()
