"""Writes the journals of one pretended server: run it as ``journal_feeder.py DIRECTORY ROLE [GROUP]``.

It goes through the real recorder, and ends when its standard input closes. Lines on it: ``hang`` makes a
worker begin a step that lasts until ``go``, ``press`` makes a front end run as many requests as it may, with
others waiting, until ``ease``. The facts are those of a 4-layer model on one H100; steps pretend to have
taken the time they are spread over.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from llmprobe.record.layout import Clock, Phase
from llmprobe.record.recorder import Recorder

MODEL = {
    "weights_bytes": 2_000_000_000,
    "compute_dtype": "bfloat16",
    "operators": {
        "linear": {"bytes": 1_700_000_000, "params": 850_000_000},
        "head": {"bytes": 200_000_000, "params": 100_000_000},
    },
    "embedding_bytes": 100_000_000,
    "tied": False,
    "kv": {
        "groups": [
            {
                "kind": "full",
                "window": None,
                "layers": 16,
                "bytes_per_token": 32768,
                "flops_per_pair": 131072,
                "bytes_per_request": 0,
            }
        ],
        "capacity_bytes": 8_000_000_000,
    },
    "unmodelled": [],
}


def facts(role: str, group: str) -> dict[str, Any]:
    """As a vLLM process would state them."""
    return {
        "schema": 1,
        "group": group,
        "role": role,
        "server": f"fed-{group}",
        "model_name": "pretended/llama-1b",
        "engine": 0,
        "rank": 0,
        "framework": "vllm",
        "framework_version": "0.0.0",
        "runner": "feeder",
        "clock": "cuda",
        "started": time.time(),
        "flags": {"max_num_seqs": 16},
        "device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "index": 0},
        "model": MODEL,
        "notes": [],
    }


class Orders:
    """What standard input said last."""

    def __init__(self) -> None:
        self.going, self.pressed = threading.Event(), threading.Event()
        self.going.set()

    def take(self, line: str) -> None:
        """Follow one line."""
        {
            "hang": self.going.clear,
            "go": self.going.set,
            "press": self.pressed.set,
            "ease": self.pressed.clear,
        }[line.strip()]()


def feed_worker(recorder: Recorder, stop: threading.Event, orders: Orders | None = None) -> None:
    """Rounds of a prefill, a mixed step and eight decodes, with gaps between them."""
    orders = orders or Orders()
    kinds = [(Phase.PREFILL, 2, 1024, 0), (Phase.MIXED, 2, 512, 8)] + [(Phase.DECODE, 0, 0, 16)] * 8
    number = 0
    while not stop.is_set():
        for phase, prefilling, prompt, decode in kinds:
            begin = time.monotonic_ns()
            number = recorder.begin(int(phase), prompt + decode, begin)
            time.sleep(0.004)
            if not orders.going.is_set():
                recorder.publish()
                orders.going.wait()
            end = time.monotonic_ns()
            recorder.step(
                number,
                begin,
                int(phase),
                int(Clock.CUDA),
                0,
                (begin + 100_000, end - 300_000, end - 200_000, end),
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
            time.sleep(0.001)


def feed_frontend(recorder: Recorder, stop: threading.Event, orders: Orders) -> None:
    """Requests that come and go, with a pause now and then."""
    unfinished = 0
    while not stop.is_set():
        recorder.pending(time.monotonic_ns(), 8)
        unfinished = 8
        for _ in range(10):
            running = 16 if orders.pressed.is_set() else 6
            recorder.load(running=running, waiting=2, kv_usage=0.25, unfinished=unfinished)
            recorder.tokens(
                64, 16, first_token_ns=(120_000_000,), inter_token_ns={11_000_000: 15}, own_ns=5_000
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
        recorder.pending(time.monotonic_ns(), 0)
        recorder.load(running=0, waiting=0, kv_usage=0.0)
        time.sleep(0.1)


def main() -> None:
    """Feed until standard input closes."""
    directory, role, group = Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["a"])[0]
    recorder = Recorder.open(directory, role, facts(role, group))
    stop, orders = threading.Event(), Orders()

    def listen() -> None:
        for line in sys.stdin:
            orders.take(line)
        stop.set()
        orders.going.set()

    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)
    (feed_worker if role == "worker" else feed_frontend)(recorder, stop, orders)
    recorder.close(remove=True)


if __name__ == "__main__":
    main()
