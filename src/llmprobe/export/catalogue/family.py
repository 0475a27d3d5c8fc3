"""What is said of a metric family, and the labels that families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["measured", "sampled", "counter", "modelled", "reported"]

SOURCES: dict[Source, str] = {
    "measured": "timed or counted where it happens",
    "sampled": "measured now and then, and applied until the next time",
    "counter": "read from a hardware counter",
    "modelled": "computed from a model of the work a step does",
    "reported": "stated by the engine, its configuration or the hardware's data",
}

SERVER = ("server", "model_name")
ENGINE = (*SERVER, "engine")
RANK = (*ENGINE, "rank")


@dataclass(frozen=True)
class Family:
    """One metric family. ``name`` is complete: prefix, unit and ``_total`` included."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    sources: tuple[Source, ...]
    help: str
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True)
class Section:
    """Families that belong together, under one heading of docs/metrics.md.

    ``values``: label, value, what it says, for labels whose values do not speak for themselves.
    """

    title: str
    text: str
    families: tuple[Family, ...]
    values: tuple[tuple[str, str, str], ...] = ()
