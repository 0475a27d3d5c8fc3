"""What this process's server or program is called, and what its processes share."""

from __future__ import annotations

import sys
from pathlib import Path

from llmprobe.settings import Settings

#: Processes of one server or program share this; children inherit it through the environment.
GROUP_VARIABLE = "LLMPROBE_GROUP"


def server_name(settings: Settings, argv: list[str] | None = None) -> str:
    """The ``server`` label where vLLM runs: as set, else ``vllm-<port>``, else the name of the program."""
    argv = sys.argv if argv is None else argv
    program = program_name(settings, argv)
    if not settings.server and (is_serve(argv) or "api_server" in program):
        return f"vllm-{_option(argv, 'port', '8000')}"
    return program


def program_name(settings: Settings, argv: list[str] | None = None) -> str:
    """The ``server`` label of a program without vLLM, whose words on the command line are its own."""
    if settings.server:
        return settings.server
    argv = sys.argv if argv is None else argv
    stem = Path(argv[0]).stem if argv and argv[0] not in ("", "-c", "-m") else "python"
    return stem.encode(errors="replace").decode()  # a file's name may hold what no text can


def is_serve(argv: list[str] | None = None) -> bool:
    """Whether this process is, or was started by, ``vllm serve``."""
    return "serve" in (sys.argv if argv is None else argv)[1:2]


def _option(argv: list[str], name: str, default: str) -> str:
    """The value of ``--name`` on a vLLM command line, or in the YAML file it names with ``--config``."""
    for index, word in enumerate(argv):
        if word == f"--{name}" and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    if name != "config" and (path := _option(argv, "config", "")):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            return default
        for line in lines:
            key, colon, value = line.partition(":")
            if colon and key.strip() == name:
                return value.split("#")[0].strip().strip("\"'") or default
    return default
