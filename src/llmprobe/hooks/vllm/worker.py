"""Wraps ``execute_model``, ``sample_tokens`` and their like of whatever worker class runs.

The wrappers are on the engine's step path: bounded, lock-free and guarded inline. What they call is in
`llmprobe.hooks.vllm.steps`. Arms only after warm-up, because vLLM warms up through the same methods.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import seams
from llmprobe.hooks.vllm.steps import STEP_METHODS, Running, WorkerSteps

_LIFE_METHODS = ("initialize_from_config", "compile_or_warm_up_model")

#: What is kept about each worker, by its id: cheaper at every step than a weak dictionary.
_Workers = dict[int, WorkerSteps]
_Maker = Callable[[Callable[..., Any], Patch], Callable[..., Any]]


def install(probe: Probe, module: ModuleType) -> None:
    """Wrap ``WorkerBase.__init__``, where the classes of the actual worker become known."""
    workers: _Workers = {}
    running = Running()

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if patch.active and probe.active:
                probe.guard.call("vllm.worker", adopt, self)

        return __init__

    def adopt(worker: Any) -> None:
        steps = workers[id(worker)] = WorkerSteps(probe, running)
        weakref.finalize(worker, forget, id(worker), steps)
        probe.profilers.append(_profiler_of(weakref.ref(worker)))
        for owner, name in seams.methods(type(worker), STEP_METHODS + _LIFE_METHODS):
            probe.patch(owner, name, _WRAPPERS[name](probe, workers))

    def forget(number: int, steps: WorkerSteps) -> None:
        if workers.get(number) is steps:  # a new worker may have its id by now
            del workers[number]
        steps.forget()

    probe.patch(module.WorkerBase, "__init__", make)


def _profiler_of(worker: Callable[[], Any]) -> Callable[[], str | None]:
    """Whether vLLM's own profiler runs in a worker: its names changed between versions."""

    def running() -> str | None:
        profiler = getattr(worker(), "profiler", None)
        if any(getattr(profiler, name, False) is True for name in ("_active", "_running", "is_running")):
            return "vLLM's own profiler runs: POST /stop_profile ends it"
        return None

    return running


def _around(where: str, before: Callable[..., None], after: Callable[..., None]) -> Any:
    """Makes wrappers that call ``before(state, args, kwargs)`` and ``after(state, output)`` round a method.

    They call each other through ``super()``; the outermost counts.
    """

    def wrapper_of(probe: Probe, workers: _Workers) -> _Maker:
        guard = probe.guard

        def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                state = workers.get(id(self)) if patch.active else None
                if state is None or not state.armed or state.depth or guard.inert:
                    return original(self, *args, **kwargs)
                state.depth = 1
                try:
                    try:
                        before(state, args, kwargs)
                    except Exception as error:  # noqa: BLE001 - guarded inline: this runs at every step
                        guard.failed(where, error)
                    output = original(self, *args, **kwargs)
                except BaseException:
                    guard.call(where, state.abandon)
                    raise
                finally:
                    state.depth = 0
                try:
                    after(state, output)
                except Exception as error:  # noqa: BLE001
                    guard.failed(where, error)
                return output

            return method

        return make

    return wrapper_of


def _wrap_initialize(probe: Probe, workers: _Workers) -> _Maker:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active and probe.active else None
            if state is not None:
                config = args[0] if args else next(iter(kwargs.values()), None)
                probe.guard.call("vllm.initialize_from_config", state.kv_cache, config)
            return original(self, *args, **kwargs)

        return initialize_from_config

    return make


def _wrap_warm_up(probe: Probe, workers: _Workers) -> _Maker:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = workers.get(id(self)) if patch.active and probe.active else None
            if state is None or state.depth:
                return original(self, *args, **kwargs)
            probe.guard.call("vllm.disarm", state.disarm)
            state.armed = False  # whatever failed there
            state.depth = 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                state.depth = 0
            probe.guard.call("vllm.arm", state.arm, self)
            return result

        return compile_or_warm_up_model

    return make


_WRAPPERS: dict[str, Callable[[Probe, _Workers], _Maker]] = {
    "execute_model": _around("vllm.execute_model", WorkerSteps.entered, WorkerSteps.forward_end),
    "sample_tokens": _around("vllm.sample_tokens", WorkerSteps.sample_start, WorkerSteps.sample_end),
    "execute_dummy_batch": _around(
        "vllm.execute_dummy_batch", WorkerSteps.entered_dummy, WorkerSteps.dummy_end
    ),
    "initialize_from_config": _wrap_initialize,
    "compile_or_warm_up_model": _wrap_warm_up,
}
