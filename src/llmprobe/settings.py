"""Every ``LLMPROBE_*`` environment variable, in one place.

A bad value never stops the host: the caller prints `SettingsError` as one line and stays off.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

AgentMode = Literal["auto", "external", "off"]

_T = TypeVar("_T")
_TRUE = {"1", "true", "on", "yes"}
_FALSE = {"", "0", "false", "off", "no"}
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(|[KMGT]i?B?|B)$", re.IGNORECASE)


class SettingsError(ValueError):
    """An environment variable holds a value that is not allowed.

    The message is one line: variable, value, what is allowed.
    """

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(f"{variable}={value!r} is not allowed: {allowed}")
        self.variable = variable
        self.value = value
        self.allowed = allowed


DEFAULT_LISTEN = ("127.0.0.1", 9480)


@dataclass(frozen=True)
class KernelWindows:
    """How long a kernel window lasts and how often one is opened, in seconds.

    ``spare_graphs``: open none where CUDA graphs are launched, because CUPTI makes that dearer for good.
    """

    seconds: float
    period: float
    spare_graphs: bool = False


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; see docs/operating.md for each variable."""

    enabled: bool
    directory: Path
    server: str | None
    group: str | None
    agent: AgentMode
    listen: tuple[str, int]
    token_file: Path | None
    nvtx: bool
    kernel_windows: KernelWindows | None
    capture_dir: Path | None
    capture_max_seconds: float
    capture_max_bytes: int
    vllm_metrics: bool
    thresholds: Path | None
    snapshot_dir: Path | None
    log_level: str

    @property
    def listen_text(self) -> str:
        """``listen`` as HOST:PORT, an IPv6 host in brackets."""
        host, port = self.listen
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from ``environ`` (default: the process environment).

        Raises:
            SettingsError: a variable holds a value that is not allowed.
        """
        env = os.environ if environ is None else environ
        return cls(
            enabled=is_enabled(env),
            directory=_read(env, "LLMPROBE_DIR", "", _directory, "an absolute path"),
            server=_read(
                env, "LLMPROBE_SERVER", "", _label, "1 to 64 letters, digits, '.', '_', ':', '/' or '-'"
            ),
            group=env.get("LLMPROBE_GROUP") or None,
            agent=_read(env, "LLMPROBE_AGENT", "auto", _agent, "auto, external or off"),
            listen=_read(
                env,
                "LLMPROBE_LISTEN",
                "{}:{}".format(*DEFAULT_LISTEN),
                _listen,
                "HOST:PORT with a port from 1 to 65535",
            ),
            token_file=_read(env, "LLMPROBE_TOKEN_FILE", "", _optional_path, "an absolute path"),
            nvtx=_read(env, "LLMPROBE_NVTX", "1", _boolean, "1 or 0"),
            kernel_windows=_read(
                env,
                "LLMPROBE_KERNEL_WINDOWS",
                "off",
                _windows,
                "auto, off, or SECONDS/PERIOD with 0 < SECONDS <= PERIOD, such as 0.1/10",
            ),
            capture_dir=_read(env, "LLMPROBE_CAPTURE_DIR", "", _optional_path, "an absolute path"),
            capture_max_seconds=_read(
                env, "LLMPROBE_CAPTURE_MAX_SECONDS", "60", _positive, "a number of seconds above 0"
            ),
            capture_max_bytes=_read(
                env, "LLMPROBE_CAPTURE_MAX_BYTES", "2GiB", parse_size, "a size such as 500MB or 2GiB"
            ),
            vllm_metrics=_read(env, "LLMPROBE_VLLM_METRICS", "1", _boolean, "1 or 0"),
            thresholds=_read(
                env, "LLMPROBE_THRESHOLDS", "", _optional_path, "an absolute path to a TOML file"
            ),
            snapshot_dir=_read(env, "LLMPROBE_SNAPSHOT_DIR", "", _optional_path, "an absolute path"),
            log_level=_read(
                env, "LLMPROBE_LOG_LEVEL", "INFO", _log_level, "DEBUG, INFO, WARNING, ERROR or CRITICAL"
            ),
        )


def is_enabled(environ: Mapping[str, str]) -> bool:
    """Whether ``LLMPROBE`` asks for the probe. Used alone before anything else is imported.

    Raises:
        SettingsError: ``LLMPROBE`` is neither a yes nor a no.
    """
    value = environ.get("LLMPROBE", "")
    if value.strip().lower() in _TRUE:
        return True
    if value.strip().lower() in _FALSE:
        return False
    raise SettingsError("LLMPROBE", value, "1 to switch the probe on, 0 or unset to leave it off")


def default_directory() -> Path:
    """The directory that engines and agent share: one per user, network and pid namespace.

    It lies in shared memory, so that writing a journal never waits for a disk; the namespaces are in
    its name because two containers that share /dev/shm share neither ports nor process ids.
    """
    base = Path("/dev/shm")
    if not base.is_dir() or not os.access(base, os.W_OK):
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")
    return base / f"llmprobe-{os.getuid()}-{_namespace('net')}-{_namespace('pid')}"


def parse_size(text: str) -> int:
    """``"500MB"`` or ``"2GiB"`` as bytes. Raises ValueError for anything else."""
    match = _SIZE.match(text.strip())
    if not match:
        raise ValueError(text)
    number, unit = match.groups()
    unit = unit.upper().removesuffix("B")
    base = 1024 if unit.endswith("I") else 1000
    exponent = " KMGT".index(unit[0]) if unit else 0
    return int(float(number) * base**exponent)


def _namespace(kind: str) -> int:
    try:
        return Path(f"/proc/self/ns/{kind}").stat().st_ino
    except OSError:
        return 0


def _read(env: Mapping[str, str], name: str, default: str, parse: Callable[[str], _T], allowed: str) -> _T:
    value = env.get(name) or default
    try:
        return parse(value)
    except (ValueError, OverflowError):
        raise SettingsError(name, value, allowed) from None


def _boolean(value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise ValueError(value)


def _directory(value: str) -> Path:
    return _absolute(value) if value else default_directory()


def _optional_path(value: str) -> Path | None:
    return _absolute(value) if value else None


def _absolute(value: str) -> Path:
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # the home of a user that there is not
        raise ValueError(value) from None
    if not path.is_absolute():
        raise ValueError(value)
    return path


def _label(value: str) -> str | None:
    if not value:
        return None
    if not re.fullmatch(r"[\w.:/-]{1,64}", value, re.ASCII):
        raise ValueError(value)
    return value


def _agent(value: str) -> AgentMode:
    if value not in ("auto", "external", "off"):
        raise ValueError(value)
    return cast("AgentMode", value)


def _listen(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(value)
    return host, int(port)


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(value)
    return number


def _windows(value: str) -> KernelWindows | None:
    if value == "off":
        return None
    if value == "auto":
        return KernelWindows(0.1, 10.0, spare_graphs=True)
    seconds, _, period = value.partition("/")
    windows = KernelWindows(_positive(seconds), _positive(period))
    if windows.seconds > windows.period:
        raise ValueError(value)
    return windows


def _log_level(value: str) -> str:
    if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError(value)
    return value.upper()


def logger(settings: Settings | None = None) -> logging.Logger:
    """The one logger of llmprobe; writes to stderr unless the host configured the root logger."""
    log = logging.getLogger("llmprobe")
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("llmprobe: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    if settings is not None:
        log.setLevel(settings.log_level)
    elif log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    return log
