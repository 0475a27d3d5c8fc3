"""Our own layer around a method, with an undo that respects other tools' layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """One wrapped attribute of a class or module.

    ``make(original, patch)`` returns the wrapper. The wrapper must call ``original`` and nothing else
    while ``patch.active`` is False: a layer that another tool wrapped cannot be taken out, only silenced.
    """

    __slots__ = ("_make", "_original", "_wrapper", "active", "name", "owner")  # looked at in every step

    def __init__(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any], Patch], Callable[..., Any]]
    ) -> None:
        self.owner = owner
        self.name = name
        self.active = False
        self._make = make
        self._original: Any = None
        self._wrapper: Any = None

    @property
    def installed(self) -> bool:
        """Whether our wrapper is in the chain, as far as can be known."""
        return self._wrapper is not None

    def apply(self) -> None:
        """Wrap, or wake our layer if it is still in place. AttributeError if there is no ``name``."""
        if self._wrapper is None:
            original = _own(self.owner, self.name)
            function = original.__func__ if isinstance(original, (staticmethod, classmethod)) else original
            wrapper: Any = functools.wraps(function)(self._make(function, self))
            if isinstance(original, (staticmethod, classmethod)):
                wrapper = type(original)(wrapper)
            self._original, self._wrapper = original, wrapper
            setattr(self.owner, self.name, wrapper)
        self.active = True

    def remove(self) -> bool:
        """Silence our layer at once, and take it out if it is outermost. Returns whether it was."""
        self.active = False
        if self._wrapper is None:
            return True
        if _own(self.owner, self.name) is not self._wrapper:
            return False
        setattr(self.owner, self.name, self._original)
        self._original = self._wrapper = None
        return True


def _own(owner: Any, name: str) -> Any:
    """The attribute as ``owner`` itself defines it, not bound and not inherited."""
    try:
        return vars(owner)[name]
    except KeyError:
        raise AttributeError(f"{owner!r} defines no {name!r}") from None
