"""Which agents ``llmprobe capture`` asks: the one of this node, or those that ``--target`` names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprobe.agent.client import Agent, LocalAgent, RemoteAgent


class TargetError(Exception):
    """A target that cannot be asked; the message says what is wanted instead."""


@dataclass(frozen=True)
class Target:
    """One agent to ask. ``node`` is how it was named, None for this node's own; ``token_file`` is where its
    token came from.
    """

    agent: Agent
    node: str | None = None
    token_file: Path | None = None

    @property
    def folder(self) -> Path:
        """Where its captures go, under the folder for all: a plain name, whatever the node is called."""
        if self.node is None:
            return Path()
        return Path(re.sub(r"[^A-Za-z0-9._-]+", "-", self.node).strip("-."))


def local(directory: Path) -> Target:
    """The agent of this node."""
    return Target(LocalAgent(directory))


def named(targets: Sequence[str], token_file: Path | None) -> list[Target]:
    """The agents that were named: ``HOST:PORT``, or ``TOKEN_FILE@HOST:PORT``.

    A token itself is taken from no command line: every user of a machine can read those.

    Args:
        token_file: for those that name none.

    Raises:
        TargetError: one is no address, or has no token.
    """
    return [_named(target, token_file) for target in targets]


def _named(target: str, token_file: Path | None) -> Target:
    of_its_own, _, address = target.rpartition("@")
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", host) or not re.fullmatch(r"[0-9]{1,5}", port):
        raise TargetError(f"--target {target}: HOST:PORT or TOKEN_FILE@HOST:PORT is wanted")
    if not 1 <= int(port) <= 65535:
        raise TargetError(f"--target {target}: ports are 1 to 65535")
    path = Path(of_its_own) if of_its_own else token_file
    if path is None:
        raise TargetError(f"--target {target} needs its token: --token-file FILE, or FILE@{address}")
    return Target(RemoteAgent(host, int(port), _token(path)), address, path)


def _token(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot read {path}: {error}") from None
    if not re.fullmatch(r"[!-~]+", token):
        raise TargetError(f"{path} holds no token: one word of ASCII is wanted")
    return token
