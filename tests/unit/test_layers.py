"""Dependencies point one way: hooks → record → collect → compute → export; nothing imports upwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llmprobe

ROOT = Path(llmprobe.__file__).parent

#: layer → the layers it may import, besides itself
ALLOWED = {
    "settings": set(),
    "processors": set(),
    "compute": set(),
    "record": {"settings"},
    "hooks": {"record", "processors", "settings"},
    "collect": {"record", "compute", "settings"},
    "export": {"collect", "compute", "record"},
    "analysis": {"compute"},
    "capture": {"analysis", "compute", "record", "processors", "settings"},
    "agent": {"capture", "analysis", "export", "collect", "compute", "record", "processors", "settings"},
}
#: What runs inside the engine may need only what the engine has, and these.
IN_ENGINE = {"settings", "processors", "record", "hooks", "compute"}
ENGINE_HAS = {"numpy", "nvtx", "torch", "vllm", "transformers", "prometheus_client"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((parts[0], path))
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            if node.module == "llmprobe":
                names.update(f"llmprobe.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(
    ("layer", "path"), modules(), ids=lambda value: str(value).rpartition("llmprobe/")[2]
)
def test_a_module_imports_only_what_lies_below_it(layer: str, path: Path) -> None:
    if layer not in ALLOWED:
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("llmprobe.")}
    used &= set(ALLOWED) | {"cli", "demo", "measuring"}
    assert used - {layer} <= ALLOWED[layer]


@pytest.mark.parametrize(
    ("layer", "path"), modules(), ids=lambda value: str(value).rpartition("llmprobe/")[2]
)
def test_code_in_the_engine_needs_only_what_the_engine_has(layer: str, path: Path) -> None:
    import sys

    if layer not in IN_ENGINE:
        return
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"llmprobe"}
    if path.name == "settings.py":
        outside -= {"tomli"}
    assert outside <= ENGINE_HAS


def test_no_import_leads_back_to_where_it_came_from() -> None:
    """Also none inside a function, or for annotations alone."""
    # The package itself gives its version to everybody, and imports only where it is called.
    paths = {
        ".".join(("llmprobe", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    del paths["llmprobe"]
    leads_to: dict[str, set[str]] = {}
    for name, path in paths.items():
        leads_to[name] = modules_named(path, set(paths)) - {name}
    while ends := [
        name
        for name, found in leads_to.items()
        if not found & set(leads_to) or not any(name in of for of in leads_to.values())
    ]:
        for name in ends:
            del leads_to[name]
    assert not leads_to, {name: sorted(found & set(leads_to)) for name, found in leads_to.items()}


def modules_named(path: Path, known: set[str]) -> set[str]:
    """Those of ``known`` that a file imports, or imports something from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in inside.values()}
    return found & known
