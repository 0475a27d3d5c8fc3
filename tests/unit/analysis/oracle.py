"""nsys's own reports on a file, by its report scripts and its own SQLite (Python's lacks their functions)."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def find_nsys() -> Path:
    """The nsys that LLMPROBE_TEST_NSYS names, the one on PATH, or the one that `make setup` fetched."""
    here = Path(sys.prefix, "nsys/usr/lib/x86_64-linux-gnu/nsight-systems/target-linux-x64/nsys")
    for found in (os.environ.get("LLMPROBE_TEST_NSYS"), shutil.which("nsys"), str(here)):
        if found and Path(found).exists():
            return Path(found)
    pytest.skip("no nsys: scripts/setup.py --nsys fetches one, LLMPROBE_TEST_NSYS names one")


def nsys_report(database: Path, report: str, folder: Path) -> list[dict[str, str]]:
    """The rows of one of nsys's reports; columns are named without their units."""
    home = find_nsys().resolve().parent
    script, library = home / "reports" / f"{report}.py", home / "libsqlite3.so.0"
    if not script.exists() or not library.exists():
        pytest.skip(f"this nsys has no {script.name} or no SQLite of its own")
    # Only its SQLite: other libraries beside it would replace what Python needs.
    libraries = folder / "libraries"
    libraries.mkdir(exist_ok=True)
    (libraries / library.name).symlink_to(library)
    # The scripts leave indices in the file that they read.
    copy = folder / "for-nsys.sqlite"
    shutil.copy(database, copy)
    done = subprocess.run(
        [sys.executable, str(script), str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": str(home / "python/lib"),
        },
    )
    assert done.returncode == 0, done.stderr or done.stdout
    rows = csv.DictReader(done.stdout.splitlines())
    return [{(key or "").split(":")[0]: value for key, value in row.items()} for row in rows]
