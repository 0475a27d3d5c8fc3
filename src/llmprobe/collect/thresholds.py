"""Reads the thresholds that ``LLMPROBE_THRESHOLDS`` names: a TOML file of ``name = number`` lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llmprobe.compute.thresholds import ThresholdError, Thresholds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = "LLMPROBE_THRESHOLDS"


def load_thresholds(path: Path | None) -> tuple[Thresholds, str | None]:
    """The thresholds in force, and what is wrong with the file, in one line.

    A file that is wrong anywhere counts for nothing: half an override would be a surprise.
    """
    if path is None:
        return Thresholds(), None
    try:
        return Thresholds.from_mapping(tomllib.loads(path.read_text(encoding="utf-8"))), None
    except OSError as error:
        problem = f"it cannot be read: {os.strerror(error.errno or 0)}"
    except ThresholdError as error:
        problem = str(error)
    except ValueError as error:  # not TOML, not UTF-8, or an integer of more digits than Python reads
        problem = f"it is not TOML: {error}"
    except RecursionError:
        problem = "it is nested too deeply"
    return Thresholds(), f"{VARIABLE}={str(path)!r}: {problem}. The defaults are in force."
