from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from llmprobe.compute.facts import Experts, FactsError, KvGroup, ModelFacts, Operator

from .builders import facts, group

COMPLETE = facts(
    group(kind="sliding", window=8, bytes_per_token=16, flops_per_pair=32),
    experts={"bytes": 800, "params": 400, "count": 8, "top_k": 2},
)


def test_facts_survive_the_way_through_json() -> None:
    model = ModelFacts.from_json(json.loads(json.dumps(COMPLETE)))
    assert model.linear == Operator(200, 100)
    assert model.head == Operator(40, 20)
    assert model.experts == Experts(800, 400, 8, 2)
    assert model.kv_groups == (KvGroup("sliding", 8, 2, 16, 32, 0, 16, 32, 0, 0),)
    assert model.kv_capacity_bytes == 4096


def test_a_dense_model_without_known_cache_size_is_fine() -> None:
    given = facts()
    given["kv"]["capacity_bytes"] = None
    model = ModelFacts.from_json(given)
    assert model.experts is None
    assert model.kv_capacity_bytes is None


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("weights_bytes",), -1, "weights_bytes"),
        (("weights_bytes",), "1000", "weights_bytes"),
        (("compute_dtype",), "", "compute_dtype"),
        (("operators",), None, "operators"),
        (("operators", "linear"), [], "operators.linear"),
        (("operators", "linear", "params"), float("nan"), "operators.linear.params"),
        (("operators", "head", "bytes"), float("inf"), "operators.head.bytes"),
        (("operators", "experts", "top_k"), 9, "operators.experts.top_k"),
        (("operators", "experts", "count"), 0, "operators.experts.count"),
        (("tied",), 1, "tied"),
        (("kv", "groups"), [group()] * 5, "kv.groups"),
        (("kv", "groups"), [group(), 3], "kv.groups[1]"),
        (("kv", "groups"), [group(kind="mamba")], "kv.groups[0].kind"),
        (("kv", "groups"), [group(window=0)], "kv.groups[0].window"),
        (("kv", "groups"), [group(layers=True)], "kv.groups[0].layers"),
        (("kv", "capacity_bytes"), 1.5, "kv.capacity_bytes"),
        (("unmodelled",), "vision", "unmodelled"),
    ],
)
def test_nonsense_is_refused_in_one_line_that_names_the_field(
    path: tuple[str, ...], value: Any, named: str
) -> None:
    given: Any = copy.deepcopy(COMPLETE)
    target = given
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(FactsError) as caught:
        ModelFacts.from_json(given)
    assert str(caught.value).startswith(f"{named}=")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["weights_bytes", "compute_dtype", "operators", "kv", "tied"])
def test_a_missing_field_is_refused(missing: str) -> None:
    given = copy.deepcopy(COMPLETE)
    del given[missing]
    with pytest.raises(FactsError, match=f"^{missing}=None"):
        ModelFacts.from_json(given)
