"""Whether our counts and latencies agree with those of a client of someone else's.

    python benchmarks/client_agreement.py
    python benchmarks/client_agreement.py --requests 201 --model PATH -- --max-num-seqs 64
    python benchmarks/client_agreement.py --model dense --loads 1x512 32x512 1x6000 \\
        -- --max-model-len 10240

Runs ``vllm bench serve`` against a server with llmprobe and compares, load by load. Exit status 1 if a bar
is missed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from support.gpu_models import CONFIGURATIONS, served
from support.machine import has_gpu, machine_line
from support.serving import NAME, running_server, tiny_model, with_flags
from support.table import Results, command

from llmprobe.collect.collector import Collector
from llmprobe.demo.client import BenchClient, ClientResult, Load
from llmprobe.demo.server import VllmServer
from llmprobe.export.report import report

_HEADER = ("load", "seen by", "requests", "prompt tokens", "generated tokens", "TTFT p50", "TPOT p50")
_SECONDS = 2e-3
_RELATIVE, _RELATIVE_GPU = 0.05, 0.02
_AT_ONCE = 1000.0  # requests a second where others' ends decide when one is sent
_SETTLE_SECONDS = 1.5  # the agent reads ten times a second
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Ours:
    """What llmprobe saw during one load: from the journals, and counts again from the agent's /metrics."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    ttft_median_seconds: float
    tpot_median_seconds: float
    scraped: tuple[int, int, int]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Requests, prompt tokens, generated tokens."""
        return self.requests, self.prompt_tokens, self.generated_tokens


@dataclass(frozen=True)
class Compared:
    """One load as both saw it."""

    load: Load
    client: ClientResult
    ours: Ours

    @property
    def counts_agree(self) -> bool:
        """To the last request and token, in the journals and in what Prometheus would scrape."""
        theirs = (self.client.requests, self.client.prompt_tokens, self.client.generated_tokens)
        return theirs == self.ours.counts == self.ours.scraped

    @property
    def ttft_agrees(self) -> bool:
        """Medians within 5 % + 2 ms of the client's, 2 % + 2 ms on a GPU."""
        return _near(self.ours.ttft_median_seconds, self.client.ttft_median_seconds)

    @property
    def tpot_agrees(self) -> bool:
        """Likewise."""
        return _near(self.ours.tpot_median_seconds, self.client.tpot_median_seconds)


def main() -> int:
    """Run the loads; returns the exit status."""
    options = _options()
    machine = machine_line()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model, flags = served(options.model, folder) if options.model else (None, [])
        with running_server(model, [*flags, *options.flags]) as server:
            collector = Collector(server.directory)
            try:
                wanted = _closed(options) if options.loads else loads(options.requests)
                runs = [_run(server, collector, model or tiny_model(), load, folder) for load in wanted]
            finally:
                collector.close()
    _table(runs, machine).show(options.markdown)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "runs": [asdict(r) for r in runs]}, indent=1))
    return int(not all(run.counts_agree and run.ttft_agrees and run.tpot_agrees for run in runs))


def loads(requests: int) -> list[Load]:
    """Lengths vary by ± 50 %, arrivals are random. Odd numbers: a median is then one request's."""

    def load(name: str, prompt_tokens: int, generated_tokens: int, rate: float) -> Load:
        return Load(name, prompt_tokens, generated_tokens, rate, (requests | 1) / rate)

    return [
        load("alone", 64, 64, 1.0),  # hardly ever two at a time
        load("chat", 96, 48, 3.0),
        load("documents", 1024, 16, 1.0),
    ]


def _closed(options: argparse.Namespace) -> list[Load]:
    """So many requests at a time, of which each follows another."""

    def load(batch: int, context: int) -> Load:
        requests = max(4 * batch, options.requests) | 1
        name = f"{batch}-x-{context}"
        return Load(name, context, options.output_tokens, _AT_ONCE, requests / _AT_ONCE, at_a_time=batch)

    return [load(batch, context) for batch, context in options.loads]


