"""Overrides are taken as they are meant, or refused in one line."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.compute.thresholds import ThresholdError, Thresholds


def test_every_row_is_documented_and_its_default_allowed() -> None:
    rows = Thresholds.rows()
    assert {row.name for row in rows} == {field.name for field in dataclasses.fields(Thresholds)}
    for row in rows:
        assert row.meaning, row.name
        assert row.source, row.name
        assert row.lowest <= row.default <= row.highest, row.name


def test_an_override_changes_one_value() -> None:
    found = Thresholds.from_mapping({"sync_gap_ratio": 0.3})
    assert found == dataclasses.replace(Thresholds(), sync_gap_ratio=0.3)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("unlike_any", 0.3, "no such threshold; there are idle_steps,"),
        ("sync_gap_rato", 0.3, "no such threshold; perhaps sync_gap_ratio"),
        ("thresholds", {"sync_gap_ratio": 0.3}, "no such threshold; they stand in no table, one `name ="),
        ("sync_gap_ratio", 3, "a number from 0.01 to 0.99"),
        ("sync_gap_ratio", "0.3", "a number from 0.01 to 0.99"),
        ("sync_gap_ratio", True, "a number from 0.01 to 0.99"),
        ("sync_gap_ratio", float("nan"), "a number from 0.01 to 0.99"),
        ("idle_steps", {}, "a number from 1 to 100000"),
        ("idle_steps", float("inf"), "a number from 1 to 100000"),
    ],
)
def test_a_wrong_override_names_key_value_and_what_is_allowed(key: str, value: object, says: str) -> None:
    with pytest.raises(ThresholdError) as error:
        Thresholds.from_mapping({key: value})
    assert str(error.value).startswith(f"{key}={value!r} is not allowed: {says}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("idle_steps", 10**400, "idle_steps=1000"),  # no float holds it
        ("idle_steps", 16**5000, "idle_steps=(int) is"),  # nor does Python write it
        ("idle_steps", [0] * 1000, "idle_steps=[0, 0"),
        ("a\nb", 1, "'a\\nb'=1 is"),
    ],
    ids=["too large for a float", "too large to be written", "long", "two lines"],
)
def test_whatever_is_refused_is_refused_in_one_line(key: str, value: object, says: str) -> None:
    with pytest.raises(ThresholdError) as error:
        Thresholds.from_mapping({key: value})
    said = str(error.value)
    assert said.startswith(says)
    assert said.isprintable()
    assert len(said.partition(" is not allowed")[0]) < 80


@settings(deadline=None)
@given(st.sampled_from(Thresholds.rows()), st.floats(allow_nan=False))
def test_what_is_taken_lies_in_its_range(row, value: float) -> None:  # type: ignore[no-untyped-def]
    try:
        found = getattr(Thresholds.from_mapping({row.name: value}), row.name)
    except ThresholdError:
        assert not row.lowest <= value <= row.highest
    else:
        assert row.lowest <= found <= row.highest


@pytest.mark.parametrize("name", ["memory_bound", "compute_bound", "balanced", "inefficient_kernels"])
def test_a_standing_class_makes_waiting_a_little_harder_to_reach(name: str) -> None:
    limits = Thresholds()
    assert limits.favouring(name).sync_gap_ratio > limits.sync_gap_ratio
    assert limits.favouring("sync_bound").sync_gap_ratio < limits.sync_gap_ratio
    assert limits.favouring(None) == limits.favouring("idle") == limits.favouring("unknown") == limits
