"""Every finding, in the order in which they are offered within a class."""

from __future__ import annotations

from llmprobe.compute.advice import others, roofs, stalls, sync

ENTRIES = sync.ENTRIES + roofs.ENTRIES + others.ENTRIES + stalls.ENTRIES
