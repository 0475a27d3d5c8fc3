"""The demo's server for a measurement: a tiny model, its own LLMPROBE_DIR, nothing left behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmprobe.collect.peaks import peaks_path
from llmprobe.demo.client import client_environment
from llmprobe.demo.model import is_made
from llmprobe.demo.server import VllmServer
from llmprobe.settings import default_directory
from support.machine import has_gpu

NAME = "tiny"
_PREFIX_SECONDS = 60.0


def tiny_model() -> Path:
    """The demo's model, made on the first call, in the dtype that this machine multiplies natively."""
    dtype = "bfloat16" if has_gpu() else "float32"
    path = peaks_path().parent / f"demo-model-{dtype}"
    if not is_made(path, dtype):
        # In a process of its own, which takes torch and its memory along when it ends.
        command = [sys.executable, "-m", "llmprobe.demo.model", str(path), dtype]
        subprocess.run(command, env=client_environment(os.environ), check=True)
    return path


@contextlib.contextmanager
def running_server(
    model: Path | None,
    flags: Sequence[str],
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[VllmServer]:
    """A ``vllm serve`` with llmprobe that answers, and its agent too; stopped at the end.

    Args:
        model: None for `tiny_model`.
        flags: go behind the ones that make a quick start on the CPU.
        env: variables of the server and its agent beside those of this process; with ``LLMPROBE=0`` the
            server is not measured.
        prefix: a command that runs the server and ends with it; it is given time to clean up.
    """
    folder = Path(tempfile.mkdtemp(prefix="llmprobe-benchmark-"))
    server = VllmServer.start(
        model or tiny_model(),
        new_directory(),
        folder / "vllm.log",
        [*_flags(model), *flags],
        env,
        prefix=prefix,
    )
    try:
        print(f"starting vllm serve (log: {server.log})", file=sys.stderr, flush=True)
        server.wait_ready(600)
        if (env or {}).get("LLMPROBE") != "0":
            server.wait_agent()
        yield server
    finally:
        if prefix and server.process.poll() is None:
            server.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(_PREFIX_SECONDS)
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def variable(text: str) -> tuple[str, str]:
    """Of ``--env NAME=VALUE``: both."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def with_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this command line, and what follows ``--`` in it, for ``vllm serve``, as ``flags``.

    By hand: where a word is given that may be left out, argparse has given "no flags" away before it comes
    to them.
    """
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.flags = words[cut + 1 :]
    return options


def new_directory() -> Path:
    """An LLMPROBE_DIR of this measurement's own, in shared memory like the default one."""
    return Path(tempfile.mkdtemp(prefix="llmprobe-benchmark-", dir=default_directory().parent))


def _flags(model: Path | None) -> list[str]:
    flags = ["--served-model-name", NAME]
    if model is None:
        flags += ["--max-model-len", "2048"]
    if not has_gpu():
        flags += ["--dtype", "float32", "--enforce-eager"]  # compiling takes minutes and gains little here
    return flags
