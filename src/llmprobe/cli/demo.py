"""``llmprobe demo``: a real engine with a tiny model, driven by a real client, measured before your eyes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from llmprobe.cli.console import fail
from llmprobe.cli.demo_view import comparison, progress, watch
from llmprobe.cli.output import err, out, print_json
from llmprobe.collect.collector import Collector
from llmprobe.collect.peaks import attainable_for, load_peaks, peaks_for, peaks_path
from llmprobe.collect.telemetry import Telemetry
from llmprobe.collect.views import ServerView
from llmprobe.demo.client import BenchClient, ClientFailed, ClientResult, Load, client_environment
from llmprobe.demo.model import is_made
from llmprobe.demo.server import ServerFailed, VllmServer
from llmprobe.export.report import report, text
from llmprobe.export.run_seen import RunLooks
from llmprobe.processors import own_group
from llmprobe.settings import default_directory

_NAME = "tiny-llama"

EPILOG = """Examples:

llmprobe demo

llmprobe demo --keep (and look at the metrics as long as you like)

llmprobe demo --transformers"""


def demo(
    seconds: Annotated[float, typer.Option(min=4, help="How long the load lasts.")] = 30.0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep serving after the load, until Ctrl-C.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Measure a program that calls generate() instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Serve a tiny model with vLLM and LLMPROBE=1, drive it, and show what is measured.

    The load comes from vLLM's own `vllm bench serve`. The model is made on the spot, nothing is downloaded,
    no process is left behind.
    """
    with _ended_by_signals(), contextlib.ExitStack() as stack:
        try:
            model = _prepare()
            if transformers:
                raise typer.Exit(_program(model, seconds, as_json))
            _serve(model, seconds, keep, as_json, stack)
        except (ServerFailed, ClientFailed) as error:
            fail(str(error))


