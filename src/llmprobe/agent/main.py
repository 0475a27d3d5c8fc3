"""The agent's command line, and the order in which it starts.

Nothing heavy is imported before this process knows that it is the one agent of its directory.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from llmprobe.agent import daemon
from llmprobe.agent.options import Options
from llmprobe.record.agent_launch import LOG_NAME, agent_running
from llmprobe.record.directory import prepare_directory
from llmprobe.record.journal import JournalError
from llmprobe.settings import Settings, SettingsError

log = logging.getLogger("llmprobe.agent")


def parse(arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Options:
    """The options on the command line, over those in ``environ`` (default: the process environment).

    Exits with status 2 and a message if one is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llmprobe.agent",
        description="Read the journals of this user's engines and serve their metrics over HTTP.",
    )
    parser.add_argument("--directory", metavar="PATH", help="as LLMPROBE_DIR")
    parser.add_argument("--listen", metavar="HOST:PORT", help="as LLMPROBE_LISTEN")
    parser.add_argument("--token-file", metavar="PATH", help="as LLMPROBE_TOKEN_FILE")
    parser.add_argument("--capture-dir", metavar="PATH", help="as LLMPROBE_CAPTURE_DIR")
    parser.add_argument("--capture-max-seconds", metavar="SECONDS", help="as LLMPROBE_CAPTURE_MAX_SECONDS")
    parser.add_argument("--capture-max-bytes", metavar="SIZE", help="as LLMPROBE_CAPTURE_MAX_BYTES")
    parser.add_argument("--thresholds", metavar="PATH", help="as LLMPROBE_THRESHOLDS")
    parser.add_argument("--snapshot-dir", metavar="PATH", help="as LLMPROBE_SNAPSHOT_DIR")
    parser.add_argument("--log-level", metavar="LEVEL", help="as LLMPROBE_LOG_LEVEL")
    parser.add_argument("--external", action="store_true", help="stay, also without any engine")
    parser.add_argument("--foreground", action="store_true", help="stay attached to the terminal")
    parser.add_argument("--linger-seconds", type=float, default=30.0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    values = dict(os.environ if environ is None else environ, LLMPROBE="0")
    for variable, value in {
        "LLMPROBE_DIR": given.directory,
        "LLMPROBE_LISTEN": given.listen,
        "LLMPROBE_TOKEN_FILE": given.token_file,
        "LLMPROBE_CAPTURE_DIR": given.capture_dir,
        "LLMPROBE_CAPTURE_MAX_SECONDS": given.capture_max_seconds,
        "LLMPROBE_CAPTURE_MAX_BYTES": given.capture_max_bytes,
        "LLMPROBE_THRESHOLDS": given.thresholds,
        "LLMPROBE_SNAPSHOT_DIR": given.snapshot_dir,
        "LLMPROBE_LOG_LEVEL": given.log_level,
    }.items():
        if value is not None:
            values[variable] = value
    try:
        settings = Settings.from_env(values)
    except SettingsError as error:
        parser.error(str(error))
    return Options(settings, given.external, given.foreground, given.linger_seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent. Returns its exit status; in the process that started a daemon, at once."""
    return run(parse(arguments))


def run(options: Options) -> int:
    """Become the agent of ``options.settings.directory``, unless there is one."""
    directory = options.settings.directory
    try:
        prepare_directory(directory)
    except JournalError as error:
        print(f"llmprobe: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
        return 1
    if agent_running(directory):
        print(f"llmprobe: an agent already serves {directory}", file=sys.stderr)  # noqa: T201
        return 0
    if not options.foreground and not daemon.detach(directory / LOG_NAME):
        return 0
    os.umask(0o077)
    daemon.clear_environment()
    _log_to_stderr(options.settings.log_level)
    lock = daemon.take_lock(directory)
    if lock is None:
        log.info("another agent already serves %s; this one leaves", directory)
        return 0
    daemon.be_modest()
    try:
        from llmprobe.agent.server import serve

        serve(options, lock)
    except Exception:
        log.exception("the agent ends: an error that it cannot work around")
        return 1
    finally:
        lock.release()
    return 0


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
