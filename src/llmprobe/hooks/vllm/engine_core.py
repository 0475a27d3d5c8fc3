"""Which process an engine's core runs in: it schedules steps, and is not always where they run.

Beside its front end: `vllm.LLM` may be told so (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), also where its workers
have processes of their own. The core then spins while they work, and the process's CPU time says nothing
about its front end. Without its workers: with more than one, and in vLLM's CPU build always. It writes no
journal then, so its workers say where it is.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe

FACT = "engine_core_inside"
PID_FACT = "engine_core_pid"
_inside: bool | None = None


def inside() -> bool | None:
    """Whether one does, or did; None where this vLLM does not say."""
    return _inside


def pid_of_parent(parallel_config: Any) -> int | None:
    """The core's process, as a worker's that it started knows it; None where that is not how workers run."""
    if getattr(parallel_config, "distributed_executor_backend", None) != "mp":
        return None
    parent = multiprocessing.parent_process()
    pid = None if parent is None else parent.pid
    return pid if pid == os.getppid() else None  # else a server of forks lies between


def install(probe: Probe, module: ModuleType) -> None:
    """Note when vLLM makes the client whose engine core is in its own process."""
    global _inside
    owner = getattr(module, "InprocClient", None)
    if owner is None:
        return
    _inside = bool(_inside)

    def note() -> None:
        global _inside
        _inside = True
        for recorder in probe.recorders():  # of an engine that this program had before
            if recorder.facts.get(FACT) is False:
                recorder.update_facts(**{FACT: True})

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if patch.active and probe.active:
                probe.guard.call("vllm.engine_core", note)
            original(self, *args, **kwargs)

        return __init__

    probe.patch(owner, "__init__", make)
