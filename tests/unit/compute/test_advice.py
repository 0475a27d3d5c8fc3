"""Advice is complete, names settings that exist, and promises no more than the floor allows."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprobe.cli.app import VERBS
from llmprobe.compute.advice import ENTRIES, Entry, Target, When, advise, advise_pressure, advise_stall
from llmprobe.compute.advice.advise import MOST, setting
from llmprobe.compute.advice.entry import Operation
from llmprobe.compute.advice.gain import GAINS
from llmprobe.compute.classify import classify
from llmprobe.compute.hardware import Peaks
from llmprobe.compute.pressure import KINDS, pressures, worst
from llmprobe.compute.signs import SIGNS
from llmprobe.compute.stall import Bound, Stall
from llmprobe.compute.thresholds import Thresholds
from llmprobe.compute.verdict import BOTTLENECKS, CAUSES, UNKNOWN_CAUSES

from .test_pressure import load, thread
from .verdicts import counters, figures, kernels, seen, verdict

SRC = Path(__file__).resolve().parents[3] / "src/llmprobe"
ABOUT = {"@framework", "@clock", "@phase", "@operator", "@healthy", "@kv_usage", "@waiting"} | {
    *("@measurable", "@batch", "@batch_ratio", "@running", "@running_ratio", "@front_end_wait")
}
#: A stall lies in a step or between two.
WHERE = ("step", "between_steps")
VLLM_FLAGS = {
    "enforce_eager": False,
    "dtype": "bfloat16",
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "async_scheduling": True,
    "kv_cache_dtype": "auto",
    "gpu_memory_utilization": 0.9,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "max_cudagraph_capture_size": 512,
    "enable_prefix_caching": True,
}


def target(**flags: Any) -> Target:
    return Target("vllm-8000", "vllm", {**VLLM_FLAGS, **flags}, 4711)


def findings(observation: Any, **flags: Any) -> list[str]:
    found = classify(observation, Thresholds())
    return [item.finding for item in advise(found, observation.figures, target(**flags))]


def every_verdict() -> list[tuple[str, str | None]]:
    plain = [(name, None) for name in BOTTLENECKS if name not in ("sync_bound", "unknown")]
    waits = [("sync_bound", cause) for cause in CAUSES]
    return plain + waits + [("unknown", cause) for cause in UNKNOWN_CAUSES]


@pytest.mark.parametrize(("bottleneck", "cause"), every_verdict())
@pytest.mark.parametrize("framework", ["vllm", "transformers"])
@pytest.mark.parametrize("clock", ["cuda", "host"])
def test_every_class_and_cause_has_advice_whatever_is_set(
    bottleneck: str, cause: str | None, framework: str, clock: str
) -> None:
    found = advise(verdict(bottleneck, cause, clock=clock), figures(), Target("s", framework, {}))
    assert found
    assert len(found) <= MOST


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pressure_has_advice(kind: str) -> None:
    under = load(
        kv_usage=0.99, waiting=9, running=16, queue_seconds=0.09, preemptions=50, full_steps_ratio=1.0,
        front_end=thread(1.0),
    )  # fmt: skip
    found = worst(pressures(under, Thresholds()))
    assert found[kind].active
    assert advise_pressure(found[kind], under, Target("s", "vllm", {}))


def test_names_are_unique_and_begin_with_the_class() -> None:
    names = [entry.finding for entry in ENTRIES]
    assert len(set(names)) == len(names)
    for entry in ENTRIES:
        assert entry.finding.startswith(f"{entry.bottleneck}.")
        assert entry.bottleneck in {*BOTTLENECKS, "pressure", "stall"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.finding)
def test_entries_are_whole(entry: Entry) -> None:
    causes: dict[str, set[str | None]] = {
        "sync_bound": set(CAUSES),
        "unknown": set(UNKNOWN_CAUSES),
        "pressure": set(KINDS),
        "stall": {*WHERE, None},
    }
    assert {*(entry.causes or (None,))} <= causes.get(entry.bottleneck, {None})
    assert entry.reason.endswith(".")
    assert entry.risk.endswith(".")
    assert entry.gain in {"", *GAINS}
    for condition in entry.when:
        assert condition.operation in get_args(Operation)
        if condition.fact.startswith("@sign."):
            assert condition.fact.removeprefix("@sign.") in SIGNS
        elif condition.fact.startswith("@"):
            assert condition.fact in ABOUT
        else:
            assert condition.fact in recorded_flags()
        if condition.operation in ("above_fact", "doubled_at_most_fact"):
            assert condition.value in recorded_flags()
    if entry.change is not None:  # else what is set would always be "not set"
        assert (entry.change.told_by or entry.change.flag) in recorded_flags()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.finding)
def test_the_next_look_is_a_command_that_exists(entry: Entry) -> None:
    values = {"server": "s", "pid": 1, "core_pid": 2, "pids": "2,1"}
    words = shlex.split(entry.look.format(**values, metrics="http://localhost:8000/metrics"))
    assert words[:2] != ["llmprobe", "status"], "that is where the advice is read"
    if words[0] == "llmprobe":
        VERBS[words[1]].load(words[1]).make_context(words[1], words[2:])  # raises for a wrong option


def test_the_metrics_to_look_at_are_vllm_s() -> None:
    """Patterns like ``vllm:num_requests_`` each match names in the source of the installed vLLM."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(found.origin).parent
    sources = [folder / "v1/metrics/loggers.py", *folder.glob("v1/spec_decode/*.py")]
    names = {name for path in sources for name in re.findall(r'"(vllm:[a-z_]+)"', path.read_text())}
    # As they are exposed: counters and histograms get a suffix.
    exposed = {name + suffix for name in names for suffix in ("", "_total", "_sum", "_count", "_bucket")}
    patterns = {
        match[1] for entry in ENTRIES if (match := re.search(r"grep -E '\^(vllm:[^']+)'", entry.look))
    }
    assert len(patterns) > 5
    # Each alternative by itself, so that one that matches does not hide one that does not.
    for each in {one for pattern in patterns for one in alternatives(pattern)}:
        assert any(name.startswith(each) for name in exposed), each


