"""Live and captured sync gaps beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprobe.analysis import analyze
from llmprobe.capture.compare import compare

DATA = Path(__file__).parents[2] / "data"


def report(ratio: float | None, verdict: str = "trusted") -> dict[str, Any]:
    row = {"name": "decode", "part": None, "seconds": 0.9, "gap_seconds": 0.1, "sync_gap_ratio": 0.99}
    part = {**row, "part": "sample", "comparable_sync_gap_ratio": 0.9}
    return {"trust": {"verdict": verdict}, "phases": [{**row, "comparable_sync_gap_ratio": ratio}, part]}


def live(*ratios: float | None) -> dict[str, Any]:
    ranks = [{"figures": {"decode": {"sync_gap_ratio": ratio, "seconds": 10.0}}} for ratio in ratios]
    return {"server": {"ranks": ranks}}


def test_what_agrees_within_the_tolerance_is_shown_and_no_more() -> None:
    found = compare(report(0.10), live(0.08, 0.10))
    decode = found["phases"]["decode"]
    assert decode.pop("live_is_lower_bound") is True  # it does not say that it is none
    assert decode == pytest.approx({"live": 0.09, "capture": 0.10, "difference": -0.01})
    assert not found["disagree"]
    assert "trusted" not in found


def test_the_capture_is_trusted_where_they_disagree() -> None:
    found = compare(report(0.30), live(0.10))
    assert (found["disagree"], found["trusted"]) == (True, "capture")
    assert "0.100 live, 0.300 captured" in found["why"]


def test_a_capture_of_whole_graphs_does_not_claim_to_have_seen_kernels() -> None:
    whole = report(0.30)
    whole["trust"] = {"verdict": "limited", "reasons": [{"check": "graphs_unseen"}]}
    assert "it saw when kernels and whole CUDA graphs ran; " in compare(whole, live(0.10))["why"]
    assert "it saw the kernels; " in compare(report(0.30), live(0.10))["why"]


def own(ratio: float | None, bound: bool = True) -> dict[str, Any]:
    figures = {"sync_gap_ratio": ratio, "seconds": 1.0, "sync_gap_is_lower_bound": bound}
    return {"ranks": [{"name": "rank0", "figures": {"decode": figures}}]}


def test_the_live_figure_is_that_of_the_same_seconds_where_it_is_known() -> None:
    found = compare(report(0.10), live(0.40), own(0.11))
    assert (found["disagree"], found["same_seconds"]) == (False, True)
    assert found["phases"]["decode"]["live"] == 0.11
    for unknown in (None, {}, {"ranks": []}, own(None)):
        found = compare(report(0.10), live(0.40), unknown)
        assert (found["disagree"], found["same_seconds"]) == (True, False)
        assert found["why"].endswith("has no bubbles inside steps and is of 30 s")


def test_seconds_that_are_known_only_roughly_are_not_called_the_same() -> None:
    found = compare(report(0.30), live(0.40), {**own(0.11), "rough": True})
    assert (found["same_seconds"], found["phases"]["decode"]["live"]) == (False, 0.11)
    assert found["why"].endswith("is of about the same seconds")


@pytest.mark.parametrize(
    ("bound", "words"), [(True, "has no bubbles inside steps"), (False, "from kernel windows")]
)
def test_why_says_what_the_live_figure_lacks(bound: bool, words: str) -> None:
    why = compare(report(0.30), live(0.30), own(0.10, bound))["why"]
    assert words in why
    assert why.endswith("is of the same seconds")
    phases = compare(report(0.30), live(0.30), own(0.10, bound))["phases"]
    assert phases["decode"]["live_is_lower_bound"] is bound


def test_a_capture_that_does_not_trust_itself_is_not_trusted() -> None:
    assert compare(report(0.30, "untrusted"), live(0.10))["trusted"] == "live"


@pytest.mark.parametrize(
    ("seen", "shown"),
    [
        ({}, {}),
        (report(None), live(0.1)),
        (report(0.1), live(None)),
        (report(0.1), {"server": None}),
        ({}, live(0.1)),
    ],
)
def test_what_one_side_does_not_know_is_not_compared(seen: dict[str, Any], shown: dict[str, Any]) -> None:
    assert compare(seen, shown)["phases"] == {}
    assert not compare(seen, shown)["disagree"]


def test_a_real_capture_without_a_gpu_is_not_compared() -> None:
    """Its phases took no device time that is known."""
    seen = analyze(DATA / "nsys" / "transformers_cpu.sqlite").to_json()
    assert seen["phases"]
    assert compare(seen, live(0.1))["phases"] == {}


@pytest.mark.parametrize(
    ("shown", "agree"),
    [(0.27, False), (0.31, True), (0.34, True), (0.40, True), (0.46, True), (0.51, False)],
)
def test_what_the_recording_itself_made_of_idle_time_is_no_disagreement(shown: float, agree: bool) -> None:
    meanwhile = own(shown)
    meanwhile["ranks"][0]["figures"]["decode"]["lengthened_ratio"] = 0.2
    found = compare(report(0.464), live(0.1), meanwhile)
    decode = found["phases"]["decode"]
    assert decode["undisturbed"] == pytest.approx((0.464 - 0.2) / 0.8)  # 0.33
    assert decode["lengthened_ratio"] == pytest.approx(0.2)
    assert found["disagree"] is not agree
    if not agree:
        assert (
            "0.464 captured (0.330 without the 20% of the steps' time that the recording added)"
            in (found["why"])
        )


def test_it_is_said_where_nothing_tells_what_the_recording_made_itself() -> None:
    meanwhile = own(0.1)
    words = "0.300 captured (how much of it the recording made is not known). Trust the capture"
    assert words in compare(report(0.3), live(0.1), meanwhile)["why"]
    assert "not known" not in compare(report(0.05), live(0.1), meanwhile)["why"]  # the less is captured
    meanwhile["ranks"][0]["figures"]["decode"]["lengthened_ratio"] = 0.0
    assert "not known" not in compare(report(0.3), live(0.1), meanwhile)["why"]


@pytest.mark.parametrize(("source", "value"), [("counter", 0.668), ("counter", 0.81), ("measured", 0.81)])
def test_what_the_verdict_told_by_a_counter_was_live_too(source: str, value: float) -> None:
    shown = live(0.069)
    evidence = [{"quantity": "mbu_busy", "value": 0.5, "source": "counter"}]
    evidence.append({"quantity": "sync_gap_ratio", "value": value, "source": source})
    shown["server"]["verdicts"] = {"decode": {"evidence": evidence}, "prefill": {"evidence": None}}
    found = compare(report(0.828), shown, own(0.069))
    assert found["phases"]["decode"]["live"] == 0.069
    assert found["phases"]["decode"].get("counted") == (value if source == "counter" else None)
    assert found["disagree"] is not ((source, value) == ("counter", 0.81))
    if found["disagree"]:
        assert ("0.069 live (at least 0.668 by the GPU's counter), 0.828" in found["why"]) == (value < 0.8)


def test_a_recording_that_added_more_than_was_idle_leaves_nothing() -> None:
    meanwhile = own(0.0)
    meanwhile["ranks"][0]["figures"]["decode"]["lengthened_ratio"] = 0.5
    assert compare(report(0.2), live(0.1), meanwhile)["phases"]["decode"]["undisturbed"] == 0.0
