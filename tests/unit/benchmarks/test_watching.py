"""A label held against what was said."""

from __future__ import annotations

from typing import Any

from support.labels import Label
from support.watching import Said, Trace, score, unchanged_seconds

MEMORY = Label(("memory_bound",), "a rule", True)
HOST = Label(("sync_bound",), "a rule", True, "host_between_steps")


def verdict(
    bottleneck: str, cause: str | None = None, confidence: float = 0.8, *shown: str
) -> dict[str, Any]:
    evidence = [{"quantity": name} for name in shown]
    return {"bottleneck": bottleneck, "cause": cause, "confidence": confidence, "evidence": evidence}


def trace(*looks: tuple[int, dict[str, Any]], advice: tuple[str, ...] = ()) -> Trace:
    """Looks one second apart: so many of each, of decode."""
    said: list[Said] = []
    for count, item in looks:
        said += [
            Said(len(said) + 1.0 + n, {"decode": item}, "", {}, {"decode": advice}) for n in range(count)
        ]
    return Trace(said)


def test_right_soon_and_steady() -> None:
    found = score(trace((6, verdict("unknown")), (70, verdict("memory_bound"))), MEMORY, "decode", {})
    assert (found.right_after, found.flips, found.steady_seconds, found.faults) == (7.0, 0, 69.0, ())


def test_a_load_that_takes_time_to_be_steady_is_given_it() -> None:
    looks = trace((18, verdict("unknown")), (40, verdict("memory_bound")))
    assert score(looks, MEMORY, "decode", {}).faults == ("right only after 19 s",)
    found = score(looks, MEMORY, "decode", {}, steady_at=5.0)
    assert (found.right_after, found.steady_seconds, found.faults) == (14.0, 39.0, ())


def test_another_phase_does_not_speak_for_the_one_that_is_judged() -> None:
    found = score(trace((70, verdict("memory_bound"))), MEMORY, "prefill", {"decode": "memory_bound"})
    assert (found.last, found.faults) == ({}, ("never right",))


def test_a_flip_counts_both_ways_and_late_is_a_fault() -> None:
    looks = trace(
        (16, verdict("unknown")), (10, verdict("memory_bound")), (2, verdict("unknown")),
        (10, verdict("memory_bound")),
    )  # fmt: skip
    assert score(looks, MEMORY, "decode", {}).faults == ("right only after 17 s", "2 flips")


def test_how_long_a_verdict_has_stood() -> None:
    looks = trace((16, verdict("memory_bound")), (3, verdict("unknown")), (10, verdict("memory_bound")))
    assert unchanged_seconds(looks, "decode") == 9.0
    assert unchanged_seconds(looks, "prefill") == 28.0  # nothing was ever said of it
    assert unchanged_seconds(Trace(), None) == 0.0


def test_a_change_may_show_the_old_class_or_none_and_never_a_third() -> None:
    change = trace(
        (5, verdict("memory_bound")), (3, verdict("unknown")), (20, verdict("sync_bound", HOST.cause))
    )
    assert score(change, HOST, "decode", {"decode": "memory_bound"}).faults == ()
    found = score(change, HOST, "decode", {"decode": "inefficient_kernels"})
    assert found.third == tuple(f"decode memory_bound at {second} s" for second in range(1, 6))


def test_a_wrong_class_is_a_failure_when_it_is_sure_of_itself() -> None:
    unsure = score(
        trace((30, verdict("compute_bound", confidence=0.5))), MEMORY, None, {"decode": "compute_bound"}
    )
    assert (unsure.wrong, unsure.faults) == (None, ("never right",))
    sure = score(
        trace((30, verdict("compute_bound", confidence=0.51))), MEMORY, None, {"decode": "compute_bound"}
    )
    assert sure.wrong is not None and sure.wrong.startswith("decode compute_bound (0.51)")


def test_evidence_that_a_label_asks_for_has_to_be_shown() -> None:
    starved = Label(("sync_bound",), "a rule", True, evidence=("host_run_queue", "host_involuntary_switches"))
    shown = verdict("sync_bound", "host_between_steps", 0.8, "sync_gap_ratio", "host_run_queue")
    silent = verdict("sync_bound", "host_between_steps", 0.8, "sync_gap_ratio")
    assert score(trace((30, shown)), starved, "decode", {}).faults == ()
    without = score(trace((30, silent)), starved, "decode", {})
    assert (without.wrong, without.faults) == (None, ("never right",))


def test_so_has_advice() -> None:
    label = Label(("compute_bound",), "a rule", True, advice="compute_bound.dtype")
    looks = (30, verdict("compute_bound"))
    assert score(trace(looks, advice=("compute_bound.dtype",)), label, "decode", {}).faults == ()
    assert score(trace(looks, advice=("compute_bound.healthy",)), label, "decode", {}).faults == (
        "never right",
    )


def test_prompts_are_counted_once_the_load_is_steady() -> None:
    engine = [{"at": second, "prompts": 0.0 if second < 5 else 1000.0 * second} for second in range(10)]
    assert Trace([], engine).prompt_tokens_per_second(5.0) == 1000.0
    assert Trace([], engine[:6]).prompt_tokens_per_second(5.0) == 0.0
