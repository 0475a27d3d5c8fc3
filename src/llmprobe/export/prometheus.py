"""Views as Prometheus metrics.

A value that is not known makes no sample. What each family means stands in `llmprobe.export.catalogue`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmprobe.collect.host_threads import OTHER
from llmprobe.collect.telemetry import GPU_FIGURES
from llmprobe.collect.views import EngineView, HistogramView, RankView, ServerView
from llmprobe.compute.accounting import IDLE_COMPONENTS, NO_PHASE
from llmprobe.compute.histogram import rebucket
from llmprobe.compute.verdict import BOTTLENECKS
from llmprobe.export.catalogue import FAMILIES, LATENCIES, Family
from llmprobe.record.layout import bucket_bounds_seconds

_FINE = bucket_bounds_seconds()
#: Components that nobody has measured while they are 0: only kernels tell most of them apart.
_MAYBE_UNMEASURED = frozenset({"inefficiency", "launch_gap", "communication", "transfer", "blocked"})
_MOST_THREADS = 3  # of the CPU time of a process, besides all others together
_THROTTLE_REASONS = frozenset(
    {"software_power_cap", "hardware_slowdown", "software_thermal", "hardware_thermal", "power_brake"}
)
#: Figures that every server should have; `ServerView.missing` says which it lacks.
EXPECTED_FIGURES = (
    "device_time_seconds",
    "mbu_ratio",
    "mfu_ratio",
    "sync_gap_ratio",
    "time_to_first_token_seconds",
)


class ViewCollector(Collector):
    """The Prometheus collector of every server; asks ``views`` at each scrape.

    Args:
        version: of the agent that answers; shown as ``llmprobe_build_info``.
        captures: how the agent's captures ended: (tool, outcome) → how many.
    """

    def __init__(
        self,
        views: Callable[[], Iterable[ServerView]],
        version: str | None = None,
        captures: Callable[[], Mapping[tuple[str, str], int]] = dict,
    ) -> None:
        self._views = views
        self._version = version
        self._captures = captures

    def describe(self) -> Iterator[Metric]:
        """The families without samples, so that registering asks for no views."""
        for family in FAMILIES.values():
            yield _empty(family)

    def collect(self) -> Iterator[Metric]:
        """Every family that has samples, in the catalogue's order."""
        samples = _Metrics()
        for view in self._views():
            fill(samples, view)
        for (tool, outcome), count in self._captures().items():
            samples.add("llmprobe_captures_total", (tool, outcome), count)
        if self._version is not None:
            samples.add("llmprobe_build_info", (self._version,), 1.0)
        return samples.metrics()


def expose(views: Iterable[ServerView]) -> bytes:
    """``views`` in Prometheus' text format (version 0.0.4), as vLLM's own ``/metrics`` can append it."""
    views = list(views)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ViewCollector(lambda: views))
    return generate_latest(registry)


class Samples(ABC):
    """Where `fill` puts samples."""

    def add(self, name: str, labels: Sequence[str], value: float | None) -> None:
        """One sample of a counter or gauge; none if the value is not known."""
        if value is not None and not math.isnan(value):
            self.put(FAMILIES[name], labels, value)

    def histogram(self, family: Family, labels: Sequence[str], view: HistogramView) -> None:
        """One histogram, its fine buckets merged into the family's."""
        bounds, names = _bounds(family.buckets)
        counts = rebucket(view.counts, _FINE, bounds).tolist()
        self.put_histogram(family, labels, [*zip(names, map(float, counts), strict=True)], view.sum)

    @abstractmethod
    def put(self, family: Family, labels: Sequence[str], value: float) -> None:
        """One sample of a counter or gauge."""

    @abstractmethod
    def put_histogram(
        self, family: Family, labels: Sequence[str], buckets: list[tuple[str, float]], total: float
    ) -> None:
        """The cumulative buckets of one histogram by their ``le``, and the sum of what was observed."""


class _Metrics(Samples):
    """As metrics of `prometheus_client`, made at their first sample."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def _metric(self, family: Family) -> Metric:
        metric = self._metrics.get(family.name)
        if metric is None:
            metric = self._metrics[family.name] = _empty(family)
        return metric

    def put(self, family: Family, labels: Sequence[str], value: float) -> None:
        metric = self._metric(family)
        assert isinstance(metric, (CounterMetricFamily, GaugeMetricFamily))
        metric.add_metric(labels, value)

    def put_histogram(
        self, family: Family, labels: Sequence[str], buckets: list[tuple[str, float]], total: float
    ) -> None:
        metric = self._metric(family)
        assert isinstance(metric, HistogramMetricFamily)
        metric.add_metric(labels, buckets, total)

    def metrics(self) -> Iterator[Metric]:
        return (self._metrics[name] for name in FAMILIES if name in self._metrics)


@functools.cache
def _bounds(buckets: tuple[float, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Upper bounds of a family's buckets, infinity included, and how they are written."""
    return np.array([*buckets, np.inf]), (*map(repr, buckets), "+Inf")


