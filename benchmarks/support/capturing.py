"""Captures of a live server under load, one after the other, and what the client saw meanwhile."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from llmprobe.agent.client import LocalAgent
from llmprobe.demo.server import VllmServer
from support import flood
from support.gpm import memory_used
from support.journals import live_journals
from support.load import Load

#: How much the gap ratio of the report and the live one may differ.
TOLERANCE = 0.03
_POLL_SECONDS = 0.2
_DONE_SECONDS = 150.0
_TAIL_SECONDS = 1.5  # the requests that run at its end
_MEBI = 1 << 20
_FINAL = ("done", "failed", "cancelled")


class CaptureFailed(Exception):
    """A capture was refused, failed, or did not end; the message says why."""


@dataclass(frozen=True)
class Stretch:
    """Requests that ran, in part at least, in a stretch of time."""

    requests: int
    tpot_seconds: float | None  # median; None without requests
    longest_gap_seconds: float  # between two tokens of one request, ending in the stretch; 0 if none did


@dataclass(frozen=True)
class Memory:
    """Of the engine's processes and of all GPUs together."""

    resident_bytes: int
    gpu_bytes: int | None


@dataclass(frozen=True)
class Gap:
    """Sync-gap ratios of one phase in the seconds of a capture."""

    phase: str
    report: float
    live: float
    bound: bool  # the live one is a lower bound: there were no kernel windows
    undisturbed: float  # the report's without what the recording itself added; the report's if not known

    @property
    def apart(self) -> float:
        """Live less captured."""
        return self.live - self.report

    @property
    def held(self) -> bool:
        """Whether they agree, as llmprobe says; of a lower bound, whether it is not above."""
        return self.apart <= TOLERANCE and (self.bound or self.live >= self.undisturbed - TOLERANCE)


@dataclass
class Look:
    """One deep look into the server: a capture, or vLLM's own profiler."""

    tool: str
    before: Stretch
    recording: Stretch  # from the first moment of it until the engine is rid of what it recorded
    after: Stretch  # from then until the analysis is over
    seconds_asked: float
    engine_seconds: float  # until the engine was rid of it
    done_seconds: float  # until report and files were there
    file_bytes: int
    kernels: int | None = None
    trust: str = ""
    trust_reasons: list[str] = field(default_factory=list)
    idle_report: float | None = None  # of the GPUs' whole time
    notes: list[str] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)  # as in live.json

    @property
    def gaps(self) -> list[Gap]:
        """By phase, where both are known."""
        found = self.comparison.get("phases") or {}
        return [
            Gap(
                name,
                phase["capture"],
                phase["live"],
                phase["live_is_lower_bound"],
                phase.get("undisturbed", phase["capture"]),
            )
            for name, phase in found.items()
        ]


@dataclass
class Row:
    """Captures one after the other."""

    tool: str
    count: int
    seconds_each: float  # median, until done
    before: Stretch
    after: Stretch
    memory_before: Memory
    memory_first: Memory  # after the first one
    memory_after: Memory
    failed: list[str] = field(default_factory=list)


@dataclass
class Flood:
    """Calls to the agent while the server is under its load."""

    calls_per_second: float  # that were answered
    statuses: dict[str, int]
    before: Stretch
    during: Stretch


