"""Names as numbers, each held once."""

from __future__ import annotations

from llmprobe.analysis.events import printable


class NameTable:
    """Gives each distinct name the next index."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, name: str) -> int:
        """The index of ``name``, without control characters."""
        known = self._index.get(name)
        if known is None:
            shown = printable(name)
            known = self._index[name] = len(self.names)
            self.names.append(shown)
        return known