def _run(server: VllmServer, collector: Collector, model: Path, load: Load, folder: Path) -> Compared:
    print(f"vllm bench serve, {load.name}: {load.requests} requests", file=sys.stderr, flush=True)
    collector.tick(final=True)
    before, scraped_before = collector.views(), _scrape(server)
    client = BenchClient.start(server, model, NAME, load, folder)
    try:
        # Nothing is read meanwhile: totals and histograms wait, and the cores are the server's.
        result = client.result()
    finally:
        client.stop()
    time.sleep(_SETTLE_SECONDS)
    collector.tick(final=True)
    engine: dict[str, Any] = report(collector.views(), before)["servers"][0]["engines"][0]
    ours = Ours(
        engine["requests"],
        engine["prompt_tokens"],
        engine["generated_tokens"],
        engine["ttft_seconds"]["p50"],
        engine["tpot_seconds"]["p50"],
        _minus(_scrape(server), scraped_before),
    )
    return Compared(load, result, ours)


def _scrape(server: VllmServer) -> tuple[int, int, int]:
    """Requests, prompt and generated tokens so far, from the agent's /metrics."""
    with _OPENER.open(f"{server.agent_url}/metrics", timeout=20) as response:
        text = response.read().decode()
    found = {"requests": 0.0, "prompt": 0.0, "generated": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "llmprobe_tokens_total":
                found[sample.labels["kind"]] += sample.value
            elif sample.name == "llmprobe_request_duration_seconds_count":
                found["requests"] += sample.value
    return int(found["requests"]), int(found["prompt"]), int(found["generated"])


def _minus(now: tuple[int, int, int], before: tuple[int, int, int]) -> tuple[int, int, int]:
    return now[0] - before[0], now[1] - before[1], now[2] - before[2]


def _near(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= _relative() * theirs + _SECONDS


def _relative() -> float:
    return _RELATIVE_GPU if has_gpu() else _RELATIVE


def _table(runs: list[Compared], machine: str) -> Results:
    rows = []
    for run in runs:
        client, ours = run.client, run.ours
        when = f"{run.load.requests_per_second:g}/s"
        if run.load.at_a_time is not None:
            when = f"{run.load.at_a_time} at a time"
        load = f"{run.load.name}: {run.load.prompt_tokens} + {run.load.generated_tokens} tokens, {when}"
        seen = (client.requests, client.prompt_tokens, client.generated_tokens)
        rows.append(
            [
                load,
                "client",
                *map(str, seen),
                _ms(client.ttft_median_seconds),
                _ms(client.tpot_median_seconds),
            ]
        )
        rows.append(
            [
                "",
                "llmprobe",
                *map(str, ours.counts),
                _ms(ours.ttft_median_seconds),
                _ms(ours.tpot_median_seconds),
            ]
        )
        counts = "equal" if run.counts_agree else f"MISSED (/metrics: {ours.scraped})"
        rows.append(
            [
                "",
                "bar",
                counts,
                "",
                "",
                _verdict(ours.ttft_median_seconds, client.ttft_median_seconds),
                _verdict(ours.tpot_median_seconds, client.tpot_median_seconds),
            ]
        )
    return Results(
        "llmprobe against vllm bench serve",
        command("client_agreement.py"),
        machine,
        _HEADER,
        rows,
        [
            "Bars: counts equal to the last one, in the journals and in the agent's /metrics; medians within "
            f"{_relative():.0%} + 2 ms."
        ],
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _verdict(ours: float, theirs: float) -> str:
    return f"{(ours - theirs) * 1e3:+.2f} ms: {'held' if _near(ours, theirs) else 'MISSED'}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="What follows -- goes to vllm serve: client_agreement.py --model dense -- --max-num-seqs 64",
    )
    parser.add_argument("--requests", type=int, default=61, help="of each load [61]")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"a model directory, or a configuration without weights: {', '.join(CONFIGURATIONS)} "
        "[the demo's tiny Llama]",
    )
    parser.add_argument(
        "--loads",
        type=_batch_and_context,
        nargs="+",
        metavar="NxTOKENS",
        help="so many requests at a time with such prompts, ± 50 %% [three loads of random arrivals]",
    )
    parser.add_argument("--output-tokens", type=int, default=64, help="of each of their requests [64]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every figure there")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/accuracy.md")
    options = with_flags(parser)
    if min(options.requests, options.output_tokens) < 1:
        parser.error("--requests and --output-tokens from 1")
    return options


def _batch_and_context(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxTOKENS, such as 32x512")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(main())
