"""What the source distribution holds, and what it says about itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> set[str]:
    """The files of the source distribution. It is built from a copy, because building leaves files behind."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("sdist") / "copy"
    shutil.copytree(ROOT, folder, ignore=SKIPPED)
    (folder / "models" / "made.onnx").touch()  # as runs of the models leave
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "--quiet", "sdist", "--formats=tar", "--dist-dir", "out"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (archive,) = (folder / "out").iterdir()
    with tarfile.open(archive) as opened:
        return {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}


def files_of(*folders: str) -> set[str]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found if path.is_file()}


def test_the_source_distribution_holds_packages_documentation_and_models(held):
    models = {name for name in files_of("models") if Path(name).suffix in (".py", ".toml", ".png")}
    single = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"}
    assert files_of("onnxsplit", "runtime", "docs") | models | single <= held


def test_the_source_distribution_holds_no_stray_tests_and_nothing_that_was_made(held):
    assert not {name for name in held if name.startswith(("tests", "benchmarks"))}
    assert not {name for name in held if name.endswith((".onnx", ".pyc"))}


def test_the_project_says_who_made_it_and_for_whom():
    project = SETTINGS["project"]
    assert project["authors"] == [{"name": "onnxsplit contributors"}]
    assert {"onnx", "inference", "serving"} <= set(project["keywords"])
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]


def test_the_documentation_says_how_to_install_pytorch_without_cuda():
    text = (ROOT / "docs" / "export.md").read_text()
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in text