class Captures:
    """One server under one load, and its agent."""

    def __init__(self, server: VllmServer, load: Load, output_tokens: int, before_seconds: float) -> None:
        self._server = server
        self._agent = LocalAgent(server.directory)
        self._load = load
        self._gaps = output_tokens - 1
        self._before_seconds = before_seconds

    def tools(self) -> dict[str, str | None]:
        """What can capture the server: tool → None, or why it cannot."""
        answer = self._ask("GET", "/api/captures")
        return dict(next(iter(answer["tools"].values())))

    def quiet(self) -> tuple[int, int]:
        """A stretch of plain load."""
        begin = time.monotonic_ns()
        self._load.wait(self._before_seconds)
        return begin, time.monotonic_ns()

    def take(self, tool: str, seconds: float, **options: Any) -> Look:
        """Capture, and wait until it is done. Raises CaptureFailed."""
        quiet = self.quiet()
        begin, capture = self._capture(tool, seconds, options)
        times = {name: self._monotonic(at) for name, at in capture["times"].items()}
        self._load.wait(_TAIL_SECONDS)
        report = self._ask("GET", capture["report"])
        live = self._ask("GET", f"{capture['url']}/files/live.json")
        look = Look(
            tool,
            self.stretch(*quiet),
            self.stretch(times["recording"], times["analysing"]),
            self.stretch(times["analysing"], times["done"]),
            seconds,
            (times["analysing"] - begin) / 1e9,
            (times["done"] - begin) / 1e9,
            sum(file["bytes"] for file in capture["files"]),
            sum(gpu["kernels"] for gpu in report["gpus"]) if report["gpus"] else None,
            report["trust"]["verdict"],
            [reason["text"] for reason in report["trust"]["reasons"]],
            _mean([(gpu["idle_ratio"], gpu["seconds"]) for gpu in report["gpus"]]),
            list(capture.get("notes") or ()),
            live.get("comparison") or {},
        )
        self._ask("DELETE", capture["url"])
        return look

    def take_vllm(self, seconds: float, folder: Path) -> Look:
        """The same with the server's ``/start_profile`` and ``/stop_profile``. Raises CaptureFailed."""
        quiet = self.quiet()
        begin = time.monotonic_ns()
        self._post("/start_profile")
        self._load.wait(seconds)
        self._post("/stop_profile")
        end = time.monotonic_ns()
        self._load.wait(_TAIL_SECONDS)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        took = (end - begin) / 1e9
        nothing = Stretch(0, None, 0.0)
        return Look(
            "vLLM's own", self.stretch(*quiet), self.stretch(begin, end), nothing, seconds, took, took, size
        )

    def in_a_row(self, tool: str, count: int, seconds: float, **options: Any) -> Row:
        """So many captures one after the other. Raises CaptureFailed if the first does not succeed."""
        quiet = self.quiet()
        memory = [self.memory()]
        took: list[float] = []
        failed: list[str] = []
        for number in range(count):
            begin = time.monotonic()
            try:
                _, capture = self._capture(tool, seconds, options)
                self._ask("DELETE", capture["url"])
            except CaptureFailed as error:
                if not took:
                    raise
                failed.append(f"{number + 1}: {error}")
                if len(failed) > 2:
                    break
                continue
            took.append(time.monotonic() - begin)
            memory.append(self.memory())
            print(f"{tool} {number + 1} of {count}", file=sys.stderr, flush=True)
        after = self.quiet()
        self._load.wait(_TAIL_SECONDS)
        return Row(
            tool,
            len(took),
            float(np.median(took)),
            self.stretch(*quiet),
            self.stretch(*after),
            memory[0],
            memory[1],
            memory[-1],
            failed,
        )

    def none_in_a_row(self, seconds: float) -> Row:
        """What becomes of the same server in so much time without captures."""
        quiet = self.quiet()
        before = self.memory()
        self._load.wait(seconds / 2)
        middle = self.memory()
        self._load.wait(seconds / 2)
        after = self.quiet()
        self._load.wait(_TAIL_SECONDS)
        return Row(
            "none",
            0,
            seconds,
            self.stretch(*quiet),
            self.stretch(*after),
            before,
            middle,
            self.memory(),
        )

    def flood(self, rate: float, seconds: float) -> Flood:
        """Ask the agent so many times a second. Raises CaptureFailed."""
        quiet = self.quiet()
        port = self._server.agent_url.rpartition(":")[2]
        command = [sys.executable, flood.__file__, "--port", port, "--rate", str(rate)]
        command += ["--seconds", str(seconds), "--token-file", str(self._server.directory / "token")]
        begin = time.monotonic_ns()
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DONE_SECONDS, check=False)
        end = time.monotonic_ns()
        self._load.wait(_TAIL_SECONDS)
        if done.returncode:
            raise CaptureFailed(f"{rate:g} calls a second: {done.stderr.strip()[-200:]}")
        found = json.loads(done.stdout)
        return Flood(
            found["calls"] / found["seconds"],
            found["statuses"],
            self.stretch(*quiet),
            self.stretch(begin, end),
        )

    def stretch(self, begin_ns: int, end_ns: int) -> Stretch:
        """What the client saw of requests that are over by now."""
        rows = self._load.requests()
        mine = rows[(rows["first"] < end_ns) & (rows["last"] > begin_ns)]
        if not len(mine):
            return Stretch(0, None, 0.0)
        tpot = float(np.median(mine["last"] - mine["first"])) / self._gaps / 1e9
        # A wait that lasts beyond the stretch began in it, or is the one that it caused.
        inside = (rows["longest_until"] >= begin_ns) & (rows["longest_until"] - rows["longest"] < end_ns)
        longest = rows["longest"][inside].max(initial=0)
        return Stretch(len(mine), tpot, float(longest) / 1e9)

    def memory(self) -> Memory:
        """As of now."""
        resident = 0
        for reader in live_journals(self._server.directory, "worker"):
            resident += psutil.Process(int(reader.path.name.split("-")[1])).memory_info().rss
            reader.close()
        return Memory(resident, memory_used())

    def _capture(self, tool: str, seconds: float, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """When it was asked for, and the capture once it is done."""
        until = time.monotonic() + _DONE_SECONDS
        while True:
            begin = time.monotonic_ns()
            code, answer = self._agent.request(
                "POST", "/api/captures", {"tool": tool, "seconds": seconds, **options}, timeout=30
            )
            if code == http.HTTPStatus.ACCEPTED:
                break
            if code != http.HTTPStatus.TOO_MANY_REQUESTS or time.monotonic() > until:
                raise CaptureFailed(f"{tool}: {code}: {answer.get('detail', answer)}")
            self._load.wait(2)
        while True:
            capture = self._ask("GET", answer["url"])
            if capture["state"] in _FINAL:
                break
            if time.monotonic() > until:
                self._ask("DELETE", answer["url"])
                raise CaptureFailed(f"{tool}: {capture['state']} after {_DONE_SECONDS:.0f} s: {capture}")
            self._load.wait(_POLL_SECONDS)
        if capture["state"] != "done":
            raise CaptureFailed(f"{tool}: {capture['state']}: {capture['reason']}")
        return begin, capture

    def _monotonic(self, wall_seconds: float) -> int:
        return time.monotonic_ns() - round((time.time() - wall_seconds) * 1e9)

    def _ask(self, method: str, path: str) -> Any:
        code, answer = self._agent.request(method, path, timeout=30)
        if code >= http.HTTPStatus.BAD_REQUEST:
            raise CaptureFailed(f"{method} {path}: {code}: {answer}")
        return answer

    def _post(self, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=_DONE_SECONDS)
        try:
            connection.request("POST", path)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        except OSError as error:
            raise CaptureFailed(f"vLLM's {path}: {error}") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise CaptureFailed(f"vLLM's {path}: {response.status}: {text[:200]}")


def profiler_flags(folder: Path) -> list[str]:
    """Of ``vllm serve``: its own torch profiler with its defaults, writing into ``folder``."""
    return ["--profiler-config", json.dumps({"profiler": "torch", "torch_profiler_dir": str(folder)})]


def _mean(rows: list[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in rows if value is not None and weight]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None
