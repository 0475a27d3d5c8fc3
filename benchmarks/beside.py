"""Benchmarks from a list, beside each other: each with GPUs and cores of its own.

    python benchmarks/beside.py LIST --results DIR
    python benchmarks/beside.py benchmarks/gpu_round.txt --results round --only overhead-128 --only events

A line of the list is NAME, how many GPUs, how many seconds it may take at most, and a command of the shell:

    growth 1 240 python benchmarks/cupti_growth.py --markdown

The first line that the free GPUs are enough for begins next; CUDA_VISIBLE_DEVICES says which there are, else
all. What a command prints is kept in DIR/NAME; $RESULTS in it is that folder. One that takes too long is told
to end, and has 20 seconds for it. Whatever of it is left then, or when it ends by itself, is ended too, so
that none keeps a GPU. Exit status 1 if one of them did not succeed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 20.0
#: Such as an agent, which ends once its engines have.
_LEFT_SECONDS = 5.0
_LATE, _ENDED = 124, 143  # as `timeout` and a shell say it
_ROOTS: set[int] = set()  # the processes of commands themselves


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
    gpus: list[str]
    cores: list[int]
    process: subprocess.Popen[bytes]
    begun: float
    told: float | None = None  # to end, and when


def main() -> int:
    """Run them all; returns the exit status."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(_ENDED))
    _adopt()
    jobs = read_jobs(options.list)
    if unknown := set(options.only) - {job.name for job in jobs}:
        raise SystemExit(f"{options.list} has no line named {', '.join(sorted(unknown))}")
    jobs = [job for job in jobs if not options.only or job.name in options.only]
    free = _gpus()
    if wants := next((job for job in jobs if job.gpus > len(free)), None):
        print(f"{wants.name} wants {wants.gpus} GPUs, and there are {len(free)}", file=sys.stderr)
        return 2
    running = list[Running]()
    try:
        return int(_run(jobs, running, free, options))
    finally:
        for one in running:
            _tell(one)
        until = time.monotonic() + _GRACE_SECONDS
        for one in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(max(until - time.monotonic(), 0))
            _clear(one)


def _gpus() -> list[str]:
    """As CUDA names them; one place where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()] or [""]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))] or [""]


def _run(jobs: list[Job], running: list[Running], free: list[str], options: argparse.Namespace) -> bool:
    """Until all are over; returns whether one did not succeed."""
    cores, begun, failed = sorted(os.sched_getaffinity(0)), time.monotonic(), False
    gpus, each = list(free), max(len(cores) // len(free), 1)
    while jobs or running:
        for one in running[:]:
            if (status := _ended(one)) is not None:
                running.remove(one)
                free = [gpu for gpu in gpus if gpu in free or gpu in one.gpus]
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
        places = [gpus.index(gpu) * each for gpu in mine]
        on = [core for place in places for core in cores[place : place + each]]
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
        if any(job.name == parts[0] for job in jobs):
            raise SystemExit(f"{path}:{number}: {parts[0]!r} is the name of a line before")
        jobs.append(Job(parts[0], int(parts[1]), float(parts[2]), parts[3]))
    return jobs


def _begin(job: Job, gpus: list[str], cores: list[int], folder: Path) -> Running:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
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
    _ROOTS.add(process.pid)
    return Running(job, gpus, cores, process, time.monotonic())


def _ended(one: Running) -> int | None:
    """Its exit status once it has ended, and nothing of it is left; tells it to end when its time is over."""
    status, now = one.process.poll(), time.monotonic()
    if status is None and one.told is None and now - one.begun > one.job.seconds:
        _tell(one)
    if status is None and (one.told is None or now - one.told <= _GRACE_SECONDS):
        return None
    _clear(one)
    return _LATE if one.told else status


def _tell(one: Running) -> None:
    """Ask it to end: the command, and what a shell runs for it."""
    one.told = time.monotonic()
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(one.process.pid)
        for process in (*root.children(), root):
            with contextlib.suppress(psutil.Error):
                process.terminate()


def _clear(one: Running) -> None:
    """End whatever of it is left; returns when nothing is."""
    left = _left(one)
    _, left = psutil.wait_procs(left, _LEFT_SECONDS)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with contextlib.suppress(psutil.Error):
                end(process)
        psutil.wait_procs(left, _LEFT_SECONDS)
        left = _left(one)
    while left:  # what began meanwhile
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, _LOOK_SECONDS)
        left = _left(one)
    one.process.poll()


def _left(one: Running) -> list[psutil.Process]:
    """Its processes, whoever's children they have become.

    An orphan of any job is a child of this program (`_adopt`), and keeps to the cores that its job was given.
    What it has in its environment would tell too, but programs that name themselves write over that.
    """
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.pid == one.process.pid or _orphan_of(one, child):
                    found += [child, *child.children(recursive=True)]
    return [process for process in found if process.is_running() and _lives(process)]


def _orphan_of(one: Running, child: psutil.Process) -> bool:
    return child.pid not in _ROOTS and _lives(child) and set(child.cpu_affinity()) <= set(one.cores)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _adopt() -> None:
    """Become the parent of whatever loses its own further below (``PR_SET_CHILD_SUBREAPER``)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


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
