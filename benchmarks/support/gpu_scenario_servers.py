"""The servers of the scenarios on a GPU: configurations without weights, and schedulers that can be slow."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprobe.demo.model import make_model
from llmprobe.demo.server import VllmServer
from support import slow_host
from support.gpu_labels import Model
from support.gpu_models import CONFIGURATIONS, make_configuration
from support.machine import has_gpu
from support.nsys_server import NsysServer
from support.serving import running_server

_BENCHMARKS = Path(__file__).resolve().parents[1]
_SLOW_ASYNC = ("--scheduler-cls", "support.slow_scheduler.SlowAsyncScheduler")
_SLOW = ("--scheduler-cls", "support.slow_scheduler.SlowScheduler", "--no-async-scheduling")
_LIES = ("--worker-extension-cls", "support.lying_clock.Extension")
_COMMON = ("--load-format", "dummy", "--max-num-seqs", "128", "--no-enable-prefix-caching")
_GRAPHS = ("--compilation-config", '{"cudagraph_capture_sizes":[1,2,4,8,16,32,64,128]}')
_LONG = ("--max-model-len", "10240", "--max-num-batched-tokens", "8192")
#: 4800 tokens; the longest request has to fit.
_SMALL_CACHE = ("--block-size", "32", "--num-gpu-blocks-override", "150", "--max-model-len", "2048")
_TINY = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 768}
#: Goes over a configuration when only the machinery is tried; an odd size stays odd.
_REHEARSED = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_REHEARSED["vocab_size"] = 2048


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
    "graphs": Kind("dense", (*_LONG, *_GRAPHS, *_SLOW_ASYNC, *_LIES)),
    "sync": Kind("dense", (*_SMALL_CACHE, *_GRAPHS, *_SLOW)),
    "eager": Kind("dense", (*_LONG, "--enforce-eager")),
    "blind": Kind("dense", (*_LONG, "--enforce-eager"), windows=False),
    "float32": Kind(
        "small",
        ("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--enforce-eager"),
        dtype="float32",
    ),
    "tiny": Kind("tiny", ("--max-model-len", "2048", *_GRAPHS)),
    # torch's compiler would pad odd shapes to even ones.
    "odd": Kind(
        "odd",
        (*_LONG, *_GRAPHS),
        env=(("TORCHINDUCTOR_SHAPE_PADDING", "0"), ("TORCHINDUCTOR_COMPREHENSIVE_PADDING", "0")),
    ),
    "other": Kind("llama", (*_LONG, *_GRAPHS, *_SLOW_ASYNC, *_LIES)),
    "windows": Kind("sliding", (*_LONG, *_GRAPHS)),
}


def flags_of(kind: Kind) -> list[str]:
    """Of ``vllm serve``, beside the model."""
    return [*_COMMON, "--dtype", kind.dtype, *kind.flags]


@dataclass(frozen=True)
class Served:
    """A server that runs. ``record`` traces it for so many seconds and returns the export; None where it does
    not run under nsys."""

    server: VllmServer
    record: Callable[[str, float], Path] | None


class Workshop:
    """Configurations and the files by which an engine is told to be slow or to lie, in one folder.

    Args:
        folder: gets everything.
        rehearse: every model is made tiny.
        nsys: servers run under ``nsys launch``.
    """

    def __init__(self, folder: Path, rehearse: bool = False, nsys: bool = False) -> None:
        self._folder = folder
        self._slow, self._clock = folder / "slow", folder / "clock"
        self._rehearse, self._nsys = rehearse, nsys

    def model(self, kind: Kind) -> Path:
        """The model's directory, made on the first call."""
        if kind.model == "tiny":
            return make_model(self._folder / "tiny", dtype=self.dtype(kind), **_TINY)
        changes: dict[str, Any] = {}
        if self._rehearse:
            odd = CONFIGURATIONS[kind.model]["hidden_size"] % 2
            changes = {**_REHEARSED, "hidden_size": 256 - odd, "intermediate_size": 768 - odd}
            layers = CONFIGURATIONS[kind.model].get("layer_types")
            changes |= {"layer_types": layers[4:6]} if layers else {}
        return make_configuration(kind.model, self._folder / kind.model, **changes)

    def dtype(self, kind: Kind) -> str:
        """Of the weights; processors multiply in float32."""
        return kind.dtype if has_gpu() else "float32"

    def sizes(self, kind: Kind) -> Model:
        """What a rule knows of it."""
        config: dict[str, Any] = json.loads((self.model(kind) / "config.json").read_text())
        return Model.of(config, 4 if self.dtype(kind) == "float32" else 2)

    def slow(self, seconds: float) -> None:
        """Make the host sleep that long before each step; 0: not."""
        slow_host.tell(self._slow, seconds)

    def lie(self, ratio: float) -> None:
        """Make the step clock tell that share of every span; 0: the truth."""
        slow_host.tell(self._clock, ratio)

    @contextlib.contextmanager
    def server(self, kind: Kind) -> Iterator[Served]:
        """Start one. Raises ServerFailed."""
        self.slow(0)
        self.lie(0)
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_BENCHMARKS), os.environ.get("PYTHONPATH")))),
            "LLMPROBE_KERNEL_WINDOWS": "auto" if kind.windows else "off",
            slow_host.VARIABLE: str(self._slow),
            slow_host.CLOCK_VARIABLE: str(self._clock),
            **dict(kind.env),
        }
        flags = [*flags_of(kind), "--dtype", self.dtype(kind)]
        if not self._nsys:
            with running_server(self.model(kind), flags, env) as server:
                yield Served(server, None)
            return
        # Compiled code is shared between the servers of a run, as it is without nsys.
        env["VLLM_CACHE_ROOT"] = str(self._folder / "vllm-cache")
        flags += [] if has_gpu() else ["--enforce-eager"]
        with NsysServer(kind.model, self.model(kind), flags, env) as traced:
            traced.wait_ready()
            yield Served(traced.server, traced.record)
