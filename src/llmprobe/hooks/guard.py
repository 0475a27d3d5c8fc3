"""The one broad ``except``: what fails in llmprobe never reaches the host.

Bookkeeping runs inside `Guard`; the host's own call never does, so its exceptions pass untouched.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from llmprobe.settings import logger

ERROR_LIMIT = 10


class Guard:
    """Counts what llmprobe swallowed in this process, and gives up after `ERROR_LIMIT` errors."""

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()
        self.inert = False
        #: Called with (where, error) for everything swallowed; the journal counts through it.
        self.observers: list[Callable[[str, Exception], None]] = []
        self._said = threading.Event()

    def failed(self, where: str, error: Exception) -> None:
        """Note an error that is being swallowed. Never raises."""
        self.errors[where] += 1
        for observer in self.observers:
            # An observer writes to the journal; if that is what fails, it must not reach the host either.
            with contextlib.suppress(Exception):
                observer(where, error)
        total = sum(self.errors.values())
        if total == 1:
            logger().warning("error in %s: %r; the host is not affected", where, error)
        if total >= ERROR_LIMIT and not self._said.is_set():
            self._said.set()
            self.inert = True
            logger().error(
                "%d internal errors, the last in %s: %r; the probe is off in this process",
                total,
                where,
                error,
            )

    def call(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, or None if it failed or the guard has given up."""
        if self.inert:
            return None
        return self.call_even_inert(where, function, *arguments)

    def call_even_inert(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """As `call`, also once the guard has given up: for what tells readers that it has."""
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 - this is the guard
            self.failed(where, error)
            return None
