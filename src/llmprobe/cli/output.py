"""How verbs print results: rich on stdout, progress and warnings on stderr, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from llmprobe.cli.console import plain


class _Console(Console):
    """rich's, on which only styles steer the terminal: rich passes on the escapes in what it is given."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and not segment.text.isprintable():
                yield segment._replace(text=plain(segment.text))
            else:
                yield segment


#: Results go to stdout, all else to stderr, so that a result can be piped. Names of models and paths may hold
#: anything: nothing that is printed is markup, and where a part has a style it is a `rich.text.Text`.
out = _Console(highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """``value`` as JSON on stdout, for programs."""
    typer.echo(json.dumps(value, indent=1, default=str))


def scaled(value: float, unit: str, digits: int = 3) -> str:
    """``value`` with a decimal prefix: ``23.4 GB/s``."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{abs(value):.{digits}g}") >= factor:  # what rounds to 1000 of a prefix is 1 of the next
            return f"{value / factor:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}"
