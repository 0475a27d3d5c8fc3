"""Fixtures of all tests on a GPU."""

from .limits import limit, stderr

__all__ = ["limit", "stderr"]
