"""What a journal looks like."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from llmprobe.record import layout

#: By version: what describes everything that a reader has to know.
DIGESTS = {3: "778e9822e4bd4cfe"}


def test_a_layout_that_changed_has_a_version_of_its_own() -> None:
    """An agent reads journals of engines that were started with another llmprobe, before an upgrade."""
    known: list[object] = []
    for name, value in sorted(vars(layout).items()):
        if isinstance(value, struct.Struct):
            known.append((name, value.format))
        elif isinstance(value, np.dtype):
            known.append((name, value.descr, value.itemsize))
        elif (
            name.isupper()
            and name not in ("VERSION", "DEFAULT_SIZE")
            and isinstance(value, (int, str, tuple))
        ):
            known.append((name, value))
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    assert digest == DIGESTS.get(layout.VERSION), f"bump VERSION, and note {digest} for it here"
