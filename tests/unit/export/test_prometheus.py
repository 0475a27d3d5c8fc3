"""Views become the samples that Prometheus expects."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from llmprobe.compute.stall import Bound, Stall
from llmprobe.export.catalogue import FAMILIES
from llmprobe.export.prometheus import ViewCollector, expose

from .views_for_tests import engine, figures, histogram, rank, server


def samples(*views: object) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(expose(views).decode())  # type: ignore[arg-type]
        for sample in family.samples
    }


def value(shown: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    (found,) = [v for (n, held), v in shown.items() if n == name and set(labels.items()) <= held]
    return found


def names(*views: object) -> set[str]:
    return {name for name, _ in samples(*views)}


def test_labels_name_server_model_engine_and_rank() -> None:
    shown = samples(server("a", ranks=[rank(engine=1, rank=3)]))
    assert (
        value(shown, "llmprobe_weights_bytes", server="a", model_name="a/model", engine="1", rank="3") == 2e9
    )


def test_what_is_not_known_is_absent() -> None:
    unknown = figures(
        mbu_step=None, mbu_busy=None, mfu_step=None, mfu_busy=None, sync_gap_ratio=None, intensity=None
    )
    shown = names(
        server(
            engines=[engine(requests_running=None, requests_waiting=None, kv_usage=None, kv_used_bytes=None)],
            ranks=[rank(figures={"decode": unknown}, peaks=None, weights_bytes=None, kv_capacity_bytes=None)],
        )
    )
    assert not shown & {
        "llmprobe_mbu_ratio",
        "llmprobe_mfu_ratio",
        "llmprobe_sync_gap_ratio",
        "llmprobe_arithmetic_intensity_flops_per_byte",
        "llmprobe_peak_bandwidth_bytes_per_second",
        "llmprobe_ridge_flops_per_byte",
        "llmprobe_weights_bytes",
        "llmprobe_kv_cache_capacity_bytes",
        "llmprobe_kv_cache_used_bytes",
        "llmprobe_requests_running",
        "llmprobe_requests_waiting",
    }
    assert "llmprobe_device_time_seconds_total" in shown


def test_a_figure_that_is_not_a_number_is_absent() -> None:
    shown = names(server(ranks=[rank(figures={"decode": figures(mbu_step=math.nan, mbu_busy=math.nan)})]))
    assert "llmprobe_mbu_ratio" not in shown


def test_zero_requests_are_shown_as_zero() -> None:
    shown = samples(server(engines=[engine(requests_running=0)]))
    assert value(shown, "llmprobe_requests_running") == 0


def test_components_that_only_kernels_tell_apart_are_absent_while_zero() -> None:
    times = {"decode": {"floor_memory": 1.0, "host_gap": 0.0, "launch_gap": 0.0, "no_work": 0.0}}
    shown = {
        dict(labels)["component"]
        for name, labels in samples(server(ranks=[rank(device_time=times)]))
        if name == "llmprobe_device_time_seconds_total"
    }
    assert shown == {"floor_memory", "host_gap"}


def test_kv_use_of_a_rank_is_its_share_of_the_engines_use() -> None:
    shown = samples(
        server(engines=[engine(kv_usage=0.5)], ranks=[rank(), rank(rank=1, kv_capacity_bytes=6_000_000_000)])
    )
    assert value(shown, "llmprobe_kv_cache_used_bytes", rank="0") == 4e9
    assert value(shown, "llmprobe_kv_cache_used_bytes", rank="1") == 3e9


def test_kv_use_without_a_capacity_needs_a_single_rank() -> None:
    known = engine(kv_usage=None, kv_used_bytes=123)
    alone = rank(kv_capacity_bytes=None)
    assert value(samples(server(engines=[known], ranks=[alone])), "llmprobe_kv_cache_used_bytes") == 123
    two = server(engines=[known], ranks=[alone, rank(rank=1, kv_capacity_bytes=None)])
    assert "llmprobe_kv_cache_used_bytes" not in names(two)


def test_lost_records_are_told_from_dropped_ones() -> None:
    shown = samples(server())
    assert value(shown, "llmprobe_records_dropped_total", reason="queue") == 2
    assert value(shown, "llmprobe_records_dropped_total", reason="overwritten") == 3


def test_an_inert_probe_is_not_armed() -> None:
    assert value(samples(server(ranks=[rank(inert=True)])), "llmprobe_hook_armed") == 0


def test_figures_that_are_missing_are_said_to_be() -> None:
    shown = samples(server(missing={"mbu_ratio": "why"}))
    assert value(shown, "llmprobe_figure_available", figure="mbu_ratio") == 0
    assert value(shown, "llmprobe_figure_available", figure="sync_gap_ratio") == 1


def test_one_servers_text_holds_nothing_of_another() -> None:
    text = expose([server("a")]).decode()
    assert 'server="a"' in text
    assert "build_info" not in text
    assert len(expose([server("a"), server("b")])) > len(text)


def test_hostile_label_values_stay_inside_their_quotes() -> None:
    name = 'a"} 1\nllmprobe_evil 1\n'
    shown = samples(server(model_name=name))
    assert "llmprobe_evil" not in {metric for metric, _ in shown}
    assert value(shown, "llmprobe_weights_bytes", model_name=name) == 2e9


def test_openmetrics_reads_it_too() -> None:
    registry = CollectorRegistry(auto_describe=False)
    ended = {("nsys", "done"): 1}
    registry.register(ViewCollector(lambda: [server()], version="1", captures=lambda: ended))
    families = list(parse_openmetrics(openmetrics.generate_latest(registry).decode()))
    assert len(families) == len(FAMILIES)


def test_registering_asks_for_no_views() -> None:
    def views() -> list[object]:
        raise AssertionError("asked")

    CollectorRegistry(auto_describe=True).register(ViewCollector(views))  # type: ignore[arg-type]


@given(st.lists(st.floats(1e-6, 2000), max_size=60))
def test_histograms_lose_nothing_and_count_nothing_too_low(seconds: list[float]) -> None:
    view = server(engines=[engine(latency={"time_to_first_token": histogram(*seconds)})], ranks=[])
    name = "llmprobe_time_to_first_token_seconds"
    shown = {
        dict(labels).get("le", ""): count
        for (metric, labels), count in samples(view).items()
        if name in metric
    }
    buckets = [shown[le] for le in sorted((le for le in shown if le), key=float)]
    assert buckets == sorted(buckets)
    assert buckets[-1] == len(seconds)
    for bound, count in ((le, shown[le]) for le in shown if le not in ("", "+Inf")):
        assert count <= np.count_nonzero(np.array(seconds) <= float(bound) * (1 + 1e-9))


def test_cpu_time_of_threads_beyond_the_first_few_is_summed_up() -> None:
    shown = samples(server())
    name = "llmprobe_engine_cpu_seconds_total"
    assert value(shown, name, thread="main") == 9
    assert value(shown, name, thread="name1") == 1.5
    assert value(shown, name, thread="other") == 0.5 + 4 * 1.5
    assert sum(seconds for (metric, _), seconds in shown.items() if metric == name) == 9 + 6 * 1.5 + 0.5


def test_the_class_a_phase_is_in_is_1_and_the_others_are_0() -> None:
    shown = samples(server())
    assert value(shown, "llmprobe_bottleneck", phase="decode", bottleneck="memory_bound") == 1
    assert value(shown, "llmprobe_bottleneck", phase="decode", bottleneck="sync_bound") == 0
    seconds = value(
        shown, "llmprobe_bottleneck_seconds_total", phase="decode", bottleneck="unknown", cause="changing"
    )
    assert seconds == 3


def test_a_server_that_is_off_has_no_verdict() -> None:
    shown = names(server(verdicts={}, pressure={}, bottleneck_seconds={}))
    assert not {name for name in shown if "bottleneck" in name or "pressure" in name}


def test_a_stalled_rank_is_shown_as_1() -> None:
    stall = Stall("step", 0, 40.0, Bound(10.0, "made up"), 7, "decode", 4, ())
    assert value(samples(server(ranks=[rank(stall=stall)])), "llmprobe_step_stalled") == 1
    assert value(samples(server()), "llmprobe_step_stalled") == 0


def test_what_llmprobe_itself_takes_is_told_by_where() -> None:
    shown = samples(server())
    taken = {
        where: value(shown, "llmprobe_self_seconds_total", where=where)
        for where in ("step", "thread", "frontend", "frontend_thread")
    }
    assert taken == {"step": 0.125, "thread": 0.0625, "frontend": 0.25, "frontend_thread": 0.5}
