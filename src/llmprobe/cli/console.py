"""What the verbs share: where they print, and how they fail."""

from __future__ import annotations

from typing import NoReturn

import typer

from llmprobe.settings import Settings, SettingsError


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what is wrong in one line and leave: 1 failed, 2 wrong usage."""
    typer.echo(f"llmprobe: {plain(message)}", err=True)
    raise typer.Exit(code)


def plain(text: str) -> str:
    """``text`` without what would steer a terminal: parts of it come from files and agents of others."""
    if text.isprintable():
        return text
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())


def settings_or_fail() -> Settings:
    """The settings in the environment; a wrong one ends the command."""
    try:
        return Settings.from_env()
    except SettingsError as error:
        fail(str(error), code=2)
