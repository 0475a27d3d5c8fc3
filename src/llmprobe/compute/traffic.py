"""The least bytes a step must move through device memory, and the FLOPs it must do, on one rank.

Bytes: weights once, as stored; of the experts those the batch is expected to reach, ``E·(1-(1-k/E)^tokens)``
under uniform routing; each request's visible keys and values; those of the new tokens. FLOPs: two for each
active parameter and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1) and those of attention over
the visible pairs. Steps of a draft model or an encoder get zeros: the facts describe another model.
"""

from __future__ import annotations

import numpy as np

from llmprobe.compute.facts import ATTENTION, EXPERTS, HEAD, LINEAR, OPERATORS, KvGroup, ModelFacts
from llmprobe.compute.steps import Floats, column, modelled, tokens


def traffic(steps: np.ndarray, model: ModelFacts) -> Floats:
    """Least bytes of each step, by operator.

    Args:
        steps: (N,) step records with the fields of `llmprobe.record.layout.STEP`.

    Returns:
        (N, 4) bytes in the order of `OPERATORS`.
    """
    result = _weights(steps, model)
    read, written = _kv(steps, model)
    result[:, ATTENTION] = read + written
    return result


def traffic_by_kind(steps: np.ndarray, model: ModelFacts, known: Floats | None = None) -> dict[str, Floats]:
    """The same bytes by what is moved: ``weights``, ``kv_read`` and ``kv_write``, (N,) each.

    ``known`` is what `traffic` gave for these steps, if it was asked already.
    """
    weights = _weights(steps, model) if known is None else known[:, [LINEAR, EXPERTS, HEAD]]
    read, written = _kv(steps, model)
    return {"weights": weights.sum(axis=1), "kv_read": read, "kv_write": written}


def work(steps: np.ndarray, model: ModelFacts) -> Floats:
    """FLOPs of each step, by operator: (N, 4) in the order of `OPERATORS`."""
    count = tokens(steps)
    result = np.zeros((len(steps), len(OPERATORS)))
    result[:, LINEAR] = 2 * model.linear.params * count
    if model.experts is not None:
        share = model.experts.top_k / model.experts.count
        result[:, EXPERTS] = 2 * model.experts.params * share * count
    result[:, HEAD] = 2 * model.head.params * column(steps, "sampled")
    prompt, generated = column(steps, "pairs_prefill"), column(steps, "pairs_decode")
    for index, group in enumerate(model.kv_groups):
        result[:, ATTENTION] += group.flops_per_pair_prefill * prompt[:, index]
        result[:, ATTENTION] += group.flops_per_pair * generated[:, index]
        expanded = _cached(steps, index, "prefill", "prompt")
        result[:, ATTENTION] += group.flops_per_cached_key_prefill * expanded
        result[:, ATTENTION] += group.flops_per_cached_key * _cached(steps, index, "decode", "decode")
    result[~modelled(steps)] = 0
    return result


def _weights(steps: np.ndarray, model: ModelFacts) -> Floats:
    count = tokens(steps)
    result = np.zeros((len(steps), len(OPERATORS)))
    result[:, LINEAR] = model.linear.bytes * (count > 0)
    result[:, HEAD] = model.head.bytes * (column(steps, "sampled") > 0)
    if model.experts is not None:
        missed = 1 - model.experts.top_k / model.experts.count
        result[:, EXPERTS] = model.experts.bytes * (1 - np.power(missed, count))
    result[~modelled(steps)] = 0
    return result


def _kv(steps: np.ndarray, model: ModelFacts) -> tuple[Floats, Floats]:
    """Bytes read from and written to the cache, (N,) each."""
    context = column(steps, "context_prefill") + column(steps, "context_decode")
    requests = column(steps, "requests")
    read = np.zeros(len(steps))
    written = np.zeros(len(steps))
    for index, group in enumerate(model.kv_groups):
        read += group.bytes_per_token * context[:, index] + group.bytes_per_request * requests
        written += group.bytes_written_per_token * _new_keys(steps, group, index)
        written += group.bytes_per_request * requests
    idle = ~modelled(steps) | (tokens(steps) == 0)
    read[idle] = 0
    written[idle] = 0
    return read, written


def _cached(steps: np.ndarray, index: int, phase: str, kind: str) -> Floats:
    """Visible keys that were there before the step."""
    return np.maximum(column(steps, f"context_{phase}")[:, index] - column(steps, f"{kind}_tokens"), 0)


def _new_keys(steps: np.ndarray, group: KvGroup, index: int) -> Floats:
    """Keys that a step adds to the cache. Those of cross attention come with the prompt, from the encoder."""
    if group.kind == "cross":
        return column(steps, "context_prefill")[:, index]
    return tokens(steps)
