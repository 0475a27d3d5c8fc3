"""Talking to a real vLLM server, and reading what llmprobe recorded of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_SECONDS, until

from llmprobe.demo.server import VllmServer
from llmprobe.record.journal import JournalError
from llmprobe.record.journal_reader import JournalReader
from llmprobe.record.layout import PHASES

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def offline_environment(directory: Path) -> dict[str, str]:
    """Of a program that runs vLLM's engine in its own process and leaves journals in ``directory``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMPROBE")}
    return {
        **kept,
        "LLMPROBE": "1",
        "LLMPROBE_AGENT": "off",
        "LLMPROBE_DIR": str(directory),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def post(server: VllmServer, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return _OPENER.open(request, timeout=PATIENCE_SECONDS)


def complete(server: VllmServer, prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A completion of exactly ``max_tokens`` tokens for a prompt given as token ids."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}
    answer: dict[str, Any] = json.load(post(server, body))
    return answer


def stream(server: VllmServer, prompt: list[int], max_tokens: int) -> Any:
    """The open response of a streaming completion; closing it aborts the request."""
    return post(
        server,
        {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True},
    )


def tokens(seed: int, count: int) -> list[int]:
    """A prompt that no other test's prompt begins like."""
    prompt: list[int] = np.random.default_rng(seed).integers(10, 500, count).tolist()
    return prompt


def get(url: str) -> str:
    with _OPENER.open(url, timeout=PATIENCE_SECONDS) as response:
        text: str = response.read().decode()
        return text


def get_json(url: str) -> Any:
    return json.loads(get(url))


def metrics(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample at ``url`` by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(get(url))
        for sample in family.samples
    }


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    """The sum of the samples of ``name`` that carry ``labels``; fails if there are none."""
    found = [
        number
        for (sample, carried), number in samples.items()
        if sample == name and set(labels.items()) <= set(carried)
    ]
    assert found, f"no sample {name} with {labels}"
    return sum(found)


class Load(threading.Thread):
    """Requests one after another for as long as the block lasts; remembers what failed.

    Args:
        max_tokens: that each generates.
    """

    def __init__(self, server: VllmServer, max_tokens: int = 20) -> None:
        super().__init__()
        self.server = server
        self.max_tokens = max_tokens
        self.done = 0
        self.failures: list[Exception] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                complete(self.server, tokens(self.done, 12), self.max_tokens)
                self.done += 1
            except Exception as error:
                self.failures.append(error)
                return

    def __enter__(self) -> Load:
        self.start()
        until(lambda: self.done >= 2, "the first requests")
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()


_CROWD = textwrap.dedent(
    """
    # Many streaming completions at once: python -c ... PORT COUNT MAX_TOKENS
    import asyncio, json, sys

    port, count, max_tokens = map(int, sys.argv[1:])

    async def one(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"model": "tiny", "prompt": [20 + number] * (10 + number), "stream": True,
                           "max_tokens": max_tokens, "ignore_eos": True}).encode()
        head = "POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
        writer.write(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
        while await reader.read(65536):
            pass

    async def all():
        await asyncio.gather(*(one(number) for number in range(count)))

    asyncio.run(all())
    """
)


def crowd(server: VllmServer, count: int = 40, max_tokens: int = 250) -> subprocess.Popen[bytes]:
    """A client of its own with ``count`` streams at once, to be killed."""
    return subprocess.Popen([sys.executable, "-c", _CROWD, *map(str, (server.port, count, max_tokens))])


class PendingOf:
    """Whether work is pending, by the last word of each front end of a server.

    Args:
        directory: the one that it shares with another server; its own if None.
    """

    def __init__(self, server: VllmServer, directory: Path | None = None) -> None:
        name = f"vllm-{server.port}"
        self._readers = [
            reader
            for reader in readers(directory or server.directory, "frontend")
            if reader.alive() and reader.facts()["server"] == name
        ]
        assert self._readers
        self._last = [0] * len(self._readers)

    def all(self) -> list[bool]:
        """By front end."""
        for at, reader in enumerate(self._readers):
            told = reader.read().pending
            if len(told):
                self._last[at] = int(told["unfinished"][-1])
        return [unfinished > 0 for unfinished in self._last]


def readers(directory: Path, role: str) -> Iterator[JournalReader]:
    for path in sorted((directory / "journals").glob(f"{role}-*.journal")):
        try:
            yield JournalReader(path)
        except JournalError:
            continue


class Steps:
    """The steps of a server's one worker, read as they come."""

    def __init__(self, server: VllmServer) -> None:
        self.reader = next(reader for reader in readers(server.directory, "worker") if reader.alive())
        self.reader.read()

    def forget(self) -> None:
        """Skip what was recorded so far, also what is about to be written."""
        time.sleep(0.6)
        self.reader.read()

    def take(self, enough: Callable[[np.ndarray], bool]) -> np.ndarray:
        """The steps since the last call, once ``enough`` says so."""
        rows: list[np.ndarray] = []

        def ready() -> bool:
            rows.append(self.reader.read().steps)
            return enough(np.concatenate(rows))

        until(ready, "the expected steps")
        return np.concatenate(rows)


def phases(steps: np.ndarray) -> list[str]:
    return [PHASES[phase] for phase in steps["phase"]]
