"""What is heavy about a capture, in a process of its own: scrub the exported file, analyse the copy.

Its memory and its crashes are not the agent's. ``python -m llmprobe.capture.work FOLDER`` ends with status 1
and one line on standard error if the file cannot be used, and at once when its standard input closes: it must
not outlive the agent that reads its result.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from pathlib import Path

from llmprobe.analysis import AnalysisError, read_trace
from llmprobe.analysis.report import make_report
from llmprobe.analysis.together import together
from llmprobe.capture.nsys import RAW_SQLITE
from llmprobe.capture.scrub import ScrubError, scrub
from llmprobe.capture.store import REPORT_JSON, REPORT_TEXT, SCRUBBED, write_json
from llmprobe.capture.worker_files import finish_workers


def finish(folder: Path) -> None:
    """Leave `REPORT_JSON`, `REPORT_TEXT` and scrubbed files in ``folder``, and not what they were made of.

    Raises:
        AnalysisError, ScrubError: the exported file cannot be used.
    """
    raw, made = folder / RAW_SQLITE, folder / f".{SCRUBBED}.{os.getpid()}"
    if raw.is_file():
        try:
            scrub(raw, made)
            made.chmod(0o600)
            made.replace(folder / SCRUBBED)
        finally:
            made.unlink(missing_ok=True)
        raw.unlink()
    # Who downloads the report need not learn where this machine keeps it.
    if traces := finish_workers(folder):
        trace, shown = together(traces), f"{len(traces)} processes"
        if len(traces) == 1:
            shown = Path(trace.source.path).name
    else:
        trace, shown = read_trace(folder / SCRUBBED), SCRUBBED
    trace = dataclasses.replace(trace, source=dataclasses.replace(trace.source, path=shown))
    report = make_report(trace)
    text = folder / f".{REPORT_TEXT}.{os.getpid()}"
    text.write_text(report.to_text() + "\n", encoding="utf-8")
    text.chmod(0o600)
    text.replace(folder / REPORT_TEXT)
    write_json(folder / REPORT_JSON, report.to_json())


def main() -> int:
    """Finish the folder on the command line."""
    os.umask(0o077)
    threading.Thread(target=_end_with_the_agent, daemon=True).start()
    try:
        finish(Path(sys.argv[1]))
    except (AnalysisError, ScrubError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _end_with_the_agent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock Python wants at its own end
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
