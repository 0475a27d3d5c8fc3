"""The cache of a ``generate`` call is found by the names of older and newer releases of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmprobe.hooks.transformers_cache import cache_among, cache_of


class NewerOutput:
    """As releases that renamed the cache make it: the older name works, and warns."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def past_key_values(self) -> Any:
        raise AssertionError("the older name is asked for, which warns")


@pytest.mark.parametrize(
    "inputs", [{"cache": "it"}, {"past_key_values": "it"}, {"cache": None, "past_key_values": "it"}]
)
def test_the_cache_that_a_forward_is_given_has_either_name(inputs: dict[str, Any]) -> None:
    assert cache_among(inputs) == "it"


def test_a_forward_without_a_cache_is_given_none() -> None:
    assert cache_among({"input_ids": "x"}) is None


def test_the_cache_that_a_forward_gives_back_has_either_name() -> None:
    assert cache_of(SimpleNamespace(past_key_values="it")) == "it"
    assert cache_of(NewerOutput("it")) == "it"


def test_outputs_without_a_cache_give_none_and_no_warning() -> None:
    assert cache_of(NewerOutput(None)) is None
    assert cache_of(SimpleNamespace(logits="x")) is None
