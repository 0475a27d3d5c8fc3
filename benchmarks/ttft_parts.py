"""Where the time to the first token goes, between a client's call and the token in its hands.

    python benchmarks/ttft_parts.py
    python benchmarks/ttft_parts.py --requests 101

The same loads as ``client_agreement.py``, with marks in vLLM's server and in ``vllm bench serve``. Shows what
of a client's TTFT lies outside the server, which llmprobe cannot see. Decides nothing: exit status 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from client_agreement import loads
from support.machine import machine_line
from support.serving import NAME, running_server, tiny_model
from support.table import Results, command

from llmprobe.demo.client import BenchClient, Load

_MARKS = Path(__file__).resolve().parent / "support" / "marks"
#: (part, from, to)
_PARTS = (
    ("client: makes the request", "begun", "written"),
    ("connection, uvicorn: until the application is called", "written", "called"),
    ("vLLM: until the token is with its stream", "called", "token"),
    ("vLLM: until its piece is handed to the connection", "token", "sent"),
    ("connection, client: until it has parsed the piece", "sent", "parsed"),
    ("the client's TTFT", "begun", "parsed"),
    ("what llmprobe takes for TTFT", "called", "sent"),
)
_PLACES = {place for _, begin, end in _PARTS for place in (begin, end)}


def main() -> int:
    """Run the loads; returns the exit status."""
    options = _options()
    machine = machine_line()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "marks"
        python_path = os.pathsep.join(filter(None, (str(_MARKS), os.environ.get("PYTHONPATH"))))
        os.environ.update(TTFT_MARKS=str(file), PYTHONPATH=python_path)
        runs: list[tuple[Load, dict[str, dict[str, int]]]] = []
        with running_server(None, options.flags) as server:
            for load in loads(options.requests):
                print(f"vllm bench serve, {load.name}: {load.requests} requests", file=sys.stderr, flush=True)
                file.write_bytes(b"")  # the server has it open, and appends
                runs.append((load, {}))
                client = BenchClient.start(server, tiny_model(), NAME, load, Path(folder))
                try:
                    client.result()
                finally:
                    client.stop()
                runs[-1] = load, _requests(file)
    _table(runs, machine).show(options.markdown)
    return 0


def _requests(file: Path) -> dict[str, dict[str, int]]:
    """Per request of the client: place → nanoseconds; only those that were seen everywhere."""
    marks = [json.loads(line) for line in file.read_text().splitlines()]
    found: dict[str, dict[str, int]] = {name: {} for place, name, _ in marks if place == "begun"}
    for place, name, when in marks:
        # The engine's id is the client's between "cmpl-" and a suffix.
        key = name if name in found else name.removeprefix("cmpl-").rsplit("-", 2)[0]
        if key in found:
            found[key].setdefault(place, when)
    return {name: at for name, at in found.items() if set(at) >= _PLACES}


def _table(runs: list[tuple[Load, dict[str, dict[str, int]]]], machine: str) -> Results:
    header = ["part (median, 90th percentile)"]
    rows = [[part] for part, _, _ in _PARTS]
    for load, requests in runs:
        header.append(f"{load.name}, {len(requests)} of {load.requests} requests")
        for row, (_, begin, end) in zip(rows, _PARTS, strict=True):
            times = np.array([at[end] - at[begin] for at in requests.values()]) / 1e6
            row.append(f"{np.median(times):.2f} ms, {np.quantile(times, 0.9):.2f} ms" if len(times) else "")
    return Results("Where the time to the first token goes", command("ttft_parts.py"), machine, header, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=61, help="of each load [61]")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/accuracy.md")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of vllm serve")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
