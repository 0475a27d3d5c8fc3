"""The catalogue holds for exposition, docs and dashboards alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmprobe.compute.accounting import COMPONENTS, NO_PHASE
from llmprobe.compute.steps import PHASES
from llmprobe.export.catalogue import FAMILIES, SECTIONS
from llmprobe.export.document import markdown
from llmprobe.export.prometheus import ViewCollector, expose

from .views_for_tests import server

ROOT = Path(__file__).resolve().parents[3]
_SUFFIX = re.compile(r"_(bucket|count|sum)$")
#: Of the Prometheus client library, on the agent's own /metrics.
_PROCESS_METRICS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}


def expressions(value: Any) -> list[str]:
    """Every PromQL expression in a dashboard or rule file."""
    if isinstance(value, dict):
        own = [item for key, item in value.items() if key in ("expr", "definition") and isinstance(item, str)]
        return own + [text for item in value.values() for text in expressions(item)]
    if isinstance(value, list):
        return [text for item in value for text in expressions(item)]
    return []


def metrics_in(expression: str) -> set[str]:
    found = set(re.findall(r"\b(?:llmprobe|process)_\w+", expression))
    return {
        _SUFFIX.sub("", name) if FAMILIES.get(_SUFFIX.sub("", name), None) is not None else name
        for name in found
    }


def test_names_carry_prefix_unit_and_total() -> None:
    for family in FAMILIES.values():
        assert re.fullmatch(r"llmprobe_[a-z0-9_]+", family.name)
        assert "vllm" not in family.name, "vLLM unregisters collectors of such names"
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert bool(family.buckets) == (family.kind == "histogram"), family.name
        if family.unit in ("seconds", "bytes", "ratio"):
            assert family.unit in family.name
        assert len(set(family.labels)) == len(family.labels)


def test_buckets_rise() -> None:
    for family in FAMILIES.values():
        assert sorted(set(family.buckets)) == list(family.buckets)


def test_a_full_server_shows_every_family_and_no_other() -> None:
    collector = ViewCollector(lambda: [server()], version="1", captures=lambda: {("nsys", "done"): 1})
    shown = {
        family.name + ("_total" if family.type == "counter" else ""): family for family in collector.collect()
    }
    assert set(shown) == set(FAMILIES)
    for name, metric in shown.items():
        assert metric.type == FAMILIES[name].kind
        for sample in metric.samples:
            assert set(sample.labels) - {"le"} == set(FAMILIES[name].labels)


def test_series_stay_within_the_budget() -> None:
    samples = [
        sample
        for family in text_string_to_metric_families(expose([server()]).decode())
        for sample in family.samples
    ]
    plain = [sample for sample in samples if not _SUFFIX.search(sample.name)]
    assert sum("rank" in sample.labels for sample in plain) <= 150
    assert sum("rank" not in sample.labels for sample in plain) <= 60
    assert len(samples) <= 495


def test_metrics_page_is_what_the_generator_prints() -> None:
    page = ROOT / "docs/metrics.md"
    assert page.read_text() == markdown(), "python -m llmprobe.export.document > docs/metrics.md"


def test_every_phase_and_component_is_explained() -> None:
    told = {(label, value) for section in SECTIONS for label, value, _ in section.values}
    assert {value for label, value in told if label == "component"} == set(COMPONENTS)
    assert {value for label, value in told if label == "phase"} == {*PHASES, NO_PHASE}


def _pages() -> list[Path]:
    return sorted((ROOT / "integrations/grafana/dashboards").glob("*.json"))


@pytest.mark.parametrize("path", _pages(), ids=lambda path: path.name)
def test_dashboards_ask_only_for_metrics_that_exist(path: Path) -> None:
    asked = {name for text in expressions(json.loads(path.read_text())) for name in metrics_in(text)}
    assert len(asked) > 15
    assert asked <= set(FAMILIES) | _PROCESS_METRICS


@pytest.mark.parametrize("path", _pages(), ids=lambda path: path.name)
def test_dashboards_filter_by_labels_that_exist(path: Path) -> None:
    for text in expressions(json.loads(path.read_text())):
        for name, selector in re.findall(r"(llmprobe_\w+)\{([^}]*)\}", text):
            family = FAMILIES[name] if name in FAMILIES else FAMILIES[_SUFFIX.sub("", name)]
            assert set(re.findall(r"(\w+)\s*=?[=~!]", selector)) <= set(family.labels), text


def test_every_family_is_on_a_dashboard_or_left_out_on_purpose() -> None:
    asked = {
        name
        for path in _pages()
        for text in expressions(json.loads(path.read_text()))
        for name in metrics_in(text)
    }
    assert set(FAMILIES) - asked == set()
