"""Names as numbers, each held once."""

from __future__ import annotations

import hashlib

from llmprobe.analysis.events import printable

#: What is shown of a name at the most; two longer ones are still told apart.
_MOST_CHARS = 4096
#: All names together; those beyond have one name. A server runs some hundred kernels.
_MOST_CHARS_OF_ALL = 1 << 26
BEYOND = "further names"


class NameTable:
    """Gives each distinct name the next index."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._index: dict[str, int] = {}
        self._chars = 0

    def add(self, name: str) -> int:
        """The index of ``name``, without control characters."""
        if len(name) > _MOST_CHARS:
            whole = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            name = f"{name[:_MOST_CHARS]}{whole}"
        known = self._index.get(name)
        if known is None:
            if self._chars > _MOST_CHARS_OF_ALL and name != BEYOND:
                return self.add(BEYOND)
            shown = printable(name)
            self._chars += len(name) + 100  # what Python takes for the smallest
            known = self._index[name] = len(self.names)
            self.names.append(name if shown == name else shown)
        return known
