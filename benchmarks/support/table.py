"""A table of results: for people in a terminal, and as it stands in the docs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

_WIDTH = 140  # where nobody's window sets it


@dataclass
class Results:
    """A titled table with the command and the machine that gave it."""

    title: str
    command: str
    machine: str
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    #: Sentences that belong below it.
    notes: list[str] = field(default_factory=list)

    def show(self, markdown: bool) -> None:
        """Print it."""
        if markdown:
            print("\n".join(self._markdown()))
            return
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _WIDTH
        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for line in (f"$ {self.command}", self.machine, *self.notes):
            console.print(line, markup=False, soft_wrap=True)

    def _markdown(self) -> list[str]:
        lines = [f"### {self.title}", "", f"`{self.command}`", "", f"{self.machine}.", ""]
        lines.append("| " + " | ".join(self.header) + " |")
        lines.append("|---|" + "---:|" * (len(self.header) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return lines


def command(script: str) -> str:
    """This script's command line, without what only says where its results go."""
    arguments = []
    words = iter(sys.argv[1:])
    for word in words:
        if word == "--json":
            next(words, None)
        elif word != "--markdown" and not word.startswith("--json="):
            arguments.append(word)
    return " ".join([f"python benchmarks/{script}", *arguments])


def bar(value: float, most: float, unit: str, digits: int = 0) -> str:
    """The bar and whether ``value`` is within it."""
    return f"≤ {most:.{digits}f} {unit}: {'held' if value <= most else 'MISSED'}"
