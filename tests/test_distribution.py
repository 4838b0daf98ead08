"""What the source distribution holds, and what it says about itself."""

from __future__ import annotations

import email.policy
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pages
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
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar", "--dist-dir", "out"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (archive,) = (folder / "out").iterdir()
    with tarfile.open(archive) as opened:
        return {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}


def files_of(*folders: str) -> set[str]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found if path.is_file()}


def test_the_source_distribution_holds_packages_documentation_and_models(held):
    models = {name for name in files_of("models") if Path(name).suffix in (".py", ".toml", ".png")}
    single = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "setup.py"}
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


SOURCE = "https://source.example/onnxsplit"


def described(folder: Path, *urls: str) -> str:
    """Return the description in the metadata of a wheel, with these lines in ``[project.urls]``."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77 or newer")
    shutil.copytree(ROOT, folder / "copy", ignore=SKIPPED)
    with (folder / "copy" / "pyproject.toml").open("a") as stream:
        stream.write("\n".join(["", "[project.urls]", *urls, ""]))
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "copy", check=True, capture_output=True, timeout=120)
    (metadata,) = (folder / "copy").glob("*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(), policy=email.policy.default)
    assert message["Description-Content-Type"] == "text/markdown"
    return message.get_payload()


def without_code(text: str) -> str:
    return pages.FENCE.sub("", text)


def test_a_registry_shows_no_link_or_picture_that_leads_nowhere(tmp_path):
    text = described(tmp_path)
    assert text.startswith("# onnxsplit")
    assert re.findall(r"\]\(", without_code(text)) == []
    assert "docs/serving.md" in text, "the reader still learns where it is said"
    rest = re.sub(r"!\[.*?\]\(.*?\)|\]\([^)]*\)|[\[\]]", "", without_code((ROOT / "README.md").read_text()))
    assert re.sub(r"[\[\]]", "", without_code(text)).split() == rest.split(), "nothing else is lost"


def test_links_and_pictures_lead_to_the_repository_if_it_has_an_address(tmp_path):
    text = described(tmp_path, f'Source = "{SOURCE}"')
    found = re.findall(r"\]\((\S+?)\)", without_code(text))
    assert [link for link in found if not link.startswith(f"{SOURCE}/")] == []
    assert f"{SOURCE}/blob/HEAD/docs/serving.md" in found
    assert f"{SOURCE}/raw/HEAD/docs/page-loaded.png" in found
    paths = {link.removeprefix(f"{SOURCE}/").split("/", 2)[2] for link in found}
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_a_registry_can_render_the_description(tmp_path):
    markdown = pytest.importorskip("readme_renderer.markdown", reason="needs the extra test")
    page = markdown.render(described(tmp_path))
    assert page is not None
    assert "<h1" in page
    assert "<pre" in page
