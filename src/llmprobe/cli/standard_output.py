"""Printing what may hold anything, on whatever standard output is."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def any_output() -> Iterator[None]:
    """Around a whole command: what the encoding lacks becomes ``?``, and a full disk is one line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except OSError as error:
        # Of a file that a verb makes it says itself what is wrong. EPIPE, of a pager left, typer takes.
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        # What is still buffered would fail once more at Python's end.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        typer.echo(f"llmprobe: standard output: cannot be written: {error.strerror}", err=True)
        sys.exit(1)
