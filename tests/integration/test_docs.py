"""The pages of the documentation: their examples run as they stand, and the site is built from them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import build
import pages
import ports
import pytest
from waiting import wait_until

import onnxsplit

PAGE = pages.blocks_of("docs/python.md")


@pytest.fixture
def folder(tmp_path):
    build.save(build.chain(), tmp_path)
    return tmp_path


def test_the_examples_for_python_run_as_they_stand(folder, python_environment):
    pytest.importorskip("torch", reason="needs PyTorch")
    code = "".join(block for kind, block in PAGE if kind == "python")
    environment = {**python_environment, "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"print\(.*\)  # (<[^.]*)", code)
    assert all(any(line.startswith(start) for line in done.stdout.splitlines()) for start in shown)
    assert done.stdout.splitlines()[-1] == "50"


def test_the_service_with_fastapi_answers(folder, python_environment):
    pytest.importorskip("fastapi", reason="needs the extra test")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from onnxsplit import partition

    partition(folder / "model.onnx", stages=2, out=folder / "model.plan", costs="analytic")
    (code,) = [block for kind, block in PAGE if kind == 'python title="app.py"']
    (folder / "app.py").write_text(code)
    (block,) = [block for kind, block in PAGE if kind == "console"]
    (_, serve), (_, ask) = pages.commands(block)
    port = ports.free_port()
    program, *words = shlex.split(serve)
    server = subprocess.Popen(
        [sys.executable, "-m", program, *words, "--port", str(port)], cwd=folder, env=python_environment
    )

    def asked(rows: list[list[float]]) -> dict | None:
        """The answer to the page's request with these rows; None as long as there is none."""
        command = shlex.split(ask.replace("localhost:8000", f"127.0.0.1:{port}").replace("[[...]]", json.dumps(rows)))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    try:
        good = wait_until(lambda: asked([[0.5] * 32]), "the service answers")
        assert len(good["y"][0]) == 32
        assert "expected 32" in asked([[0.5] * 3])["detail"]
    finally:
        server.terminate()
        assert server.wait(60) in (0, -15)


@pytest.mark.timeout(600)
def test_the_tutorial_works_in_a_clean_folder(tmp_path, python_environment):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from reader import Reader

    blocks = pages.blocks_of("docs/tutorial.md")
    assert {kind for kind, _ in blocks} == {"console", "python", 'python title="make_model.py"'}
    with ExitStack() as opened:
        reader = Reader(tmp_path, {**python_environment, "ONNXSPLIT_PARTITION_ROUNDS": "1"}, opened)
        for kind, block in blocks:
            reader.follow(kind, block)
        assert reader.addresses, "the tutorial starts no server"


def test_the_site_has_every_page_and_every_public_name(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=pages.ROOT, capture_output=True, text=True, check=False, timeout=280,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")}
    sources = {path.relative_to(pages.ROOT / "docs").with_suffix("") for path in pages.ROOT.glob("docs/**/*.md")}
    assert sources <= written
    navigation = (tmp_path / "index.html").read_text()
    assert all(f'href="{source}.html"' in navigation for source in sources - {Path("index")}), "a page is in no menu"
    api = (tmp_path / "api.html").read_text()
    for name in set(onnxsplit.__all__) - {"__version__"}:
        assert re.search(rf'id="[\w.]*\b{name}"', api), f"{name} is not in the reference"
    assert "https://fonts" not in navigation, "the site fetches nothing"
