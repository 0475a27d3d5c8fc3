"""The servers of the scenarios: models made on the spot, and a scheduler that can be slow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer
from support import slow_host
from support.labels import Machine
from support.serving import running_server, tiny_model

_BENCHMARKS = Path(__file__).resolve().parents[1]
#: 738 MB in float32, far beyond any cache: every decode step streams it.
_LARGE: dict[str, Any] = {"hidden": 2048, "layers": 3, "heads": 16, "kv_heads": 4, "intermediate": 8192}
CHUNK_TOKENS = 256
_COMMON = ["--no-async-scheduling", "--scheduler-cls", "support.slow_scheduler.SlowScheduler"]
_COMMON += ["--no-enable-prefix-caching", "--max-num-batched-tokens", str(CHUNK_TOKENS)]
#: 16 blocks of 32 tokens: two requests of 192 tokens fit, the others wait.
_SMALL_CACHE = ["--block-size", "32", "--num-gpu-blocks-override", "16", "--max-model-len", "448"]


@dataclass(frozen=True)
class Kind:
    """A server: its model, flags, and whether its agent finds peaks."""

    large: bool
    flags: tuple[str, ...]
    calibrated: bool = True


KINDS = {
    "large": Kind(
        True, ("--max-model-len", "2048", "--worker-extension-cls", "support.lying_clock.Extension")
    ),
    "small": Kind(False, tuple(_SMALL_CACHE)),
    "blind": Kind(True, ("--max-model-len", "2048"), calibrated=False),
}


class Workshop:
    """Peaks, models and the file of the slow scheduler, in one folder.

    Args:
        folder: gets everything; 0.8 GB.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cpus = sorted(os.sched_getaffinity(0))
        # One core is left to the front end, the client and the agent.
        self._threads = max(len(self._cpus) - 1, 1)
        self._slow, self._clock = folder / "slow", folder / "clock"
        (folder / "empty").mkdir(exist_ok=True)

    def calibrate(self, seconds: float) -> Machine:
        """Measure the machine, each rate for so long. Raises subprocess.CalledProcessError."""
        print("llmprobe calibrate", file=sys.stderr, flush=True)
        command = [str(Path(sys.executable).with_name("llmprobe")), "calibrate", "--json"]
        command += ["--seconds", str(seconds), "--threads", str(self._threads)]
        env = {**os.environ, "XDG_CACHE_HOME": str(self._folder / "cache")}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        (device,) = [item for item in json.loads(done.stdout)["devices"] if item["device"].startswith("cpu:")]
        rates = device["flops_per_second"]
        return Machine(self._threads, device["bandwidth_bytes_per_second"], rates["float32"])

    def model(self, kind: Kind) -> Path:
        """The model's directory, made on the first call."""
        if not kind.large:
            return tiny_model()
        return make_model(self._folder / "large", dtype="float32", **_LARGE)

    def weights_bytes(self, kind: Kind) -> int:
        """Size of the files with the weights."""
        return sum(path.stat().st_size for path in self.model(kind).glob("*.safetensors"))

    def slow(self, seconds: float) -> None:
        """Make the host sleep that long before each step."""
        slow_host.tell(self._slow, seconds)

    def lie(self, ratio: float) -> None:
        """Make the step clock tell that share of every span; 0: the truth."""
        slow_host.tell(self._clock, ratio)

    @contextlib.contextmanager
    def server(self, kind: Kind) -> Iterator[VllmServer]:
        """Start one."""
        self.slow(0)
        self.lie(0)
        before = os.environ.get("PYTHONPATH", "")
        env = {
            "PYTHONPATH": f"{_BENCHMARKS}:{before}" if before else str(_BENCHMARKS),
            "XDG_CACHE_HOME": str(self._folder / ("cache" if kind.calibrated else "empty")),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self._cpus[: self._threads])),
            slow_host.VARIABLE: str(self._slow),
            slow_host.CLOCK_VARIABLE: str(self._clock),
        }
        with running_server(self.model(kind), [*_COMMON, *kind.flags], env) as server:
            yield server