def _empty(family: Family) -> Metric:
    if family.kind == "counter":
        return CounterMetricFamily(family.name, family.help, labels=family.labels)
    if family.kind == "histogram":
        return HistogramMetricFamily(family.name, family.help, labels=family.labels)
    return GaugeMetricFamily(family.name, family.help, labels=family.labels)


def fill(samples: Samples, view: ServerView) -> None:
    """Every sample of one server."""
    server = (view.server, view.model_name)
    engines = {engine.engine: engine for engine in view.engines}
    for engine in view.engines:
        _engine(samples, (*server, str(engine.engine)), engine)
    for rank in view.ranks:
        labels = (*server, str(rank.engine), str(rank.rank))
        _time(samples, labels, rank)
        _kernels(samples, labels, rank)
        _limits(samples, labels, rank)
        _gpu(samples, labels, rank)
        _host(samples, labels, rank)
        alone = sum(other.engine == rank.engine for other in view.ranks) == 1
        _memory(samples, labels, rank, engines.get(rank.engine), alone)
        _health(samples, labels, rank, view)
    _verdicts(samples, server, view)
    for process, seconds in view.host_cpu_seconds.items():
        samples.add("llmprobe_host_cpu_seconds_total", (*server, process), seconds)
    for figure in sorted(figures_of(view)):
        samples.add("llmprobe_figure_available", (*server, figure), float(figure not in view.missing))


def _verdicts(samples: Samples, server: tuple[str, ...], view: ServerView) -> None:
    for phase, verdict in view.verdicts.items():
        for name in BOTTLENECKS:
            samples.add("llmprobe_bottleneck", (*server, phase, name), float(verdict.bottleneck == name))
        samples.add("llmprobe_bottleneck_confidence_ratio", (*server, phase), verdict.confidence)
    for phase, classes in view.bottleneck_seconds.items():
        for name, causes in classes.items():
            for cause, seconds in causes.items():
                samples.add("llmprobe_bottleneck_seconds_total", (*server, phase, name, cause), seconds)
    for kind, pressure in view.pressure.items():
        samples.add("llmprobe_pressure", (*server, kind), float(pressure.active))


def figures_of(view: ServerView) -> set[str]:
    """Every figure that is, or should be, known about a server."""
    on_gpu = GPU_FIGURES if any(rank.gpu is not None for rank in view.ranks) else ()
    return {*EXPECTED_FIGURES, *on_gpu, *view.missing}


def _engine(samples: Samples, labels: tuple[str, ...], engine: EngineView) -> None:
    samples.add("llmprobe_requests_running", labels, engine.requests_running)
    samples.add("llmprobe_requests_waiting", labels, engine.requests_waiting)
    samples.add("llmprobe_tokens_total", (*labels, "prompt"), engine.prompt_tokens)
    samples.add("llmprobe_tokens_total", (*labels, "generated"), engine.generated_tokens)
    samples.add("llmprobe_preemptions_total", labels, engine.preemptions)
    for name, family in LATENCIES.items():
        if name in engine.latency:
            samples.histogram(family, labels, engine.latency[name])
    samples.add("llmprobe_errors_total", (*labels, "", "frontend"), engine.errors)
    samples.add("llmprobe_self_seconds_total", (*labels, "", "frontend"), engine.own_seconds)
    samples.add("llmprobe_self_seconds_total", (*labels, "", "frontend_thread"), engine.own_thread_seconds)


def _time(samples: Samples, labels: tuple[str, ...], rank: RankView) -> None:
    for phase, components in rank.device_time.items():
        for component, seconds in components.items():
            elsewhere = (component in IDLE_COMPONENTS) != (phase == NO_PHASE)
            if not seconds and (elsewhere or component in _MAYBE_UNMEASURED):
                continue
            samples.add("llmprobe_device_time_seconds_total", (*labels, phase, component), seconds)
    for phase, histogram in rank.step_duration.items():
        if histogram.count:
            samples.histogram(FAMILIES["llmprobe_step_duration_seconds"], (*labels, phase), histogram)


def _kernels(samples: Samples, labels: tuple[str, ...], rank: RankView) -> None:
    totals = rank.kernel_totals
    if totals is None:
        return
    for phase, classes in totals.seconds.items():
        for name, seconds in classes.items():
            samples.add("llmprobe_kernel_seconds_total", (*labels, phase, name), seconds)
    samples.add("llmprobe_kernel_window_span_seconds_total", labels, totals.span_seconds)
    samples.add("llmprobe_kernel_window_busy_seconds_total", labels, totals.busy_seconds)


