"""What a step's bytes and FLOPs depend on: the weights and the cache of one rank, as its journal says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Order of the operator axis of `llmprobe.compute.traffic.traffic` and `work`.
OPERATORS = ("linear", "attention", "experts", "head")
LINEAR, ATTENTION, EXPERTS, HEAD = range(len(OPERATORS))

KV_KINDS = ("full", "sliding", "mla", "recurrent", "cross")
MAX_KV_GROUPS = 4  #: columns of a step record's ``context_*`` and ``pairs_*``


class FactsError(ValueError):
    """The facts about a model make no sense; the message is one line and names the field."""


@dataclass(frozen=True)
class Operator:
    """Weights of one operator class on this rank: bytes as stored, and parameters used in products."""

    bytes: float
    params: float


@dataclass(frozen=True)
class Experts:
    """All routed experts on this rank together. ``count`` experts exist globally, ``top_k`` serve a token."""

    bytes: float
    params: float
    count: int
    top_k: int


@dataclass(frozen=True)
class KvGroup:
    """Layers that see the same context, as one: every figure is for all ``layers`` of it on this rank.

    ``window`` is in tokens (None: the whole context), ``bytes_per_request`` a state of fixed size
    (recurrent layers), ``flops_per_pair`` the FLOPs of one visible (query, key) pair. Layers that read
    another layer's cache write none: ``bytes_written_per_token`` is less than ``bytes_per_token`` then.
    Latent attention (MLA) takes prompts in another way than it decodes: ``flops_per_pair_prefill``; and where
    it expands latents that were cached before the step, each costs ``flops_per_cached_key`` (of a decoding
    request; ``_prefill``: of a prompt).
    """

    kind: str
    window: int | None
    layers: int
    bytes_per_token: float
    flops_per_pair: float
    bytes_per_request: float
    bytes_written_per_token: float
    flops_per_pair_prefill: float
    flops_per_cached_key: float
    flops_per_cached_key_prefill: float


@dataclass(frozen=True)
class ModelFacts:
    """One rank's model. ``kv_groups`` are in the order of the columns of a step record's arrays.

    ``unmodelled`` names parts that traffic and work leave out.
    """

    weights_bytes: int
    compute_dtype: str
    linear: Operator
    head: Operator
    experts: Experts | None
    embedding_bytes: int
    tied: bool
    kv_groups: tuple[KvGroup, ...]
    kv_capacity_bytes: int | None
    unmodelled: tuple[str, ...]

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> ModelFacts:
        """Read what a journal holds under ``model``.

        Raises:
            FactsError: a field is missing, of the wrong type or out of range.
        """
        operators = _object(facts, "operators")
        kv = _object(facts, "kv")
        groups = kv.get("groups")
        if not isinstance(groups, list) or len(groups) > MAX_KV_GROUPS:
            raise FactsError(f"kv.groups={groups!r}: a list of at most {MAX_KV_GROUPS} groups is needed")
        unmodelled = facts.get("unmodelled", [])
        if not isinstance(unmodelled, list):
            raise FactsError(f"unmodelled={unmodelled!r}: a list is needed")
        dtype = facts.get("compute_dtype")
        if not isinstance(dtype, str) or not dtype:
            raise FactsError(f"compute_dtype={dtype!r}: a name such as 'bfloat16' is needed")
        tied = facts.get("tied")
        if not isinstance(tied, bool):
            raise FactsError(f"tied={tied!r}: true or false is needed")
        experts = None
        if operators.get("experts") is not None:
            experts = _experts(_object(operators, "experts", "operators."))
        return cls(
            weights_bytes=_integer(facts, "weights_bytes"),
            compute_dtype=dtype,
            linear=_operator(operators, "linear"),
            head=_operator(operators, "head"),
            experts=experts,
            embedding_bytes=_integer(facts, "embedding_bytes"),
            tied=tied,
            kv_groups=tuple(_group(group, f"kv.groups[{index}]") for index, group in enumerate(groups)),
            kv_capacity_bytes=None
            if kv.get("capacity_bytes") is None
            else _integer(kv, "capacity_bytes", "kv."),
            unmodelled=tuple(str(part) for part in unmodelled),
        )


def _operator(operators: Mapping[str, Any], name: str) -> Operator:
    fields = _object(operators, name, "operators.")
    where = f"operators.{name}."
    return Operator(_number(fields, "bytes", where), _number(fields, "params", where))


def _experts(fields: Mapping[str, Any]) -> Experts:
    where = "operators.experts."
    count = _integer(fields, "count", where, least=1)
    top_k = _integer(fields, "top_k", where, least=1)
    if top_k > count:
        raise FactsError(f"{where}top_k={top_k}: more than the {count} experts there are")
    return Experts(_number(fields, "bytes", where), _number(fields, "params", where), count, top_k)


def _group(group: Any, where: str) -> KvGroup:
    if not isinstance(group, Mapping):
        raise FactsError(f"{where}={group!r}: an object is needed")
    kind = group.get("kind")
    if kind not in KV_KINDS:
        raise FactsError(f"{where}.kind={kind!r}: one of {', '.join(KV_KINDS)} is needed")
    where += "."
    stored, pair = _number(group, "bytes_per_token", where), _number(group, "flops_per_pair", where)
    return KvGroup(
        kind=kind,
        window=None if group.get("window") is None else _integer(group, "window", where, least=1),
        layers=_integer(group, "layers", where),
        bytes_per_token=stored,
        flops_per_pair=pair,
        bytes_per_request=_number(group, "bytes_per_request", where),
        bytes_written_per_token=_number(group, "bytes_written_per_token", where, stored),
        flops_per_pair_prefill=_number(group, "flops_per_pair_prefill", where, pair),
        flops_per_cached_key=_number(group, "flops_per_cached_key", where, 0.0),
        flops_per_cached_key_prefill=_number(group, "flops_per_cached_key_prefill", where, 0.0),
    )


def _object(facts: Mapping[str, Any], name: str, where: str = "") -> Mapping[str, Any]:
    value = facts.get(name) if isinstance(facts, Mapping) else None
    if not isinstance(value, Mapping):
        raise FactsError(f"{where}{name}={value!r}: an object is needed")
    return value


def _number(facts: Mapping[str, Any], name: str, where: str = "", default: float | None = None) -> float:
    value = facts.get(name, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
    ):
        raise FactsError(f"{where}{name}={value!r}: a number not below 0 is needed")
    return float(value)


def _integer(facts: Mapping[str, Any], name: str, where: str = "", least: int = 0) -> int:
    value = facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FactsError(f"{where}{name}={value!r}: a whole number not below {least} is needed")
    return value
