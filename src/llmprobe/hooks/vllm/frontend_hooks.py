"""Where llmprobe sees what vLLM's front end does: its statistics, its requests, the engine each is sent to.

The wrappers hand it to the `FrontEnd` of this process; they run on the front end's event loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.vllm import facts
from llmprobe.hooks.vllm.frontend import FrontEnd
from llmprobe.settings import logger

_front_end: FrontEnd | None = None
_told = False  # whether vLLM's client says which engine it chooses


def _the_front_end(probe: Probe) -> FrontEnd | None:
    return _front_end if probe.armed else None


def install_stat_loggers(probe: Probe, module: ModuleType) -> None:
    """Ride on vLLM's manager of stat loggers; works from 0.11, and with any number of front ends."""
    guard = probe.guard
    managers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # → their configuration's id
    newest = 0

    def arm(manager: Any, config: Any, engines: Any) -> None:
        global _front_end
        nonlocal newest
        managers[manager] = newest = id(config)
        those = sorted(int(engine) for engine in engines or [facts.engine_of(config)])
        _front_end = FrontEnd(probe, config, those, told=_told, before=_front_end)

    def make_init(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if patch.active and probe.active:
                config = args[0] if args else kwargs.get("vllm_config")
                engines = args[1] if len(args) > 1 else kwargs.get("engine_idxs")
                guard.call("vllm.frontend", arm, self, config, engines)

        return __init__

    def make_record(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def record_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            # `Probe.active` and `_the_front_end`, inline: this runs at each step.
            if (
                patch.active
                and probe.enabled
                and not guard.inert
                and probe.armed
                and (front_end := _front_end) is not None
            ):
                try:
                    scheduler = args[0] if args else kwargs.get("scheduler_stats")
                    iteration = args[1] if len(args) > 1 else kwargs.get("iteration_stats")
                    front_end.record(scheduler, iteration, kwargs.get("engine_idx"))
                    if len(managers) > 1 and managers.get(self, newest) != newest:
                        front_end.beside = True
                except Exception as error:  # noqa: BLE001 - at each step: inline, and not by `Guard.call`
                    guard.failed("vllm.record", error)
            return result

        return record_stats

    def look() -> None:
        front_end = _the_front_end(probe)
        if front_end is not None:
            front_end.look(probe.active)

    probe.writers.append(look)
    probe.patch(module.StatLoggerManager, "__init__", make_init)
    probe.patch(module.StatLoggerManager, "record", make_record)


def install_core_client(probe: Probe, module: ModuleType) -> None:
    """Note which engine vLLM's client chooses for a request, where it has several to choose from."""
    global _told
    guard = probe.guard
    owner = getattr(module, "DPLBAsyncMPClient", None)
    if owner is None or not hasattr(owner, "get_core_engine_for_request"):
        return
    _told = True

    def sent(client: Any, request: Any, identity: bytes) -> None:
        front_end = _the_front_end(probe)
        if front_end is not None:
            front_end.sent(client, request, identity)

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def get_core_engine_for_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            identity = original(self, request, *args, **kwargs)
            if patch.active and probe.active:
                guard.call("vllm.sent", sent, self, request, identity)
            return identity

        return get_core_engine_for_request

    probe.patch(owner, "get_core_engine_for_request", make)


def install_output_processor(probe: Probe, module: ModuleType) -> None:
    """Note arrivals, first tokens and aborts, which the statistics tell late or not at all."""
    guard = probe.guard

    def aborted(processor: Any, ids: Any) -> None:
        front_end = _the_front_end(probe)
        if front_end is not None:
            front_end.aborted(processor, list(ids or ()))

    def make_add(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
            front_end = _the_front_end(probe) if patch.active and probe.active else None
            if front_end is None:
                return original(self, *args, **kwargs)
            request, new = args[0] if args else kwargs.get("request"), False
            try:
                new = request.request_id not in self.request_states  # type: ignore[union-attr]
            except Exception as error:  # noqa: BLE001 - at each request: inline, and not by `Guard.call`
                guard.failed("vllm.add_request", error)
            result = original(self, *args, **kwargs)
            try:
                front_end.arrived(self, request, new)
            except Exception as error:  # noqa: BLE001
                guard.failed("vllm.add_request", error)
            return result

        return add_request

    def make_process(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def process_outputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            # As at `record_stats`.
            if (
                patch.active
                and probe.enabled
                and not guard.inert
                and probe.armed
                and (front_end := _front_end) is not None
            ):
                try:
                    those = args[0] if args else kwargs.get("engine_core_outputs")
                    made = args[1] if len(args) > 1 else kwargs.get("engine_core_timestamp")
                    iteration = args[2] if len(args) > 2 else kwargs.get("iteration_stats")
                    front_end.outputs(self, those, made, iteration)
                except Exception as error:  # noqa: BLE001 - at each step: inline, and not by `Guard.call`
                    guard.failed("vllm.process_outputs", error)
            return result

        return process_outputs

    def make_abort(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        depth = 0  # it calls itself for the children of a request with n > 1

        def abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                depth -= 1
            if patch.active and probe.active and not depth:
                guard.call("vllm.abort_requests", aborted, self, result)
            return result

        return abort_requests

    probe.patch(module.OutputProcessor, "add_request", make_add)
    probe.patch(module.OutputProcessor, "process_outputs", make_process)
    probe.patch(module.OutputProcessor, "abort_requests", make_abort)


def install_llm_engine(probe: Probe, module: ModuleType) -> None:
    """``vllm.LLM``: its statistics are off unless asked for; turn them on, and say so."""
    _force_statistics(probe, module.LLMEngine)


def install_async_llm(probe: Probe, module: ModuleType) -> None:
    """``vllm serve --disable-log-stats``: likewise."""
    _force_statistics(probe, module.AsyncLLM)


def _force_statistics(probe: Probe, owner: type) -> None:
    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if patch.active and probe.active:
                # (vllm_config, executor_class, log_stats, ...) in every version so far
                if kwargs.get("log_stats") is False:
                    kwargs["log_stats"] = True
                    logger().info("vLLM's request statistics were off; turned on for TTFT and TPOT")
                elif len(args) > 2 and args[2] is False:
                    args = (*args[:2], True, *args[3:])
                    logger().info("vLLM's request statistics were off; turned on for TTFT and TPOT")
            original(self, *args, **kwargs)

        return __init__

    probe.patch(owner, "__init__", make)
