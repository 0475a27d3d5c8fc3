"""Wraps ``execute_model``, ``sample_tokens`` and their like of whatever worker class runs.

The wrappers are on the engine's step path: bounded, lock-free and guarded inline. What they call is in
`llmprobe.hooks.vllm.step_path`. Arms only after warm-up, because vLLM warms up through the same methods.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import seams
from llmprobe.hooks.vllm.steps import WorkerSteps
from llmprobe.hooks.vllm.worker_facts import STEP_METHODS

_LIFE_METHODS = ("initialize_from_config", "compile_or_warm_up_model")

_Maker = Callable[[Callable[..., Any], Patch], Callable[..., Any]]
#: The attribute of a worker under which its `WorkerSteps` is found: at every step, and no dictionary of ours
#: is as near as the worker's own.
_KEPT = "_llmprobe_steps"


def install(probe: Probe, module: ModuleType) -> None:
    """Wrap ``WorkerBase.__init__``, where the classes of the actual worker become known."""
    running = seams.Running()

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if patch.active and probe.active:
                probe.guard.call("vllm.worker", adopt, self)

        return __init__

    def adopt(worker: Any) -> None:
        steps = WorkerSteps(probe, running)
        setattr(worker, _KEPT, steps)
        weakref.finalize(worker, steps.forget)
        there = weakref.ref(worker)
        probe.cleanups.append(lambda: leave(there(), steps))
        probe.profilers.append(_profiler_of(there))
        for owner, name in seams.methods(type(worker), STEP_METHODS + _LIFE_METHODS):
            probe.patch(owner, name, _WRAPPERS[name](probe))

    def leave(worker: Any, steps: WorkerSteps) -> None:
        steps.forget()
        if getattr(worker, _KEPT, None) is steps:
            delattr(worker, _KEPT)

    probe.patch(module.WorkerBase, "__init__", make)


def _profiler_of(worker: Callable[[], Any]) -> Callable[[], str | None]:
    """Whether vLLM's own profiler runs in a worker: its names changed between versions."""

    def running() -> str | None:
        profiler = getattr(worker(), "profiler", None)
        if any(getattr(profiler, name, False) is True for name in ("_active", "_running", "is_running")):
            return "vLLM's own profiler runs: POST /stop_profile ends it"
        return None

    return running


def _around(
    where: str, parameter: str, before: Callable[[WorkerSteps, Any], None], after: Callable[..., None]
) -> Any:
    """Makes wrappers that call ``before(state, argument)`` and ``after(state, output)`` round a method.

    They call each other through ``super()``; the outermost counts.

    Args:
        parameter: the one that the method has in all vLLMs known.
    """

    def wrapper_of(probe: Probe) -> _Maker:
        guard = probe.guard

        def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
            if _parameters(original) == ["self", parameter]:
                method = around(original, patch)
                # Callers may name it.
                code = method.__code__
                names = ("self", parameter, *code.co_varnames[2:])
                method.__code__ = code.replace(co_varnames=names)
                return method

            def any_method(self: Any, *args: Any, **kwargs: Any) -> Any:
                argument = args[0] if args else kwargs.get(parameter)
                return around(lambda self, _: original(self, *args, **kwargs), patch)(self, argument)

            return any_method

        def around(original: Callable[..., Any], patch: Patch) -> FunctionType:
            # With a parameter of its own: packing and unpacking any number takes as long as all the rest.
            def method(self: Any, argument: Any) -> Any:
                try:
                    state = self._llmprobe_steps
                except AttributeError:
                    state = None
                if state is None or not patch.active or not state.armed or state.depth or guard.inert:
                    if guard.inert and state is not None:  # it gave up in the middle of a step
                        guard.call_even_inert(where, state.abandon)
                    return original(self, argument)
                state.depth = 1
                try:
                    try:
                        before(state, argument)
                    except Exception as error:  # noqa: BLE001 - guarded inline: this runs at every step
                        failed(state, error)
                    output = original(self, argument)
                except BaseException:
                    guard.call_even_inert(where, state.abandon)
                    raise
                finally:
                    state.depth = 0
                try:
                    after(state, output)
                except Exception as error:  # noqa: BLE001
                    failed(state, error)
                return output

            def failed(state: WorkerSteps, error: Exception) -> None:
                guard.failed(where, error)
                guard.call_even_inert(where, state.abandon)  # half a step is none

            assert isinstance(method, FunctionType)
            return method

        return make

    return wrapper_of


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Their names, if a caller may pass each by place or by name; else nothing."""
    parameters = inspect.signature(function).parameters.values()
    plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    return [parameter.name for parameter in parameters] if plain else []


def _wrap_initialize(probe: Probe) -> _Maker:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = getattr(self, _KEPT, None) if patch.active and probe.active else None
            if state is not None:
                config = args[0] if args else next(iter(kwargs.values()), None)
                probe.guard.call("vllm.initialize_from_config", state.kv_cache, config)
            return original(self, *args, **kwargs)

        return initialize_from_config

    return make


def _wrap_warm_up(probe: Probe) -> _Maker:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = getattr(self, _KEPT, None) if patch.active and probe.active else None
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


_WRAPPERS: dict[str, Callable[[Probe], _Maker]] = {
    "execute_model": _around(
        "vllm.execute_model", "scheduler_output", WorkerSteps.entered, WorkerSteps.forward_end
    ),
    "sample_tokens": _around(
        "vllm.sample_tokens", "grammar_output", WorkerSteps.sample_start, WorkerSteps.sample_end
    ),
    "execute_dummy_batch": _around(
        "vllm.execute_dummy_batch", "", WorkerSteps.entered_dummy, WorkerSteps.dummy_end
    ),
    "initialize_from_config": _wrap_initialize,
    "compile_or_warm_up_model": _wrap_warm_up,
}
