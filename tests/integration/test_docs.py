"""The examples of docs/python.md run as they stand, in their order, in a clean folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request

import build
import pages
import ports
import pytest
from waiting import wait_until

PAGE = (pages.ROOT / "docs" / "python.md").read_text()


@pytest.fixture
def folder(tmp_path):
    build.save(build.chain(), tmp_path)
    return tmp_path


def test_the_examples_for_python_run_as_they_stand(folder, python_environment):
    pytest.importorskip("torch", reason="needs PyTorch")
    code = "".join(block for kind, block in pages.blocks(PAGE) if kind == "python")
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
    (code,) = [block for kind, block in pages.blocks(PAGE) if kind == "python file=app.py"]
    (folder / "app.py").write_text(code)
    port = ports.free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port)], cwd=folder, env=python_environment
    )
    try:
        good = wait_until(lambda: asked(port, {"x": [[0.5] * 32]}), "the service answers")
        assert good[0] == 200
        assert len(good[1]["y"][0]) == 32
        status, answer = asked(port, {"x": [[0.5] * 3]})
        assert status == 400
        assert "expected 32" in answer["detail"]
    finally:
        server.terminate()
        assert server.wait(60) in (0, -15)


def asked(port: int, body: object) -> tuple[int, dict] | None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except urllib.error.URLError:
        return None
