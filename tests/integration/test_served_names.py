"""The names that clients call a language model by, and the command that ``serve`` prints for them."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys

import pytest
from text_plans import text_plan

pytest.importorskip("uvicorn", reason="needs the extra serve")


def start(plan, environment, name) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "onnxsplit", "serve", str(plan), "--threads", "1", "--http-port", "0"]
    command += ["--grpc-port", "0", "--served-model-name", name]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_commands_that_serve_prints_work_for_names_with_quotes(tmp_path, python_environment):
    name = """it's "mine" $HOME"""
    process = start(text_plan(tmp_path / "it's one.plan"), python_environment, name)
    lines = iter(process.stdout.readline, "")
    model = next(found for found in lines if "/v2/models/" in found)
    line = next(found for found in lines if "/v1/chat/completions" in found)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert shlex.split(model)[-1].endswith("/v2/models/it%27s%20one")
    words = shlex.split(re.search("curl .*", line)[0])
    assert json.loads(words[words.index("-d") + 1])["model"] == name


@pytest.mark.parametrize("name", ["", "  ", "a\nb"])
def test_a_name_that_cannot_be_shown_is_refused(tmp_path, python_environment, name):
    process = start(text_plan(tmp_path / "m.plan"), python_environment, name)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"--served-model-name {name!r} cannot be used" in errors
    assert "Traceback" not in errors
