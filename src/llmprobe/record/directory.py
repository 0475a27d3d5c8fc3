"""The directory that all processes of a server share: made by whichever comes first."""

from __future__ import annotations

import os
from pathlib import Path

from llmprobe.record.journal import JournalError


def prepare_directory(directory: Path) -> Path:
    """Make the shared directory (0700) and return its folder of journals.

    Raises:
        JournalError: it cannot be made, or belongs to somebody else.
    """
    journals = directory / "journals"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise JournalError(
                f"{directory} belongs to another user; set LLMPROBE_DIR to a directory of yours"
            )
        journals.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise JournalError(
            f"cannot make {directory}: {os.strerror(error.errno or 0)}; set LLMPROBE_DIR"
        ) from None
    return journals
