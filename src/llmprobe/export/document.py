"""Prints docs/metrics.md from the catalogue: ``python -m llmprobe.export.document > docs/metrics.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from llmprobe.compute.thresholds import Thresholds
from llmprobe.export.catalogue import ENGINE, FAMILIES, RANK, SECTIONS, SOURCES, Family


def markdown() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Metrics"
    yield ""
    yield "<!-- Printed by `python -m llmprobe.export.document`; change the catalogue, not this page. -->"
    yield ""
    yield (
        "The agent serves these on `/metrics` (default `http://127.0.0.1:9480/metrics`); a vLLM server shows "
        "its own on its own `/metrics` too unless `LLMPROBE_VLLM_METRICS=0`. Scrape one of the two."
    )
    yield ""
    yield (
        "Units are SI base units and stand in the name. What is not known is absent, never 0; "
        "`llmprobe_figure_available` and `/api/status` say what is missing and why. Counters never run "
        "backwards while a server lives, also when the agent is restarted."
    )
    yield ""
    yield (
        "Common labels: `server` (`LLMPROBE_SERVER`, else `vllm-<port>` or the program's), `model_name`, "
        "`engine` (the data-parallel index, as vLLM's), `rank` (the worker process within the engine)."
    )
    yield ""
    yield "Where a value comes from:"
    yield ""
    yield from (f"- **{source}**: {meaning}" for source, meaning in SOURCES.items())
    for section in SECTIONS:
        yield ""
        yield f"## {section.title}"
        yield ""
        yield section.text
        yield ""
        yield "| name | type | labels | source | meaning |"
        yield "|---|---|---|---|---|"
        yield from map(_row, section.families)
        if section.values:
            yield ""
            yield "| label | value | meaning |"
            yield "|---|---|---|"
            yield from (f"| `{label}` | `{value}` | {text} |" for label, value, text in section.values)
    yield from _sizes()


def _row(family: Family) -> str:
    labels = " ".join(f"`{label}`" for label in family.labels)
    sources = ", ".join(family.sources)
    return f"| `{family.name}` | {family.kind} ({family.unit}) | {labels} | {sources} | {family.help} |"


def _sizes() -> Iterator[str]:
    yield ""
    yield "## Histogram buckets and number of series"
    yield ""
    yield (
        "Buckets are preferred numbers, about 1.25 apart where it matters, so a `histogram_quantile` lies "
        "within about a tenth of the truth. `/api/status` has quantiles from buckets 1 % apart."
    )
    yield ""
    yield "| family | buckets | first and last bound (seconds) | series |"
    yield "|---|---|---|---|"
    histograms = [family for family in FAMILIES.values() if family.kind == "histogram"]
    for family in histograms:
        first, last = family.buckets[0], family.buckets[-1]
        per = "rank and phase" if "phase" in family.labels else "engine"
        size = f"{len(family.buckets) + 1} | {first:g} … {last:g} | {_series(family)} per {per}"
        yield f"| `{family.name}` | {size} |"
    engine = sum(_series(family) for family in histograms if family.labels == ENGINE)
    rank = sum(3 * _series(family) for family in histograms if family.labels[:4] == RANK)
    yield ""
    yield (
        f"An engine's latencies come to {engine} series, a rank's step durations to {rank} (prefill, decode "
        "and mixed all seen); all that is not a histogram to 7 an engine, at most 150 a rank with those "
        "three phases, and about 50 a server."
    )


def thresholds() -> str:
    """The table of thresholds in docs/verdicts.md."""
    head = ["| name | default | allowed | decides | source |", "|---|---|---|---|---|"]
    rows = [
        f"| `{row.name}` | {row.default:g} | {row.lowest:g} … {row.highest:g} "
        f"| {row.meaning} | {row.source} |"
        for row in Thresholds.rows()
    ]
    return "\n".join(head + rows)


def _series(family: Family) -> int:
    return len(family.buckets) + 3  # +Inf, _sum and _count


if __name__ == "__main__":
    sys.stdout.write(markdown())
