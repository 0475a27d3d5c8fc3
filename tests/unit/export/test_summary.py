"""Views become JSON that says what is not known."""

from __future__ import annotations

import json
import math

import numpy as np

from llmprobe.export.summary import SCHEMA_VERSION, plain, summarize

from .views_for_tests import engine, figures, rank, server


def test_it_is_strict_json_with_a_schema_version() -> None:
    view = server(ranks=[rank(facts={"odd": np.int64(3), "nan": math.nan}, figures={"decode": figures()})])
    status = json.loads(json.dumps(summarize([view]), allow_nan=False))
    assert status["schema_version"] == SCHEMA_VERSION == 1
    assert status["servers"][0]["ranks"][0]["facts"] == {"odd": 3, "nan": None}


def test_figures_are_found_by_rank_and_phase() -> None:
    (shown,) = summarize([server()])["servers"]
    assert shown["ranks"][0]["figures"]["decode"]["mbu_step"] == 0.4
    assert shown["ranks"][0]["peaks"]["source"] == "nominal"
    assert shown["ranks"][0]["peaks"]["ridge_flops_per_byte"] == 989.4e12 / 3352e9
    assert shown["engines"][0]["recent_latency"]["time_to_first_token"]["p50"] == 0.02
    assert shown["engines"][0]["latency_counts"]["request_queue"] == 3


def test_unknown_is_null_and_missing_says_why() -> None:
    (shown,) = summarize([server(engines=[engine(requests_running=None)], ranks=[rank(peaks=None)])])[
        "servers"
    ]
    assert shown["engines"][0]["requests_running"] is None
    assert shown["ranks"][0]["peaks"] is None
    assert "kernel windows" in shown["missing"]["launch_gap"]


def test_histograms_and_single_steps_are_left_out() -> None:
    (shown,) = summarize([server()])["servers"]
    assert "latency" not in shown["engines"][0]
    assert not {"step_duration", "recent"} & set(shown["ranks"][0])


def test_plain_takes_what_json_lacks() -> None:
    assert plain({1: (np.float32(0.5), math.inf, {2})}) == {"1": [0.5, None, [2]]}
