"""The servers of the scenarios on a GPU: configurations without weights, and schedulers that can be slow."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer
from support import slow_host
from support.gpu_labels import Model
from support.gpu_models import make_configuration
from support.serving import running_server

_BENCHMARKS = Path(__file__).resolve().parents[1]
_SLOW_ASYNC = ("--scheduler-cls", "support.slow_scheduler.SlowAsyncScheduler")
_SLOW = ("--scheduler-cls", "support.slow_scheduler.SlowScheduler", "--no-async-scheduling")
_COMMON = ("--load-format", "dummy", "--max-num-seqs", "128", "--no-enable-prefix-caching")
_GRAPHS = ("--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16,32,64,128]}')
_LONG = ("--max-model-len", "10240", "--max-num-batched-tokens", "8192")
_TINY = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 768}


@dataclass(frozen=True)
class Kind:
    """A server.

    ``model`` is a name of `support.gpu_models` or ``tiny``; ``dtype`` that of its weights. ``windows``: as by
    default, else off.
    """

    model: str
    flags: tuple[str, ...]
    windows: bool = True
    dtype: str = "bfloat16"
    env: tuple[tuple[str, str], ...] = ()


KINDS = {
    "graphs": Kind("dense", (*_LONG, *_GRAPHS, *_SLOW_ASYNC)),
    "sync": Kind("dense", (*_LONG, *_GRAPHS, *_SLOW)),
    "eager": Kind("dense", (*_LONG, "--enforce-eager")),
    "blind": Kind("dense", (*_LONG, "--enforce-eager"), windows=False),
    "liar": Kind("dense", (*_LONG, *_GRAPHS, *_SLOW_ASYNC), env=(("SCENARIO_CLOCK_RATIO", "0.5"),)),
    "float32": Kind(
        "small",
        ("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--enforce-eager"),
        dtype="float32",
    ),
    "tiny": Kind("tiny", ("--max-model-len", "2048", *_GRAPHS)),
    "small cache": Kind("dense", (*_LONG, *_GRAPHS, "--num-gpu-blocks-override", "300")),
    "other": Kind("sliding", (*_LONG, *_GRAPHS, *_SLOW_ASYNC)),
}


class Workshop:
    """Configurations and the file of the slow scheduler, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._slow = folder / "slow"

    def model(self, kind: Kind) -> Path:
        """The model's directory, made on the first call."""
        if kind.model == "tiny":
            return make_model(self._folder / "tiny", dtype=kind.dtype, **_TINY)
        return make_configuration(kind.model, self._folder / kind.model)

    def sizes(self, kind: Kind) -> Model:
        """What a rule knows of it."""
        config: dict[str, Any] = json.loads((self.model(kind) / "config.json").read_text())
        return Model.of(config, 4 if kind.dtype == "float32" else 2)

    def slow(self, seconds: float) -> None:
        """Make the host sleep that long before each step."""
        slow_host.tell(self._slow, seconds)

    @contextlib.contextmanager
    def server(self, kind: Kind) -> Iterator[VllmServer]:
        """Start one."""
        self.slow(0)
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_BENCHMARKS), os.environ.get("PYTHONPATH")))),
            "LLMPROBE_KERNEL_WINDOWS": "auto" if kind.windows else "off",
            slow_host.VARIABLE: str(self._slow),
            **dict(kind.env),
        }
        flags = [*_COMMON, "--dtype", kind.dtype, *kind.flags]
        with running_server(self.model(kind), flags, env) as server:
            yield server
