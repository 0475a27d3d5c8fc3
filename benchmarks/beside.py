"""Benchmarks from a list, beside each other: each with GPUs and cores of its own.

    python benchmarks/beside.py LIST --results DIR
    python benchmarks/beside.py gpu_round.txt --results /tmp/round --only overhead-128 --only tests

A line of the list is NAME, how many GPUs, how many seconds it may take at most, and a command of the shell:

    growth 1 240 python benchmarks/cupti_growth.py --markdown

The first line that the free GPUs are enough for begins next. What a command prints is kept in DIR/NAME;
$RESULTS in it is that folder. A command that takes too long is told to end, and then ended with all the
processes that it started, so that none of them keeps a GPU. Exit status 1 if one of them did not succeed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 20.0
_LATE, _ENDED = 124, 143  # as `timeout` and a shell say it
_DEVICES = Path("/dev").glob("nvidia[0-9]*")


@dataclass(frozen=True)
class Job:
    """One line of the list."""

    name: str
    gpus: int
    seconds: float
    command: str


@dataclass
class Running:
    """A job that has begun."""

    job: Job
    gpus: list[int]
    process: subprocess.Popen[bytes]
    begun: float
    told: float | None = None  # to end, and when
    started: list[psutil.Process] = field(default_factory=list)  # by it, as it was told


def main() -> int:
    """Run them all; returns the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))
    jobs = [job for job in read_jobs(options.list) if not options.only or job.name in options.only]
    free = list(range(max(len(list(_DEVICES)), 1)))
    if wants := next((job for job in jobs if job.gpus > len(free)), None):
        print(f"{wants.name} wants {wants.gpus} GPUs, and there are {len(free)}", file=sys.stderr)
        return 2
    running = list[Running]()
    try:
        return int(_run(jobs, running, free, options))
    finally:
        for one in running:
            _tell(one)
            _kill(one)


def _run(jobs: list[Job], running: list[Running], free: list[int], options: argparse.Namespace) -> bool:
    """Until all are over; returns whether one did not succeed."""
    cores, begun, failed = sorted(os.sched_getaffinity(0)), time.monotonic(), False
    each = max(len(cores) // len(free), 1)
    while jobs or running:
        for one in running[:]:
            if (status := _ended(one)) is not None:
                running.remove(one)
                free = sorted(free + one.gpus)
                failed |= status != 0
                took = time.monotonic() - one.begun
                print(f"{one.job.name}: exit status {status} after {took:.0f} s", file=sys.stderr, flush=True)
        job = next((job for job in jobs if job.gpus <= len(free)), None)
        if job is None:
            time.sleep(_LOOK_SECONDS)
            continue
        jobs.remove(job)
        left = options.most_seconds - (time.monotonic() - begun)
        if options.most_seconds and job.seconds > left:
            print(f"{job.name}: not begun, {left:.0f} s are left", file=sys.stderr, flush=True)
            failed = True
            continue
        mine, free = free[: job.gpus], free[job.gpus :]
        on = [core for gpu in mine for core in cores[gpu * each : (gpu + 1) * each]]
        running.append(_begin(job, mine, on or cores, options.results / job.name))
    return failed


def read_jobs(path: Path) -> list[Job]:
    """The lines of a list. Raises SystemExit, naming a line that is none."""
    jobs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split(maxsplit=3)
        if len(parts) < 4 or not parts[1].isdigit() or int(parts[1]) < 1 or not parts[2].isdigit():
            raise SystemExit(f"{path}:{number}: a line is NAME GPUS SECONDS COMMAND, not {line!r}")
        jobs.append(Job(parts[0], int(parts[1]), float(parts[2]), parts[3]))
    return jobs


def _begin(job: Job, gpus: list[int], cores: list[int], folder: Path) -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        "RESULTS": str(folder.absolute()),
    }
    with (folder / "out.txt").open("wb") as out, (folder / "err.txt").open("wb") as errors:
        process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), "bash", "-c", job.command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            env=environment,
        )
    print(f"{job.name}: begun on GPU {environment['CUDA_VISIBLE_DEVICES']}", file=sys.stderr, flush=True)
    return Running(job, gpus, process, time.monotonic())


def _ended(one: Running) -> int | None:
    """Its exit status once it has ended; tells it to end when its time is over."""
    status = one.process.poll()
    now = time.monotonic()
    if status is None and one.told is None and now - one.begun > one.job.seconds:
        _tell(one)
    if status is None and (one.told is None or now - one.told <= _GRACE_SECONDS):
        return None
    _kill(one)
    return _LATE if one.told else status


def _tell(one: Running) -> None:
    """Ask it to end, and note what it started: what outlives it would be nobody's child."""
    one.told = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(one.process.pid)
        one.started = root.children(recursive=True)
        for process in (root, *root.children()):  # a shell passes nothing on
            process.terminate()


def _kill(one: Running) -> None:
    for process in one.started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if one.process.poll() is None:
        one.process.kill()
        one.process.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("list", type=Path, help="the file")
    parser.add_argument(
        "--results", type=Path, required=True, metavar="DIR", help="what they print goes there"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this one; repeatable")
    parser.add_argument(
        "--most-seconds", type=float, default=0.0, help="begin none that would not be over by then"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
