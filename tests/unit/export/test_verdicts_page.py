"""docs/verdicts.md says what the code does."""

from __future__ import annotations

from pathlib import Path

from llmprobe.compute.confidence import CALIBRATED_FACTOR, HOST_CLOCK_LIMIT, WEIGHTS
from llmprobe.compute.pressure import KINDS
from llmprobe.compute.steady import SHORT_SECONDS, WINDOW_SECONDS
from llmprobe.compute.verdict import BOTTLENECKS, CAUSES, UNKNOWN_CAUSES
from llmprobe.export.document import thresholds

PAGE = (Path(__file__).resolve().parents[3] / "docs/verdicts.md").read_text()


def test_its_thresholds_are_those_in_force() -> None:
    shown = PAGE.partition("<!-- thresholds:")[2].partition("-->\n")[2].partition("\n<!-- end")[0]
    assert shown == thresholds(), (
        'python -c "from llmprobe.export.document import thresholds; print(thresholds())"'
    )


def test_every_word_is_explained() -> None:
    for name in (*BOTTLENECKS, *CAUSES, *UNKNOWN_CAUSES, *KINDS):
        assert f"`{name}`" in PAGE, name


def test_its_numbers_are_those_of_the_code() -> None:
    weights = WEIGHTS["step clock"], WEIGHTS["model of the work"], WEIGHTS["kernel windows"]
    assert weights == (0.65, 0.60, 0.70)
    assert f"the step clock {weights[0]:.2f}" in PAGE
    assert f"model of the work {weights[1]:.2f} ({weights[1] * CALIBRATED_FACTOR:.2f} against" in PAGE
    assert f"kernel windows {weights[2]:.2f}, hardware counters {WEIGHTS['hardware counters']:.2f}" in PAGE
    assert f"host signals {WEIGHTS['host signals']:.2f}" in PAGE
    assert f"confidence ends at {HOST_CLOCK_LIMIT:g}" in PAGE
    assert f"the last {WINDOW_SECONDS:g} s and the last {SHORT_SECONDS:g} s" in PAGE
