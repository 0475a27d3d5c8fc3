"""Every metric family: its name, type, unit, labels, help and where its values come from.

Exposition is made from this table; docs/metrics.md is printed from it; dashboards and rules are checked
against it.
"""

from __future__ import annotations

from llmprobe.export.catalogue import machine, service, steps
from llmprobe.export.catalogue.family import ENGINE, RANK, SOURCES, Family, Section

__all__ = ["ENGINE", "FAMILIES", "LATENCIES", "RANK", "SECTIONS", "SOURCES", "Family", "Section"]

SECTIONS: tuple[Section, ...] = (*steps.SECTIONS, *machine.SECTIONS, *service.SECTIONS)
FAMILIES: dict[str, Family] = {family.name: family for section in SECTIONS for family in section.families}

#: Latency histograms of an engine: name in `EngineView.latency` → family.
LATENCIES = {
    name: FAMILIES[f"llmprobe_{name}_seconds"]
    for name in (
        "time_to_first_token",
        "time_per_output_token",
        "inter_token_latency",
        "request_duration",
        "request_queue",
        "output_lag",
    )
}
