"""A scripted schedule on a real vLLM: what each step worked on, to the token."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from engine import (
    Load,
    Steps,
    complete,
    get_json,
    metrics,
    phases,
    post,
    readers,
    stream,
    tokens,
    until,
    value,
)

from llmprobe.demo.server import VllmServer

pytestmark = pytest.mark.integration


@pytest.fixture
def steps(server: VllmServer) -> Steps:
    found = Steps(server)
    found.forget()
    return found


def test_a_lone_prompt_is_one_prefill_step(server: VllmServer, steps: Steps) -> None:
    complete(server, tokens(1, 40), 1)
    found = steps.take(lambda rows: len(rows) >= 1)
    assert phases(found) == ["prefill"]
    assert (found["prompt_tokens"][0], found["decode_tokens"][0], found["sampled"][0]) == (40, 0, 1)
    assert found["context_prefill"][0][0] == 40
    assert found["pairs_prefill"][0][0] == 40 * 41 // 2


def test_decodes_follow_one_a_token_with_a_growing_context(server: VllmServer, steps: Steps) -> None:
    complete(server, tokens(2, 30), 10)
    found = steps.take(lambda rows: len(rows) >= 10)
    assert phases(found) == ["prefill"] + ["decode"] * 9
    assert found["decode_tokens"].tolist() == [0] + [1] * 9
    assert found["context_decode"][1:, 0].tolist() == list(range(31, 40))
    assert (found["e0"] <= found["e1"]).all()
    assert (found["e1"] <= found["e2"]).all()
    assert (found["e2"] <= found["e3"]).all()
    assert (found["e3"][:-1] <= found["e0"][1:]).all()


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_once(server: VllmServer, steps: Steps) -> None:
    complete(server, tokens(3, 600), 1)
    found = steps.take(lambda rows: rows["prompt_tokens"].sum() >= 600)
    assert phases(found) == ["prefill"] * 3
    assert found["prompt_tokens"].tolist() == [256, 256, 88]
    assert found["sampled"].tolist() == [0, 0, 1]
    assert found["pairs_prefill"][:, 0].sum() == 600 * 601 // 2


def test_a_prefix_cache_hit_computes_the_rest_only(server: VllmServer, steps: Steps) -> None:
    prompt = tokens(4, 250)
    complete(server, prompt, 1)
    first = steps.take(lambda rows: len(rows) >= 1)
    again = complete(server, [*prompt, *tokens(5, 6)], 1)
    second = steps.take(lambda rows: len(rows) >= 1)
    assert first["prompt_tokens"].sum() == 250
    assert again["usage"]["prompt_tokens"] == 256
    computed = int(second["prompt_tokens"].sum())
    assert 6 <= computed < 256
    assert (256 - computed) % 16 == 0  # whole blocks were reused
    assert phases(second) == ["prefill"]
    assert second["context_prefill"][0][0] == 256  # cached keys are read all the same


def test_a_prompt_among_decodes_is_mixed(server: VllmServer, steps: Steps) -> None:
    with stream(server, tokens(6, 20), 300) as running:
        running.readline()
        complete(server, tokens(7, 50), 2)
        while running.readline():
            pass
    found = steps.take(lambda rows: rows["decode_tokens"].sum() >= 300)
    mixed = found[found["phase"] == 2]
    assert len(mixed) == 1
    assert (mixed["prompt_tokens"][0], mixed["decode_tokens"][0]) == (50, 1)
    assert (mixed["requests"][0], mixed["prefill_requests"][0], mixed["sampled"][0]) == (2, 1, 2)
    assert set(phases(found)) == {"prefill", "decode", "mixed"}
    assert found["prompt_tokens"].sum() == 70
    assert found["decode_tokens"].sum() == 299 + 1


def test_an_abort_ends_the_steps_and_is_counted(server: VllmServer, steps: Steps) -> None:
    front = next(iter(readers(server.directory, "frontend")))
    before = front.counters()
    running = stream(server, tokens(8, 20), 1500)
    for _ in range(10):
        running.readline()
    running.close()
    until(lambda: front.counters()["requests_aborted"] == before["requests_aborted"] + 1, "the abort")
    until(lambda: front.read().pending[-1:]["unfinished"].tolist() == [0], "the end of pending work")
    steps.forget()
    complete(server, tokens(9, 10), 2)
    assert phases(steps.take(lambda rows: len(rows) >= 2)) == ["prefill", "decode"]


def test_parallel_requests_are_all_counted(server: VllmServer, steps: Steps) -> None:
    front = next(iter(readers(server.directory, "frontend")))
    before = front.counters()
    threads = [
        threading.Thread(target=complete, args=(server, tokens(20 + n, 15 + n), 12)) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = front.counters()
    assert after["requests"] - before["requests"] == 12
    assert after["prompt_tokens"] - before["prompt_tokens"] == sum(15 + n for n in range(12))
    assert after["generated_tokens"] - before["generated_tokens"] == 12 * 12
    found = steps.take(lambda rows: rows["decode_tokens"].sum() >= 12 * 11)
    assert found["prompt_tokens"].sum() == sum(15 + n for n in range(12))
    assert found["sampled"].sum() == 12 * 12


def test_how_long_outputs_wait_in_the_front_end_is_told(server: VllmServer) -> None:
    front = next(iter(readers(server.directory, "frontend")))

    def known() -> tuple[int, int]:
        return int(front.histogram("output_lag").sum()), front.counters()["sum_ns_output_lag"]

    before = known()
    asked = time.monotonic_ns()
    complete(server, tokens(32, 20), 8)
    took = time.monotonic_ns() - asked
    until(lambda: known()[0] >= before[0] + 8, "what each of eight iterations waited")
    count, lag = (now - then for now, then in zip(known(), before, strict=True))
    assert 0 < lag < count * took  # each is a part of the request


def test_a_first_token_counts_once_and_before_its_client_has_the_answer(server: VllmServer) -> None:
    front = next(iter(readers(server.directory, "frontend")))

    def known() -> tuple[int, int]:
        return int(front.histogram("time_to_first_token").sum()), front.counters()[
            "sum_ns_time_to_first_token"
        ]

    def more(before: tuple[int, int]) -> int:
        """Nanoseconds of the one first token since ``before``."""
        until(lambda: known()[0] > before[0], "the time to first token")
        count, sum_ns = known()
        assert count == before[0] + 1
        return sum_ns - before[1]

    def queued() -> tuple[int, int]:
        counters = front.counters()
        return counters["first_tokens_queued"], counters["sum_ns_first_token_queue"]

    before, before_queue = known(), queued()
    asked = time.monotonic_ns()
    with stream(server, tokens(30, 20), 8) as running:
        assert running.readline().startswith(b"data: {")
        running.read()  # at the first line the server may not have noted yet that it sent it
        heard = time.monotonic_ns()
    streamed = more(before)
    assert 0 < streamed < heard - asked
    count, queue = queued()
    assert count == before_queue[0] + 1
    assert 0 <= queue - before_queue[1] < streamed  # a part of it, of the same request
    before = known()
    asked = time.monotonic_ns()
    complete(server, tokens(31, 20), 50)
    assert 0 < more(before) < (time.monotonic_ns() - asked) / 2  # of the first, not of the answer
    before = known()
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "stream": True,
    }
    asked = time.monotonic_ns()
    with post(server, chat, "/v1/chat/completions") as running:
        running.read()
    assert 0 < more(before) < time.monotonic_ns() - asked


def test_kv_bytes_are_what_vllm_says_within_one_block(server: VllmServer) -> None:
    kv = next(iter(readers(server.directory, "worker"))).facts()["model"]["kv"]
    front = next(iter(readers(server.directory, "frontend")))

    def theirs() -> tuple[float, float]:
        """Bytes in use, and how many requests use them."""
        said = metrics(f"{server.url}/metrics")
        used = value(said, "vllm:kv_cache_usage_perc") * kv["capacity_bytes"]
        return used, value(said, "vllm:num_requests_running")

    looks = 0
    for seed in range(40, 50):  # a request may be over before we have looked often enough
        with stream(server, tokens(seed, 200), 1500) as running:
            running.readline()
            until(lambda: theirs()[0] > 0, "KV use")
            while looks < 10:
                (before, _), load, (after, requests) = theirs(), front.load(), theirs()
                if not requests:
                    break
                assert load is not None
                ours = load.kv_usage * kv["capacity_bytes"]
                assert before - kv["block_bytes"] <= ours <= after + kv["block_bytes"]
                looks += 1
        if looks == 10:
            break
    assert looks == 10


def test_kv_bytes_in_use_are_in_the_status(server: VllmServer) -> None:
    kv = next(iter(readers(server.directory, "worker"))).facts()["model"]["kv"]

    def shown() -> int:
        used = get_json(f"{server.agent_url}/api/status")["servers"][0]["engines"][0]["kv_used_bytes"]
        return int(used or 0)

    with Load(server, 500) as load:
        used = until(shown, "KV use in the status")
    assert not load.failures
    most = -(-(12 + 500) // 16) + 1  # blocks of one request, and of the one before it
    assert 0.999 <= used / kv["block_bytes"] <= 2 * most


def test_weights_are_the_bytes_of_the_safetensors_file(server: VllmServer, tiny_model: Path) -> None:
    worker = next(iter(readers(server.directory, "worker"))).facts()
    assert worker["model"]["weights_bytes"] == tensor_bytes(tiny_model)
    assert worker["model"]["unmodelled"] == []
    assert worker["clock"] == "host"


def tensor_bytes(model: Path) -> int:
    """Bytes of all tensors, by the header of the file (8 bytes length, then JSON)."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    )


