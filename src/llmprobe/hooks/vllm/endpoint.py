"""llmprobe's families on vLLM's own ``/metrics``.

The agent leaves each server's exposition in a file; a scrape reads that file and nothing else. It can
therefore neither delay vLLM's answer nor fail it, and without an agent the answer is vLLM's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.hooks.session import GROUP_VARIABLE
from llmprobe.record.agent_launch import exposition_path

_STALE_SECONDS = 10.0  # the agent writes at least every six
_LIMIT_BYTES = 4 * 1024 * 1024


class FileCollector:
    """Yields what the agent last wrote about this server; nothing once that is stale."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def describe(self) -> list[Any]:
        """Empty: without it, registering would collect."""
        return []

    def collect(self) -> Iterator[Any]:
        """Metric families for `prometheus_client`; never raises."""
        families = self._probe.guard.call("vllm.metrics", self._families) if self._probe.active else None
        yield from families or ()

    def _families(self) -> list[Any]:
        from prometheus_client.parser import text_string_to_metric_families

        path = exposition_path(self._probe.settings.directory, os.environ.get(GROUP_VARIABLE, ""))
        try:
            stat = path.stat()
            if time.time() - stat.st_mtime > _STALE_SECONDS or stat.st_size > _LIMIT_BYTES:
                return []
            text = path.read_text()
        except OSError:
            return []
        return list(text_string_to_metric_families(text))


def install(probe: Probe, module: ModuleType) -> None:
    """Join vLLM's registry; with several API servers, its multi-process collector as well."""
    from prometheus_client import REGISTRY, multiprocess

    collector = FileCollector(probe)
    REGISTRY.register(collector)
    probe.cleanups.append(lambda: REGISTRY.unregister(collector))

    def make(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        def collect(self: Any, *args: Any, **kwargs: Any) -> Any:
            yield from original(self, *args, **kwargs)
            if patch.active:
                yield from collector.collect()

        return collect

    probe.patch(multiprocess.MultiProcessCollector, "collect", make)
