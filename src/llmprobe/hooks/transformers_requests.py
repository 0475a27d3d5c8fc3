"""The requests of a program's ``generate`` calls: tokens, latencies, how many run."""

from __future__ import annotations

import time
from typing import Any

from llmprobe.hooks.transformers_generation import Generation
from llmprobe.hooks.transformers_program import Program
from llmprobe.record.recorder import Recorder

_now = time.monotonic_ns


def record_requests(program: Program, call: Generation, result: Any, failed: bool, ended: int) -> None:
    """Of a call that is over: its tokens and one record for each of its rows.

    Args:
        result: what the call returned; None if it failed.
        ended: CLOCK_MONOTONIC nanoseconds.
    """
    recorder, times = program.recorder, call.token_times
    no_gaps: dict[int, int] = {}
    if call.live:
        sums = longest = [len(times)] * call.requests
        late, generated = no_gaps, 0  # written as they came
    elif failed:
        sums = longest = [0] * call.requests  # the caller got none
        late, generated = no_gaps, 0
    else:
        sums, longest = call.returned_tokens(result)
        late, generated = call.late_gaps(longest), sum(sums)
        if call.eos and program.device.type != "cpu":
            program.note("rows of a batch that end early are counted with their padding")
    call.own_request_ns += _now() - ended
    recorder.tokens(0, generated, inter_token_ns=late, own_ns=call.own_request_ns)
    ttft = times[0] - call.started if times else -1
    for prompt, total, last in zip(call.prompts, sums, longest, strict=False):
        tpot = -1
        if times and 1 < last <= len(times):
            tpot = (times[last - 1] - times[0]) // (last - 1)
        recorder.request(
            ended,
            ended - call.started,
            ttft_ns=ttft,
            tpot_ns=tpot,
            prompt_tokens=prompt,
            generated_tokens=total,
            cached_tokens=min(call.cached, prompt),
            aborted=failed,
        )


def first_tokens(recorder: Recorder, call: Generation, new_tokens: int, now: int) -> None:
    """Of a request: its prompt has been read, and ``new_tokens`` a row are there."""
    recorder.tokens(
        sum(call.prompts),
        new_tokens * call.requests if call.live else 0,
        cached=sum(min(call.cached, prompt) for prompt in call.prompts),
        first_token_ns=(now - call.started,) * call.requests,
    )
    call.tokens_written = new_tokens


def tell_load(program: Program) -> None:
    """How many requests run now."""
    requests = sum(call.requests for call in list(program.running.values()))
    program.recorder.load(requests, 0, unfinished=requests)
