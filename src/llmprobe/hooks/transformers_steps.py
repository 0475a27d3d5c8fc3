"""One finished step of a decoding loop, and how it becomes a record.

What the step path leaves in a `Step` is turned into context, pairs and bytes here, some steps at a time.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from llmprobe.hooks.attention import visible_attention
from llmprobe.hooks.transformers_cache import CacheSize
from llmprobe.record.clock import StepClock
from llmprobe.record.layout import KV_GROUPS, Flag, Phase
from llmprobe.record.recorder import Recorder

Groups = tuple[tuple[str, int | None], ...]

_PREFILL, _DRAFT = int(Phase.PREFILL), int(Phase.DRAFT)
_NO_SAMPLE, _RESTARTED = int(Flag.NO_SAMPLE), int(Flag.RESTARTED)
_ZEROS = (0,) * KV_GROUPS


class Step(NamedTuple):
    """A step as the host saw it; counts are for each of its ``rows``."""

    number: int
    time_ns: int
    phase: int
    rows: int
    query: int
    before: int  #: tokens in the cache when it began
    candidates: int  #: of the queries, drafted tokens
    keep: int  #: positions that went through the output head
    new_tokens: int
    own_ns: int
    groups: Groups
    cross_length: int
    kv_size: CacheSize | None
    after: int  #: tokens in the cache when it was over
    kv_bytes: int  #: of all running calls, where there are several


def write_steps(recorder: Recorder, clock: StepClock, most: int = sys.maxsize) -> None:
    """Record the steps that are complete on the device, the first ``most`` of them."""
    for done in clock.harvest(most):
        step: Step = done.payload
        rows, prefill = step.rows, step.phase == _PREFILL
        # A draft model is not the one that the facts describe: its cache is left out.
        context, pairs = (_ZEROS, _ZEROS) if step.phase == _DRAFT else visible(step)
        tokens = rows * step.query
        kv_bytes = step.kv_bytes
        if not kv_bytes and step.kv_size is not None:
            kv_bytes = step.kv_size.at(step.after)
        recorder.step_counted(
            step.number,
            step.time_ns,
            step.phase,
            clock.kind,
            _NO_SAMPLE | _RESTARTED if done.restarted else _NO_SAMPLE,
            done.times,
            (
                rows,
                rows if prefill else 0,
                tokens if prefill else 0,
                0 if prefill else tokens,
                rows * step.candidates,
                rows * step.keep,
            ),
            (*context, *_ZEROS, *pairs, *_ZEROS) if prefill else (*_ZEROS, *context, *_ZEROS, *pairs),
            step.own_ns,
            rows * step.new_tokens,
            kv_bytes,
        )


def visible(step: Step) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Visible keys and (query, key) pairs of all rows, by KV group."""
    contexts, all_pairs = [], []
    for kind, window in step.groups:
        if kind == "recurrent":
            context = pairs = 0
        elif kind == "cross":
            context, pairs = step.cross_length, step.query * step.cross_length
        else:
            context, pairs = visible_attention(step.before, step.query, window)
        contexts.append(step.rows * context)
        all_pairs.append(step.rows * pairs)
    padding = _ZEROS[len(contexts) :]
    return (*contexts, *padding), (*all_pairs, *padding)
