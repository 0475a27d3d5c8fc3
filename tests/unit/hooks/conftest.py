"""A worker's steps without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .stepping import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.probe.remove_patches()
    made.probe.disarm()
