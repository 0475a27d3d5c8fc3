"""``llmprobe agent``: run the agent by hand, for ``LLMPROBE_AGENT=external``."""

from __future__ import annotations

from typing import Annotated

import typer

from llmprobe.agent.main import run
from llmprobe.agent.options import Options
from llmprobe.cli.console import settings_or_fail


def agent(
    detach: Annotated[bool, typer.Option(help="Go into the background.")] = False,
    linger: Annotated[
        bool, typer.Option(help="Leave 30 s after the last engine, as when started by one.")
    ] = False,
) -> None:
    """Serve the metrics of this user's engines; LLMPROBE_LISTEN says where. Stays until stopped."""
    raise typer.Exit(run(Options(settings_or_fail(), external=not linger, foreground=not detach)))