def test_components_of_device_time_add_up_to_the_wall_clock(server: VllmServer) -> None:
    def read() -> tuple[float, float]:
        asked, samples = time.monotonic(), metrics(f"{server.agent_url}/metrics")
        return asked, value(samples, "llmprobe_device_time_seconds_total", engine="0", rank="0")

    def total() -> tuple[float, float]:
        """When the figure was new, and the figure: on a starved machine it may be of seconds ago."""
        _, known = read()
        fresh: tuple[float, float] = until(
            lambda: found if (found := read())[1] != known else None, "a figure"
        )
        return fresh

    complete(server, tokens(50, 10), 50)
    time.sleep(1.5)
    began, before = total()
    for n in range(4):
        complete(server, tokens(51 + n, 10), 100)
        time.sleep(0.7)
    time.sleep(2)
    ended, after = total()
    # Idle time is booked half a second late.
    assert abs((after - before) - (ended - began)) < 1.5


def test_vllms_own_metrics_show_the_same_families(server: VllmServer) -> None:
    complete(server, tokens(60, 10), 5)

    def ours(url: str) -> set[str]:
        return {name for name, _ in metrics(url) if name.startswith("llmprobe_")}

    agents_page = f"{server.agent_url}/metrics"
    until(lambda: "llmprobe_device_time_seconds_total" in ours(agents_page), "steps in the agent's /metrics")
    agents_own = {"llmprobe_build_info", "llmprobe_captures_total"}
    families = ours(agents_page) - agents_own
    until(lambda: ours(f"{server.url}/metrics") >= families, "our families in /metrics")
