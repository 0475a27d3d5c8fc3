"""The vLLM hooks: the worker's step, the front end's requests, and vLLM's own ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from llmprobe.hooks.on_import import when_imported
from llmprobe.hooks.probe import Probe


def install(probe: Probe) -> None:
    """Wrap vLLM's classes as soon as vLLM imports them. Imports nothing of vLLM itself."""
    from llmprobe.hooks.vllm import arrival, endpoint, engine_core, frontend_hooks, worker

    def on(module: str, callback: Callable[[Probe, ModuleType], None]) -> None:
        when_imported(module, lambda loaded: probe.guard.call(module, callback, probe, loaded))

    on("vllm.v1.worker.worker_base", worker.install)
    on("vllm.v1.metrics.loggers", frontend_hooks.install_stat_loggers)
    on("vllm.v1.engine.core_client", engine_core.install)
    on("vllm.v1.engine.core_client", frontend_hooks.install_core_client)
    on("vllm.v1.engine.output_processor", frontend_hooks.install_output_processor)
    on("vllm.v1.engine.llm_engine", frontend_hooks.install_llm_engine)

    def serving(probe: Probe, module: ModuleType) -> None:
        frontend_hooks.install_async_llm(probe, module)
        # Only where vLLM serves: other programs have web applications too.
        on("starlette.applications", arrival.install)

    on("vllm.v1.engine.async_llm", serving)
    if probe.settings.vllm_metrics:
        on("vllm.v1.metrics.prometheus", endpoint.install)