def _serve(model: Path, seconds: float, keep: bool, as_json: bool, stack: contextlib.ExitStack) -> None:
    folder = Path(tempfile.mkdtemp(prefix="llmprobe-demo-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix="llmprobe-demo-", dir=default_directory().parent))
    server = VllmServer.start(
        model,
        directory,
        folder / "vllm.log",
        _server_flags(),
        {"LLMPROBE_LISTEN": "127.0.0.1:9480"},  # the usual place; the next free port if it is taken
    )
    stack.callback(_stop, server)
    err.print(f"$ LLMPROBE=1 vllm serve {model} {' '.join(_server_flags())}", style="dim", soft_wrap=True)
    with progress("vllm serve is starting (about a minute: it imports torch in three processes)") as show:
        server.wait_ready(600, show)
        metrics = server.wait_agent() + "/metrics"
    err.print(Text.assemble("the server is ready; its metrics: ", (metrics, "bold")))
    telemetry = Telemetry()
    stack.callback(telemetry.close)
    collector = Collector(
        directory,
        peaks=lambda facts: peaks_for(facts, gpu=telemetry.hardware(facts)),
        attainable=attainable_for,
        telemetry=telemetry,
    )
    stack.callback(collector.close)
    begin = _views(collector)
    whole_looks, runs = RunLooks(begin), []
    for load in _loads(seconds):
        before = _views(collector)
        client = BenchClient.start(server, model, _NAME, load, folder)
        stack.callback(client.stop)
        looks = RunLooks(before)

        def tick(looks: RunLooks = looks) -> None:
            collector.tick()
            for one in (looks, whole_looks):
                one.look(collector.views())

        watch(directory, client.process, _describe(load), tick)
        result = client.result()
        runs.append((load, result, report(_views(collector), before, looks)))
    whole = report(_views(collector), begin, whole_looks)
    _summarise(whole, runs, metrics, as_json)
    if keep:
        err.print("\nserving on; Ctrl-C ends it", style="bold")
        err.print(f"  metrics {metrics}\n  LLMPROBE_DIR={directory} llmprobe status", soft_wrap=True)
        watch(directory, server.process, "serving on; Ctrl-C ends it", collector.tick)
        raise ServerFailed(f"vllm serve ended:\n{server.last_lines()}")


def _prepare() -> Path:
    """The model, and this machine's peaks if nobody measured them yet."""
    dtype = "bfloat16" if _gpu() else "float32"  # float32: what every processor multiplies natively
    model = peaks_path().parent / f"demo-model-{dtype}"
    if not is_made(model, dtype=dtype):
        _check_writable(model.parent)
        _step(
            "making a tiny Llama with random weights",
            [sys.executable, "-m", "llmprobe.demo.model", str(model), dtype],
        )
    if not _gpu() and not any(device.startswith("cpu:") for device in load_peaks()):
        _step("measuring this machine's bandwidth and FLOP/s", [_llmprobe(), "calibrate", "--json"])
    return model


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ServerFailed(
            f"the model cannot be kept in {folder}: {os.strerror(error.errno or 0)}; set XDG_CACHE_HOME to a "
            "directory that can be written"
        ) from None


def _program(model: Path, seconds: float, as_json: bool) -> int:
    program = Path(__file__).resolve().parents[3] / "examples" / "generate.py"
    if not program.exists():
        fail(f"there is no {program}: this demo needs a checkout; try `llmprobe run -- python YOURS.py`")
    folder = Path(tempfile.mkdtemp(prefix="llmprobe-demo-"))
    try:
        command = [_llmprobe(), "run", "--output", str(folder / "run.json"), "--", sys.executable]
        command += [str(program), str(model), "--seconds", str(seconds / 2)]
        err.print(f"$ llmprobe run -- python examples/generate.py {model}", style="dim", soft_wrap=True)
        environment = {**client_environment(os.environ), "LLMPROBE_AGENT": "off"}
        # What the program writes is none of the JSON.
        stdout = sys.stderr.fileno() if as_json else None
        with subprocess.Popen(command, env=environment, stdout=stdout, **own_group()) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGTERM)
                raise
        if as_json and not code:
            print_json(json.loads((folder / "run.json").read_text()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not code:
        err.print("(of the demo, run.json is not kept)")
        err.print("\nnext: llmprobe run -- python YOUR_PROGRAM.py", style="bold")
    return code


def _views(collector: Collector) -> list[ServerView]:
    """Everything recorded until now."""
    time.sleep(0.3)  # a front end records a request just after its client has the last token
    collector.tick(final=True)
    return collector.views()


def _summarise(
    whole: dict[str, Any], runs: list[tuple[Load, ClientResult, dict[str, Any]]], metrics: str, as_json: bool
) -> None:
    if not whole["servers"]:
        raise ServerFailed("the server ran, but nothing was measured; `llmprobe doctor` may tell why")
    if as_json:
        print_json(
            {
                "report": whole,
                "runs": [
                    {"load": asdict(load), "client": asdict(result), "llmprobe": measured}
                    for load, result, measured in runs
                ],
            }
        )
        return
    out.print(text(whole, out.width), markup=False, soft_wrap=True)
    out.print(comparison(runs))
    out.print(f"While it ran, Prometheus could have scraped {metrics}", soft_wrap=True)
    out.print(
        "Next:\n"
        "  llmprobe demo --keep                  serve on, and look at the metrics yourself\n"
        "  LLMPROBE=1 vllm serve YOUR_MODEL      measure your own server; then: llmprobe status\n"
        "  llmprobe run -- python YOUR_PROGRAM   measure a program that uses transformers",
        soft_wrap=True,
    )


def _loads(seconds: float) -> list[Load]:
    """Two shapes: chat (short prompts, bound by decoding) and documents (long prompts, bound by prefill)."""
    return [Load("chat", 64, 64, 4.0, seconds / 2), Load("documents", 1024, 16, 1.5, seconds / 2)]


def _describe(load: Load) -> str:
    return (
        f"vllm bench serve: {load.requests} requests of about {load.prompt_tokens} tokens, "
        f"{load.generated_tokens} to generate"
    )


def _server_flags() -> list[str]:
    flags = ["--served-model-name", _NAME, "--max-model-len", "4096"]
    if _gpu():
        return [*flags, "--gpu-memory-utilization", "0.3"]
    return [*flags, "--dtype", "float32", "--enforce-eager"]  # compiling takes a minute and gains little here


def _gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _llmprobe() -> str:
    return str(Path(sys.executable).with_name("llmprobe"))


def _step(label: str, command: list[str]) -> None:
    """Run something that takes seconds, saying so."""
    with progress(label) as show, tempfile.TemporaryFile() as output:
        begin = time.monotonic()
        process = subprocess.Popen(
            command, env=client_environment(os.environ), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                show(time.monotonic() - begin)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        if process.returncode:
            tail = output.read().decode(errors="replace")[-2000:]
            raise ServerFailed(f"{label} failed with exit status {process.returncode}:\n{tail}")


def _stop(server: VllmServer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # nothing may cut the tidying short
    with progress("stopping the server and its agent"):
        server.stop()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turns SIGINT, SIGTERM and SIGHUP into an orderly end with the status a shell expects."""
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped")
        raise typer.Exit(128 + (received[0] if received else signal.SIGINT)) from None
