"""llmprobe's families on vLLM's own ``/metrics``.

vLLM renders that page in its event loop, between two tokens of every stream. The agent therefore leaves each
server's families in a file, and a scrape reads that file and asks nobody: it waits for no other process, and
what fails here adds nothing to the page. It does cost vLLM the reading and the lines that it prints more;
docs/decisions/vllm-metrics-from-a-file.md has figures. Without an agent the answer is vLLM's own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from llmprobe.hooks.naming import GROUP_VARIABLE, server_name
from llmprobe.hooks.patch import Patch
from llmprobe.hooks.probe import Probe
from llmprobe.record.agent_launch import exposition_path

_STALE_SECONDS = 10.0  # the agent writes at least every six
_LIMIT_BYTES = 4 * 1024 * 1024
_SCHEMA = 1


class FileCollector:
    """Yields what the agent last wrote about this server; nothing once that is stale."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        #: Which file was read last (modification time in ns, inode), and what stood in it.
        self._read: tuple[tuple[int, int] | None, list[Any]] = (None, [])

    def describe(self) -> list[Any]:
        """Empty: without it, registering would collect."""
        return []

    def collect(self) -> Iterator[Any]:
        """Metric families for `prometheus_client`; never raises."""
        families = self._probe.guard.call("vllm.metrics", self._families) if self._probe.active else None
        yield from families or ()

    def _families(self) -> list[Any]:
        settings = self._probe.settings
        group = os.environ.get(GROUP_VARIABLE, "")
        path = exposition_path(settings.directory, group, server_name(settings))
        try:
            stat = path.stat()
            if time.time() - stat.st_mtime > _STALE_SECONDS or stat.st_size > _LIMIT_BYTES:
                self._read = (None, [])
                return []
            key = (stat.st_mtime_ns, stat.st_ino)
            known, families = self._read
            if key == known:
                return families
            with path.open("rb") as file:
                data = file.read(_LIMIT_BYTES + 1)  # may have been replaced since by a longer one
        except OSError:
            self._read = (None, [])
            return []
        self._read = (key, [])  # what cannot be read counts once, not at every scrape
        if len(data) > _LIMIT_BYTES:
            return []
        families = decode(data)
        self._read = (key, families)
        return families


def decode(data: bytes) -> list[Any]:
    """The metric families in what `llmprobe.agent.exposition.encode` made; none of an unknown schema.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: not such data. Everything is checked
            that rendering would fail at.
    """
    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample

    document = json.loads(data)
    if document["schema"] != _SCHEMA:
        return []
    families = []
    for name, kind, documentation, series in document["families"]:
        metric = Metric(_text(name), _text(documentation), kind)
        for labels, rows in series:
            for value in labels.values():
                _text(value)
            # Appended as `Metric.add_sample` does, at half its cost.
            metric.samples += [
                Sample(_text(sample), labels if le is None else {**labels, "le": _text(le)}, float(value))
                for sample, le, value in rows
            ]
        families.append(metric)
    return families


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


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
