"""The metrics of Nsight Compute that advice tells people to look at."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmprobe.compute.advice.entry import Entry
from llmprobe.compute.advice.table import ENTRIES

#: As ``ncu --query-metrics`` lists them: a unit of the chip, two underscores, a quantity; perhaps a suffix.
_METRIC = re.compile(r"\b([a-z][a-z0-9]*__[a-z0-9_]+)(\.[a-z0-9_.]+)?")


def ncu_metrics(entries: Iterable[Entry] = ENTRIES) -> list[str]:
    """The names in their texts and commands, without suffixes such as ``.sum``; sorted, each once."""
    texts = (text for entry in entries for text in (entry.reason, entry.risk, entry.look))
    return sorted({found.group(1) for text in texts for found in _METRIC.finditer(text)})
