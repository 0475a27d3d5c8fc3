"""vLLM's own benchmark client, ``vllm bench serve``, against a server of the demo."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmprobe.demo.server import VllmServer, vllm_command
from llmprobe.processors import own_group


class ClientFailed(Exception):
    """The client ended badly or wrote no result; the message ends with its last lines."""


@dataclass(frozen=True)
class Load:
    """One run of the client: requests of random tokens that arrive at random times, or as others end."""

    name: str
    prompt_tokens: int
    generated_tokens: int
    requests_per_second: float
    seconds: float
    at_a_time: int | None = None  # requests that run at once, at most

    @property
    def requests(self) -> int:
        """How many requests it sends."""
        return max(1, round(self.requests_per_second * self.seconds))


@dataclass(frozen=True)
class ClientResult:
    """What the client saw; times in seconds."""

    requests: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    ttft_median_seconds: float
    tpot_median_seconds: float


class BenchClient:
    """One running ``vllm bench serve``."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], folder: Path, load: Load) -> None:
        self.process = process
        self._log = log
        self._folder = folder
        self._load = load

    @classmethod
    def start(cls, server: VllmServer, model: Path, name: str, load: Load, folder: Path) -> BenchClient:
        """Start the client; it takes some seconds before it sends its first request.

        Args:
            server: one that is ready.
            model: the directory with the tokenizer.
            name: the model's name at the server.
            load: what to send.
            folder: gets the client's output and result.
        """
        log = (folder / f"{load.name}.log").open("wb")
        process = subprocess.Popen(
            bench_command(server.port, model, name, load, folder),
            env=client_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **own_group(),
        )
        return cls(process, log, folder, load)

    def result(self) -> ClientResult:
        """What it saw, once it has ended. Raises ClientFailed."""
        code = self.process.wait()
        self._log.close()
        try:
            found = json.loads((self._folder / f"{self._load.name}.json").read_text())
            result = ClientResult(
                requests=int(found["completed"]),
                failed=self._load.requests - int(found["completed"]),
                prompt_tokens=int(found["total_input_tokens"]),
                generated_tokens=int(found["total_output_tokens"]),
                ttft_median_seconds=float(found["median_ttft_ms"]) / 1e3,
                tpot_median_seconds=float(found["median_tpot_ms"]) / 1e3,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ClientFailed(
                f"vllm bench serve (exit status {code}) left no result: {error!r}\n{self._tail()}"
            ) from None
        if code or result.failed:
            raise ClientFailed(
                f"vllm bench serve: exit status {code}, {result.failed} of {self._load.requests} requests "
                f"failed\n{self._tail()}"
            )
        return result

    def stop(self) -> None:
        """End it now, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _tail(self) -> str:
        path = self._folder / f"{self._load.name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-20:])


def bench_command(port: int, model: Path, name: str, load: Load, folder: Path) -> list[str]:
    """The client's command line."""
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--model": model,
        "--served-model-name": name,
        "--dataset-name": "random",
        "--random-input-len": load.prompt_tokens,
        "--random-output-len": load.generated_tokens,
        "--random-range-ratio": 0.5,  # lengths within ± 50 %
        "--num-prompts": load.requests,
        "--request-rate": load.requests_per_second,
        "--ready-check-timeout-sec": 0,  # the server is ready, and a test request would be counted
        "--metric-percentiles": "50,99",
        "--result-dir": folder,
        "--result-filename": f"{load.name}.json",
    }
    if load.at_a_time is not None:
        options["--max-concurrency"] = load.at_a_time
    flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
    return [
        *vllm_command(),
        "bench",
        "serve",
        *(str(part) for option in options.items() for part in option),
        *flags,
    ]


def client_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` for a client that is not measured and needs no network."""
    kept = {name: value for name, value in environ.items() if not name.startswith("LLMPROBE")}
    return {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