def _limits(samples: Samples, labels: tuple[str, ...], rank: RankView) -> None:
    for phase, figures in rank.figures.items():
        of_phase = (*labels, phase)
        samples.add("llmprobe_mbu_ratio", (*of_phase, "step"), figures.mbu_step)
        samples.add("llmprobe_mbu_ratio", (*of_phase, "busy"), figures.mbu_busy)
        samples.add("llmprobe_mfu_ratio", (*of_phase, "step"), figures.mfu_step)
        samples.add("llmprobe_mfu_ratio", (*of_phase, "busy"), figures.mfu_busy)
        samples.add("llmprobe_sync_gap_ratio", of_phase, figures.sync_gap_ratio)
        samples.add("llmprobe_arithmetic_intensity_flops_per_byte", of_phase, figures.intensity)
    for phase, kinds in rank.bytes.items():
        for kind, count in kinds.items():
            samples.add("llmprobe_estimated_bytes_total", (*labels, phase, kind), count)
    for phase, flops in rank.flops.items():
        samples.add("llmprobe_estimated_flops_total", (*labels, phase), flops)
    peaks = rank.peaks
    if peaks is not None:
        samples.add("llmprobe_peak_bandwidth_bytes_per_second", labels, peaks.bandwidth_bytes_per_second)
        samples.add("llmprobe_peak_flops_per_second", (*labels, peaks.dtype), peaks.flops_per_second)
        samples.add("llmprobe_ridge_flops_per_byte", labels, peaks.ridge_flops_per_byte)


def _gpu(samples: Samples, labels: tuple[str, ...], rank: RankView) -> None:
    gpu = rank.gpu
    if gpu is None:
        return
    samples.add("llmprobe_gpu_info", (*labels, gpu.uuid, gpu.name, gpu.driver_version), 1.0)
    samples.add("llmprobe_gpu_dram_active_ratio", labels, gpu.dram_active_ratio)
    samples.add("llmprobe_gpu_graphics_active_ratio", labels, gpu.graphics_active_ratio)
    samples.add("llmprobe_gpu_sm_active_ratio", labels, gpu.sm_active_ratio)
    samples.add("llmprobe_gpu_tensor_active_ratio", labels, gpu.tensor_active_ratio)
    samples.add("llmprobe_gpu_power_watts", labels, gpu.power_watts)
    samples.add("llmprobe_gpu_sm_clock_hertz", labels, gpu.sm_clock_hertz)
    samples.add("llmprobe_gpu_memory_clock_hertz", labels, gpu.memory_clock_hertz)
    for reason, now in (gpu.throttle_reasons or {}).items():
        if reason in _THROTTLE_REASONS:
            samples.add("llmprobe_gpu_throttle_reason", (*labels, reason), float(now))
    samples.add("llmprobe_gpu_temperature_celsius", labels, gpu.temperature_celsius)
    samples.add("llmprobe_gpu_memory_used_bytes", labels, gpu.memory_used_bytes)
    samples.add("llmprobe_gpu_memory_capacity_bytes", labels, gpu.memory_capacity_bytes)


def _host(samples: Samples, labels: tuple[str, ...], rank: RankView) -> None:
    if rank.armed and not rank.inert:
        samples.add("llmprobe_step_stalled", labels, float(rank.stall is not None))
    totals = rank.host_totals
    if totals is None:
        return
    named = [item for item in totals.cpu_seconds.items() if item[0] != OTHER]
    for thread, seconds in named[:_MOST_THREADS]:
        samples.add("llmprobe_engine_cpu_seconds_total", (*labels, thread), seconds)
    # Names keep their places for life, so what is summed up here never runs backwards.
    rest = totals.cpu_seconds.get(OTHER, 0.0) + sum(seconds for _, seconds in named[_MOST_THREADS:])
    samples.add("llmprobe_engine_cpu_seconds_total", (*labels, OTHER), rest)
    samples.add("llmprobe_engine_run_queue_seconds_total", labels, totals.run_queue_seconds)
    for kind, switches in totals.context_switches.items():
        samples.add("llmprobe_engine_context_switches_total", (*labels, kind), switches)
    for kind, faults in totals.page_faults.items():
        samples.add("llmprobe_engine_page_faults_total", (*labels, kind), faults)


def _memory(
    samples: Samples, labels: tuple[str, ...], rank: RankView, engine: EngineView | None, alone: bool
) -> None:
    samples.add("llmprobe_weights_bytes", labels, rank.weights_bytes)
    samples.add("llmprobe_kv_cache_capacity_bytes", labels, rank.kv_capacity_bytes)
    if engine is None:
        return
    # Every rank of an engine fills the same share of its own part of the KV cache.
    if engine.kv_usage is not None and rank.kv_capacity_bytes is not None:
        samples.add("llmprobe_kv_cache_used_bytes", labels, engine.kv_usage * rank.kv_capacity_bytes)
    elif alone:
        samples.add("llmprobe_kv_cache_used_bytes", labels, engine.kv_used_bytes)


def _health(samples: Samples, labels: tuple[str, ...], rank: RankView, view: ServerView) -> None:
    info = (view.framework, view.framework_version, rank.runner, rank.clock)
    samples.add("llmprobe_hook_armed", labels, float(rank.armed and not rank.inert))
    samples.add("llmprobe_hook_info", (*labels, *info), 1.0)
    samples.add("llmprobe_records_dropped_total", (*labels, "queue"), rank.dropped)
    samples.add("llmprobe_records_dropped_total", (*labels, "overwritten"), rank.lost)
    samples.add("llmprobe_errors_total", (*labels, "step"), rank.errors)
    samples.add("llmprobe_self_seconds_total", (*labels, "step"), rank.own_seconds)
    samples.add("llmprobe_self_seconds_total", (*labels, "thread"), rank.own_thread_seconds)