def alternatives(pattern: str) -> list[str]:
    """What a pattern with groups like ``(a|b)`` stands for."""
    choice = re.search(r"\(([^)]*)\)", pattern)
    if choice is None:
        return [pattern]
    begin, end = pattern[: choice.start()], pattern[choice.end() :]
    return [one for middle in choice[1].split("|") for one in alternatives(begin + middle + end)]


def recorded_flags() -> set[str]:
    """Every flag that a journal may hold, by the hooks' own source."""
    names: set[str] = set()
    for path in ("hooks/vllm/facts.py", "hooks/transformers_model.py"):
        for node in ast.walk(ast.parse((SRC / path).read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "flags":
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Dict):
                        names |= {key.value for key in inner.keys if isinstance(key, ast.Constant)}
    assert "max_num_seqs" in names
    assert "cache_implementation" in names
    return names


def engine_arguments() -> set[str]:
    """The fields of vLLM's EngineArgs, read from its source: importing vLLM takes a minute."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(found.origin).parent / "engine/arg_utils.py").read_text()
    (args,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    of_engine = {
        node.target.id
        for node in args.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return of_engine | serve_arguments(Path(found.origin).parent)


def serve_arguments(vllm: Path) -> set[str]:
    """Those that only ``vllm serve`` has, of which advice knows one."""
    sources = [path.read_text() for path in vllm.glob("entrypoints/**/cli_args.py")]
    return {"api_server_count"} if any('"--api-server-count"' in source for source in sources) else set()


def test_every_vllm_setting_is_one_of_its_arguments() -> None:
    arguments = engine_arguments()
    vllm = [entry for entry in ENTRIES if When("@framework", "is", "vllm") in entry.when and entry.change]
    assert len(vllm) > 15
    for entry in vllm:
        assert entry.change is not None
        assert entry.change.flag in arguments, entry.finding


def test_every_transformers_setting_is_known_to_transformers() -> None:
    generation = importlib.util.find_spec("transformers")
    if generation is None or generation.origin is None:
        pytest.skip("transformers is not installed")
    root = Path(generation.origin).parent
    known = (root / "generation/configuration_utils.py").read_text() + (
        root / "modeling_utils.py"
    ).read_text()
    for entry in ENTRIES:
        if When("@framework", "is", "transformers") in entry.when and entry.change:
            assert entry.change.flag in known, entry.finding


def test_settings_read_as_the_engine_takes_them() -> None:
    assert setting("enforce_eager", False, "vllm") == "--no-enforce-eager"
    assert setting("async_scheduling", True, "vllm") == "--async-scheduling"
    assert setting("max_num_seqs", 512, "vllm") == "--max-num-seqs 512"
    assert setting("compilation_config", '{"cudagraph_mode": "FULL"}', "vllm") == (
        '--compilation-config \'{"cudagraph_mode": "FULL"}\''
    )
    assert setting("cache_implementation", "static", "transformers") == "cache_implementation='static'"


def test_eager_mode_is_what_is_changed_where_it_is_set() -> None:
    eager = seen(figures(mbu=0.17, mfu=0.001), kernels=kernels(0.77))
    assert findings(eager, enforce_eager=True)[0] == "sync_bound.eager"
    assert "sync_bound.eager" not in findings(eager)


def test_the_change_says_what_is_set_now() -> None:
    waits = seen(figures(mbu=0.6, span=6.0, gap=3.0, steps=1000))
    found = advise(classify(waits, Thresholds()), waits.figures, target(async_scheduling=False))
    assert found[0].finding == "sync_bound.async_scheduling"
    assert found[0].change == "--async-scheduling (now: False)"
    assert found[0].gain_seconds == pytest.approx(0.003)
    assert found[0].gain == "at most 3.00 ms of a step's 9.00 ms (33%)"


def test_a_setting_is_not_proposed_where_it_is_in_force() -> None:
    waits = seen(figures(mbu=0.6, span=6.0, gap=3.0))
    assert "sync_bound.async_scheduling" not in findings(waits, async_scheduling=True)
    long_context = seen(figures(mbu=0.7, operator_floors={"attention": (5.0, 0.0), "linear": (1.0, 0.0)}))
    assert "memory_bound.kv_dtype" in findings(long_context)
    assert "memory_bound.kv_dtype" not in findings(long_context, kv_cache_dtype="fp8")


def test_what_vllm_would_refuse_is_not_proposed() -> None:
    waits = seen(figures(mbu=0.6, span=6.0, gap=3.0))
    assert "sync_bound.async_scheduling" in findings(waits, async_scheduling=False)
    assert "sync_bound.async_scheduling" not in findings(
        waits, async_scheduling=False, speculative_method="ngram"
    )
    reads = seen(figures(mbu=0.6))
    assert "memory_bound.quantization" in findings(reads)
    for quantised in ("awq", "fp8", "compressed-tensors"):
        assert "memory_bound.quantization" not in findings(reads, quantization=quantised)
    assert "memory_bound.speculation" in findings(reads)
    assert "memory_bound.speculation" not in findings(reads, speculative_method="eagle3")


@settings(deadline=None)
@given(
    st.sampled_from(every_verdict()),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.floats(0, 1),
)
def test_no_more_sequences_are_proposed_than_tokens_fit_into_a_step(
    judged: tuple[str, str | None], seqs: int, tokens: int, batch: int, kv_usage: float
) -> None:
    """vLLM: "max_num_batched_tokens must be greater than or equal to max_num_seqs"."""
    on = target(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    found = [*advise(verdict(*judged), figures(decode_tokens=1000 * batch), on)]
    under = load(running=seqs, waiting=9, kv_usage=kv_usage, queue_seconds=0.09, max_num_seqs=seqs)
    for pressed in pressures(under, Thresholds()):
        found += advise_pressure(pressed, under, on)
    for item in found:
        if item.flag == "max_num_seqs" and item.proposed > seqs:
            assert item.proposed <= tokens
        if item.flag == "max_num_batched_tokens":
            assert item.proposed >= tokens


def test_more_sequences_are_proposed_where_they_fit() -> None:
    under = load(running=256, waiting=9, kv_usage=0.2, queue_seconds=0.09, max_num_seqs=256)
    found = worst(pressures(under, Thresholds()))
    for tokens, proposed in ((256, []), (511, []), (512, [512])):
        on = target(max_num_seqs=256, max_num_batched_tokens=tokens)
        for kind in ("queue", "sequence_limit"):
            advice = advise_pressure(found[kind], under, on)
            assert advice
            assert [item.proposed for item in advice if item.flag == "max_num_seqs"] == proposed


def test_the_gain_is_the_wait_that_the_reason_tells() -> None:
    """Something ran for 1.6 ms of each gap; a counter alone saw bubbles; nothing but the clock."""
    looked = seen(figures(span=6.0, gap=4.0), kernels=kernels(0.0, gap_busy_seconds=1.6e-3))
    counted = seen(figures(mbu=0.2, mfu=0.01), counters=counters(0.15, 0.0, graphics_active_ratio=0.4))
    between = seen(figures(span=6.0, gap=3.0))
    for observation, milliseconds in ((looked, 2.4), (counted, 5.0), (between, 3.0)):
        found = classify(observation, Thresholds())
        assert f"({milliseconds:.2f} ms a step)" in found.reason
        (first, *_) = advise(found, observation.figures, target(enforce_eager=True, async_scheduling=False))
        assert first.gain_seconds == pytest.approx(milliseconds / 1e3, abs=1e-5)


def test_larger_graphs_are_for_batches_beyond_them() -> None:
    small = seen(figures(mbu=0.17, mfu=0.001), kernels=kernels(0.77))
    large = seen(figures(mbu=0.17, mfu=0.001, decode_tokens=600_000), kernels=kernels(0.77))
    assert "sync_bound.graphs_too_small" not in findings(small, max_num_seqs=1024)
    assert "sync_bound.graphs_too_small" in findings(large, max_num_seqs=1024)
    assert "sync_bound.graphs_too_small" not in findings(large, speculative_method="eagle3"), "drafts count"


def test_a_limit_is_advised_upon_only_where_the_load_reaches_it() -> None:
    alone = {"steps": 1000, "decode_tokens": 1000}
    full = {"steps": 1000, "decode_tokens": 250_000}
    for load_, reads, waits in ((alone, "more_requests", False), (full, "batch", True)):
        memory = findings(seen(figures(mbu=0.67, mfu=0.003, **load_)))
        assert [name for name in memory if "batch" in name or "requests" in name] == [f"memory_bound.{reads}"]
        host = findings(seen(figures(mbu=0.3, mfu=0.001, span=5, gap=5, **load_)))
        assert ("sync_bound.host_larger_batches" in host) is waits
    (more,) = (
        item
        for item in advise(
            verdict("memory_bound", None),
            figures(mbu=0.67, mfu=0.003, operator_floors={"linear": (6.0, 0.1)}),
            target(),
        )
        if item.finding == "memory_bound.more_requests"
    )
    assert more.flag is None
    assert more.gain_throughput is not None, "what it could gain is still told"


def test_a_queue_below_the_limit_is_not_blamed_on_it() -> None:
    for running, named in ((3, False), (250, True)):
        under = load(kv_usage=0.2, waiting=9, running=running, queue_seconds=0.09, max_num_seqs=256)
        found = worst(pressures(under, Thresholds()))["queue"]
        names = [item.finding for item in advise_pressure(found, under, target())]
        assert ("pressure.queue.batch" in names) is named


def test_a_front_end_is_helped_by_what_its_server_has() -> None:
    def found(waited: float | None = 0.0, **flags: Any) -> list[str]:
        under = load(front_end=thread(0.99 - (waited or 0.0), waited))
        pressed = worst(pressures(under, Thresholds()))["front_end"]
        return [
            item.change or item.finding.rpartition(".")[2]
            for item in advise_pressure(pressed, under, target(**flags))
        ]

    assert found(api_server_count=1, stream_interval=1) == [
        "--api-server-count 2 (now: 1)",
        "--stream-interval 10 (now: 1)",
        "work",
    ]
    assert found(api_server_count=4, stream_interval=10) == ["--api-server-count 8 (now: 4)", "work"]
    assert found(stream_interval=1) == ["work"], "a program that uses vllm.LLM has no servers, and no streams"
    assert found(0.3) == ["crowded", "work"]
    # More processes would wait for the same cores.
    assert found(0.3, api_server_count=1, stream_interval=1) == [
        "crowded",
        "--stream-interval 10 (now: 1)",
        "work",
    ]
    assert found(None, api_server_count=1) == ["--api-server-count 2 (now: 1)", "work"], "no schedstat"


def test_where_tokens_wait_in_the_front_end_nobody_says_that_its_thread_is_full() -> None:
    """Two threads that wait for each other's interpreter lock are each busy for a part of the time."""
    under = load(front_end=thread(0.5), output_lag_seconds=0.4)
    pressed = worst(pressures(under, Thresholds()))["front_end"]
    assert pressed.high
    (work,) = advise_pressure(pressed, under, target())
    assert work.finding == "pressure.front_end.work"
    assert "no time left" not in work.reason


def test_a_setting_that_another_fact_tells_is_shown_by_it() -> None:
    bubbles = seen(figures(mbu=0.17, mfu=0.001), kernels=kernels(0.77))
    found = advise(
        classify(bubbles, Thresholds()), bubbles.figures, target(cudagraph_mode="NONE", max_num_seqs=8)
    )
    (changed,) = (item for item in found if item.finding == "sync_bound.no_graphs")
    assert changed.change.endswith("(now: cudagraph_mode NONE)")


def test_on_a_cpu_nothing_is_proposed_that_only_a_gpu_has() -> None:
    under = load(kv_usage=0.99, waiting=9)
    (pressed,) = (found for found in pressures(under, Thresholds()) if found.kind == "kv_cache")
    on = {
        clock: advise_pressure(pressed, under, Target("s", "vllm", VLLM_FLAGS, clock=clock))
        for clock in ("cuda", "host")
    }
    waits = figures(span=6.0, gap=3.0)
    scheduled = {clock: findings(seen(waits, clock=clock), async_scheduling=False) for clock in on}
    assert ["sync_bound.async_scheduling" in scheduled[clock] for clock in ("cuda", "host")] == [True, False]
    assert {item.flag for item in on["cuda"]} >= {"kv_cache_dtype", "gpu_memory_utilization"}
    assert not {item.flag for item in on["host"]} & {"kv_cache_dtype", "gpu_memory_utilization"}


def test_fp32_weights_are_the_first_thing_to_change_in_prefill() -> None:
    slow = Peaks(3352e9, 66.9e12, "float32", "nominal", "made for this test")
    prefill = seen(figures(mbu=0.05, mfu=0.6), phase="prefill", peaks=slow)
    assert not classify(prefill, Thresholds()).healthy
    assert findings(prefill, dtype="float32")[0] == "compute_bound.dtype"


def test_on_a_processor_16_bit_products_are_no_advice_where_compute_binds() -> None:
    """Whether they are faster there depends on the processor: calibrate has seen them 26 times slower."""
    slow = Peaks(12e9, 35e9, "float32", "calibrated", "made for this test")
    for clock, proposed in (("cuda", True), ("host", False)):
        prefill = seen(figures(mbu=0.05, mfu=0.6), phase="prefill", peaks=slow, clock=clock)
        found = findings(prefill, dtype="float32")
        assert "compute_bound.less_work" in found
        assert ("compute_bound.dtype" in found) is proposed


def test_host_signals_come_before_settings() -> None:
    throttled = verdict("sync_bound", "host_between_steps", signs=("throttled",))
    assert advise(throttled, figures(), target())[0].finding == "sync_bound.throttled"


@pytest.mark.parametrize(
    ("cause", "sign"),
    [
        *itertools.product(
            ("host_between_steps", "sampling"), sorted({*SIGNS} - {"thread_busy", "numa_spread"})
        ),
        # What else it costs the worker shows as its wait for a core.
        *itertools.product(("launch_bubbles",), ("throttled", "run_queue", "memory_pressure")),
    ],
)
def test_what_explains_a_wait_for_the_host_is_advised_upon(cause: str, sign: str) -> None:
    """A quota stopped an engine for two thirds of the time, most of it before sampling: none was offered."""
    explained, plain = (
        {item.finding for item in advise(verdict("sync_bound", cause, signs=signs), figures(), target())}
        for signs in ((sign,), ())
    )
    assert explained - plain


def test_who_waits_for_a_core_between_steps_is_who_schedules() -> None:
    """vLLM's workers often have processes of their own: the thread that the reason names is not in theirs."""
    crowded = verdict("sync_bound", "host_between_steps", signs=("run_queue", "involuntary_switches"))
    apart, alone = dataclasses.replace(target(), core_pid=4242), target()
    for on, looks in (
        (apart, ["taskset -pc 4242 && uptime", "pidstat -w -t -p 4242,4711 1 5"]),
        (alone, ["taskset -pc 4711 && uptime", "pidstat -w -t -p 4711 1 5"]),
    ):
        assert [item.look for item in advise(crowded, figures(), on)][:2] == looks
    inside = verdict("sync_bound", "launch_bubbles", signs=("run_queue",))
    assert "taskset -pc 4711 && uptime" in [item.look for item in advise(inside, figures(), apart)]


@pytest.mark.parametrize(("running", "proposed"), [(200, 128), (40, 40), (1, 1), (0, None), (None, None)])
def test_a_limit_that_nobody_comes_near_is_lowered_to_what_runs(
    running: int | None, proposed: int | None
) -> None:
    under = load(running=running, waiting=9, preemptions=50, max_num_seqs=256)
    found = worst(pressures(under, Thresholds()))["preemption"]
    limits = [item.proposed for item in advise_pressure(found, under, target()) if item.flag]
    assert limits == ([] if proposed is None else [proposed])


def test_healthy_is_said_to_be_healthy() -> None:
    found = advise(verdict("memory_bound", healthy=True), figures(mbu=0.8), target())
    assert found[0].reason.startswith("Healthy:")
    assert not any(
        item.reason.startswith("Healthy") for item in advise(verdict("memory_bound"), figures(), target())
    )


def test_the_next_look_names_the_server_and_its_process() -> None:
    changed = Target("a b", "vllm", {}, 4711)
    (found, *_) = advise(verdict("unknown", "no_kernel_windows"), figures(), changed)
    assert found.look == "llmprobe capture 'a b' --tool kernels --seconds 2"
    busy = verdict("sync_bound", "host_between_steps", signs=("thread_busy",))
    assert "top -H -p 4711" in [item.look for item in advise(busy, figures(), target(async_scheduling=True))]


def test_a_cache_that_was_full_a_moment_ago_has_no_room_for_more_sequences() -> None:
    """It is emptied by those that it makes wait, which say that it was full."""
    for peak, finding in ((0.7, "pressure.queue.batch"), (0.99, "pressure.queue.more")):
        under = load(kv_usage=0.7, kv_peak=peak, waiting=9, running=256, queue_seconds=0.09)
        found = worst(pressures(under, Thresholds()))
        advice = advise_pressure(found["queue"], under, target())
        assert advice[0].finding == finding


def test_the_next_look_knows_where_a_server_serves_its_metrics() -> None:
    under = load(kv_usage=0.99, waiting=9)
    (pressed,) = (found for found in pressures(under, Thresholds()) if found.kind == "kv_cache")

    def look(server: str, running: bool = True) -> str:
        on = Target(server, "vllm", VLLM_FLAGS, 4711, running=running, clock="cuda")
        return advise_pressure(pressed, under, on)[0].look

    assert look("vllm-8123").startswith("curl -s http://localhost:8123/metrics | grep -E '^vllm:(kv_cache")
    assert look("mine").startswith("curl -s http://HOST:PORT/metrics | ")
    assert look("vllm-8123", running=False) == "llmprobe run -- COMMAND"


def test_after_a_run_nobody_is_sent_to_a_process_that_ended() -> None:
    busy = verdict("sync_bound", "host_between_steps", signs=("thread_busy", "run_queue"))
    ended = Target("vllm-8000", "vllm", {**VLLM_FLAGS, "async_scheduling": False}, 4711, running=False)
    looks = {item.finding: item.look for item in advise(busy, figures(), ended)}
    # A capture is what nsys is for; to see who else wants a core takes no more than another run.
    assert looks["sync_bound.async_scheduling"] == "llmprobe run --nsys -- COMMAND"
    assert looks["sync_bound.crowded"] == "llmprobe run -- COMMAND"
    assert set(looks.values()) == {"llmprobe run --nsys -- COMMAND", "llmprobe run -- COMMAND"}
    under = load(kv_usage=0.99, waiting=9, running=16, front_end=thread(1.0))
    found = worst(pressures(under, Thresholds()))
    ended = dataclasses.replace(ended, flags={**VLLM_FLAGS, "kv_cache_dtype": "fp8", "api_server_count": 1})
    for kind in ("kv_cache", "front_end"):  # its memory is free again, and its threads are gone
        looks = [item.look for item in advise_pressure(found[kind], under, ended)]
        assert set(looks) == {"llmprobe run -- COMMAND"}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("framework", ["vllm", "transformers"])
@pytest.mark.parametrize("clock", ["cuda", "host"])
def test_a_stall_has_advice_of_its_own(where: Any, framework: str, clock: str) -> None:
    hang = Stall(where, 0, 33.0, Bound(10.0, "a reason"), 12, "decode", 4, ())
    found = advise_stall(hang, Target("vllm-8000", framework, {"tensor_parallel_size": 2}, 4711, clock=clock))
    assert "py-spy" in found[0].look
    assert ("readlink /proc/4711/fd/2" in [item.look for item in found]) or len(found) == MOST
    assert ("dmesg -T | grep -i xid" in [item.look for item in found]) is (
        where == "step" and clock == "cuda"
    )
    assert not any(item.change for item in found), "no setting makes a step end"


@settings(deadline=None)
@given(
    st.sampled_from(every_verdict()),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 30),
    st.sampled_from(["prefill", "decode", "mixed"]),
    st.booleans(),
)
def test_no_gain_is_larger_than_the_step(
    judged: tuple[str, str | None], mbu: float, mfu: float, gap: float, phase: str, healthy: bool
) -> None:
    found = figures(mbu=mbu, mfu=mfu, gap=gap)
    step = found.seconds / found.steps
    waits = {judged[1]: gap / found.steps} if judged[0] == "sync_bound" and judged[1] else {}
    said = verdict(*judged, phase=phase, healthy=healthy, headroom_seconds=step / 2, wait_seconds=waits)
    for item in advise(said, found, target(dtype="float32")):
        assert item.gain_seconds is None or 0 < item.gain_seconds <= step
        assert item.gain_throughput is None or 1 < item.gain_throughput <= 2
        assert not item.change or item.proposed != item.current
