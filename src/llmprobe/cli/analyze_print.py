"""Printing what untrusted files hold, on whatever standard output is."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprobe.cli.console import fail


@contextmanager
def printing() -> Iterator[None]:
    """Around printing a result: what the encoding lacks becomes ``?``, and a full disk is one line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # a pager that was left; typer ends quietly
            raise
        # What is still buffered would fail once more at Python's end.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        fail(f"standard output: cannot be written: {error.strerror}")
