"""The list of scenarios is sound before a GPU's time is spent on it."""

from __future__ import annotations

import pytest
from support import gpu_timing
from support.gpu_models import CONFIGURATIONS
from support.gpu_scenario_list import SCENARIOS, with_references
from support.gpu_scenario_servers import KINDS

BY_NAME = {item.name: item for item in SCENARIOS}


def flag(kind: str, name: str) -> int | None:
    flags = KINDS[kind].flags
    return int(flags[flags.index(name) + 1]) if name in flags else None


def test_names_are_unique_and_servers_known() -> None:
    assert len(BY_NAME) == len(SCENARIOS)
    assert {item.kind for item in SCENARIOS} == set(KINDS)
    assert {kind.model for kind in KINDS.values()} <= {*CONFIGURATIONS, "tiny"}


def test_what_a_scenario_is_compared_with_ran_before_on_the_same_load() -> None:
    for index, item in enumerate(SCENARIOS):
        if item.reference is not None:
            reference = BY_NAME[item.reference]
            assert SCENARIOS.index(reference) < index
            if item.name != "KV cache too small":  # which adds the load of the others
                assert reference.load == item.load or item.load is None or item.before is not None
        assert not item.slow_steps or item.reference is not None, item.name


@pytest.mark.parametrize("item", [item for item in SCENARIOS if item.load], ids=lambda item: item.name)
def test_every_request_fits_its_server(item: object) -> None:
    assert item.load is not None
    longest = item.load.prompt_tokens + item.load.output_tokens
    assert longest <= (flag(item.kind, "--max-model-len") or 0)
    blocks, size = flag(item.kind, "--num-gpu-blocks-override"), flag(item.kind, "--block-size")
    if blocks is not None:
        assert longest < (blocks - 1) * (size or 0)
        assert (flag(item.kind, "--max-model-len") or 0) < (blocks - 1) * (size or 0)


def test_references_come_along_unless_they_are_known() -> None:
    chosen = [BY_NAME["host between steps, 3 ms"], BY_NAME["eager, windows off"]]
    names = [item.name for item in with_references(chosen, set())]
    assert names == ["decode, batch 1, no async", "host between steps, 3 ms", "eager, windows off"]
    assert with_references(chosen, {"decode, batch 1, no async"}) == chosen


def test_nothing_is_begun_that_would_not_be_over_in_time() -> None:
    deadline = gpu_timing.Deadline(9)
    change = BY_NAME["change: the host recovers"]
    assert gpu_timing.needed(change, 75) == 75 + gpu_timing.BEFORE_SECONDS + 3
    assert gpu_timing.needed(BY_NAME["decode, 16 x 9000 tokens"], 24) == 48
    assert deadline.reaches(9 * 60 - 5)
    assert not deadline.reaches(9 * 60 + 5)
    assert gpu_timing.Deadline(None).reaches(1e9)


def test_every_scenario_is_listed_with_its_time() -> None:
    listed = gpu_timing.listing(75)
    assert all(f"s  {item.name}" in listed for item in SCENARIOS)
    assert all(f"--server {kind}: " in listed for kind in KINDS)
