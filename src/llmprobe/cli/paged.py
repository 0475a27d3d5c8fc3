"""Something longer than the terminal, of which a part is shown."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text


@dataclass
class Paged:
    """As many lines of ``content`` as fit, from line ``first`` on, and a line about the keys below.

    A ``first`` beyond the end shows the end. Once it was rendered, ``room`` is how many lines of the content
    fit, and ``most`` the highest ``first`` that leaves no line empty.
    """

    content: RenderableType
    first: int
    height: int
    keys: str
    room: int = 1
    most: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options.update(height=None), pad=False)
        self.room = max(self.height - 1, 1)
        self.most = max(len(lines) - self.room, 0)
        first = min(self.first, self.most)
        last = min(first + self.room, len(lines))
        for line in lines[first:last]:
            yield from line
            yield Segment.line()
        more = f"  ↑↓ lines {first + 1} to {last} of {len(lines)}" if self.most else ""
        yield Text(f"{self.keys}{more}", style="dim", no_wrap=True, overflow="ellipsis", end="")
