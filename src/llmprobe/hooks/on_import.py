"""Run a callback once a module has been imported, without importing it ourselves.

Engines are imported in an order of their own; importing one of their modules early to wrap it would
change that order and can initialise a device too soon.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` now if ``name`` is imported already, else right after it is.

    An import that fails leaves the callback waiting for the next one.
    The callback must not raise; wrap it in a guard.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        callback(module)
        return
    _FINDER.waiting.setdefault(name, []).append(callback)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def forget_all() -> None:
    """Drop every callback that has not run, and leave the import system as it was."""
    _FINDER.waiting.clear()
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules that are waited for as the other finders do, and puts our loader around theirs.

    Being asked takes nothing away: programs look for modules that they do not import.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callback]] = {}
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        names: set[str] = self._searching.__dict__.setdefault("names", set())
        if fullname in names:  # another finder asks them all, as we do
            return None
        names.add(fullname)
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
                        spec.loader = _Loader(fullname, spec.loader)
                    return spec
        finally:
            names.discard(fullname)
        return None


class _Loader(importlib.abc.Loader):
    """The module's own loader, with the callbacks behind it."""

    def __init__(self, name: str, inner: Any) -> None:
        self._name = name
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # not there yet while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # A copy that somebody runs for themselves is not the import that is waited for.
        imported = sys.modules.get(self._name) is module
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        if not imported:
            return
        while callbacks := _FINDER.waiting.pop(self._name, None):  # a callback may wait for more
            for callback in callbacks:
                callback(module)
        if not _FINDER.waiting:
            forget_all()


_FINDER = _Finder()
