"""One process of a pretended server: ``pretended_rank.py DIRECTORY frontend`` or ``... worker RANK RATE``.

Records through the real recorder, and publishes as the hooks' housekeeping does. The facts are those of a
dense model on an H100; steps pretend to have taken the time between them. Ends when killed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from llmprobe.record.layout import Clock, Phase
from llmprobe.record.recorder import Recorder

_PUBLISH_NS = 250_000_000
_KV = {
    "kind": "full",
    "window": None,
    "layers": 16,
    "bytes_per_token": 32768,
    "flops_per_pair": 131072,
    "bytes_per_request": 0,
}
_MODEL = {
    "weights_bytes": 2_000_000_000,
    "compute_dtype": "bfloat16",
    "operators": {
        "linear": {"bytes": 1_700_000_000, "params": 850_000_000},
        "head": {"bytes": 200_000_000, "params": 100_000_000},
    },
    "embedding_bytes": 100_000_000,
    "tied": False,
    "kv": {"groups": [_KV], "capacity_bytes": 8_000_000_000},
    "unmodelled": [],
}
#: Phase, prefilling requests, prompt tokens, decode tokens.
_ROUND = [(Phase.PREFILL, 2, 1024, 0), (Phase.MIXED, 2, 512, 8), *[(Phase.DECODE, 0, 0, 16)] * 18]


def _facts(role: str, rank: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "group": "pretended",
        "role": role,
        "server": "pretended",
        "model_name": "pretended/llama-1b",
        "engine": 0,
        "rank": rank,
        "framework": "vllm",
        "framework_version": "0.0.0",
        "runner": "pretended",
        "clock": "cuda",
        "started": time.time(),
        "pid": os.getpid(),
        "flags": {"max_num_seqs": 16, "max_num_batched_tokens": 2048},
        "device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "index": rank},
        "model": _MODEL,
        "notes": [],
    }


def _work(recorder: Recorder, rate: float) -> None:
    period = round(1e9 / rate)
    due = published = time.monotonic_ns()
    while True:
        for phase, prefilling, prompt, decode in _ROUND:
            due += period
            number = recorder.begin(int(phase), prompt + decode, due - period)
            time.sleep(max(due - time.monotonic_ns(), 0) / 1e9)
            begin, end = due - period + period // 10, due
            recorder.step(
                number,
                due - period,
                int(phase),
                int(Clock.CUDA),
                0,
                (begin, end - period // 10, end - period // 20, end),
                requests=prefilling + decode,
                prefill_requests=prefilling,
                prompt_tokens=prompt,
                decode_tokens=decode,
                sampled=prefilling + decode,
                own_ns=9_000,
                context_prefill=(prompt, 0, 0, 0),
                context_decode=(decode * 700, 0, 0, 0),
                pairs_prefill=(prompt * prompt // 2, 0, 0, 0),
                pairs_decode=(decode * 700, 0, 0, 0),
            )
            if due - published >= _PUBLISH_NS:
                published = due
                recorder.publish()


def _serve(recorder: Recorder) -> None:
    recorder.pending(time.monotonic_ns(), 8)
    while True:
        recorder.load(running=6, waiting=2, kv_usage=0.25, unfinished=8)
        recorder.tokens(
            64, 16, first_token_ns=(120_000_000,), inter_token_ns={5_000_000: 12, 8_000_000: 3}, own_ns=5_000
        )
        recorder.request(
            time.monotonic_ns(),
            400_000_000,
            ttft_ns=120_000_000,
            tpot_ns=11_000_000,
            queue_ns=20_000_000,
            prompt_tokens=64,
            generated_tokens=16,
        )
        time.sleep(0.1)


def main() -> None:
    """Record until killed."""
    directory, role = Path(sys.argv[1]), sys.argv[2]
    rank, rate = (int(sys.argv[3]), float(sys.argv[4])) if role == "worker" else (0, 0.0)
    recorder = Recorder.open(directory, role, _facts(role, rank))
    print("ready", flush=True)
    if role == "worker":
        _work(recorder, rate)
    else:
        _serve(recorder)


if __name__ == "__main__":
    main()
