"""Callbacks behind imports."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from llmprobe.hooks import on_import
from llmprobe.hooks.on_import import forget_all, when_imported

NAME = "llmprobe_test_waited_for"


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    waiting, meta_path = dict(on_import._FINDER.waiting), list(sys.meta_path)
    forget_all()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a source that is rewritten within a second
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1\n")
    yield path
    sys.modules.pop(NAME, None)
    forget_all()
    on_import._FINDER.waiting.update(waiting)
    sys.meta_path[:] = meta_path


def load() -> ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(NAME)


def test_a_callback_gets_the_finished_module() -> None:
    seen = []
    when_imported(NAME, lambda module: seen.append(module.value))
    assert seen == []
    load()
    assert seen == [1]


def test_looking_for_the_module_leaves_the_callback() -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    for _ in range(2):
        spec = importlib.util.find_spec(NAME)
        assert spec is not None
        assert spec.origin is not None
    assert seen == []
    module = load()
    assert seen == [module]


def test_a_private_copy_leaves_the_callback() -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.value == 1
    assert seen == []
    module = load()
    assert seen == [module]


def test_every_callback_runs_once_in_order() -> None:
    seen: list[str] = []
    when_imported(NAME, lambda module: seen.append("first"))
    when_imported(NAME, lambda module: seen.append("second"))
    module = load()
    importlib.reload(module)
    assert seen == ["first", "second"]


def test_a_module_that_is_there_already_needs_no_import() -> None:
    module = load()
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    assert seen == [module]
    assert on_import._FINDER not in sys.meta_path


def test_an_import_that_fails_leaves_the_callback_for_the_next(source: Path) -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    source.write_text("raise ImportError('not yet')\n")
    with pytest.raises(ImportError, match="not yet"):
        load()
    assert seen == []
    source.write_text("value = 2\n")
    module = load()
    assert seen == [module]


def test_a_module_that_cannot_be_found_leaves_the_callback(source: Path) -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    source.rename(source.with_suffix(".away"))
    with pytest.raises(ModuleNotFoundError):
        load()
    source.with_suffix(".away").rename(source)
    module = load()
    assert seen == [module]


def test_a_callback_added_while_the_module_runs_is_called(source: Path) -> None:
    seen: list[str] = []
    when_imported(NAME, lambda module: when_imported(NAME, lambda module: seen.append("later")))
    load()
    assert seen == ["later"]


def test_a_finder_that_asks_all_finders_does_not_go_round_in_circles() -> None:
    class Asking(importlib.abc.MetaPathFinder):
        asking = False

        def find_spec(self, fullname: str, path: object, target: object = None) -> object:
            if self.asking:
                return None
            self.asking = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                self.asking = False

    seen: list[ModuleType] = []
    sys.meta_path.insert(0, Asking())  # type: ignore[arg-type]
    when_imported(NAME, seen.append)
    module = load()
    assert seen == [module]


def test_an_imported_module_keeps_its_own_loader_and_the_finder_goes() -> None:
    when_imported(NAME, lambda module: None)
    module = load()
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert on_import._FINDER not in sys.meta_path


def test_what_is_forgotten_between_search_and_import_is_not_called() -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.loader is not None
    forget_all()
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert seen == []
