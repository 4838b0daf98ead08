"""Ctrl-C while the command line itself is still being imported."""

from __future__ import annotations

import signal
import subprocess
import sys


def version(code: str, environment, folder) -> subprocess.CompletedProcess:
    """Run Python code as the program ``onnxsplit --version``."""
    return subprocess.run(
        [sys.executable, "-c", code, "--version"],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_it_ends_in_one_line(python_environment, tmp_path):
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from onnxsplit.__main__ import run\n"
        "run()\n"
    )
    done = version(code, python_environment, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "onnxsplit: interrupted\n")


def test_it_stays_ignored_where_it_was(python_environment, tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from onnxsplit.__main__ import run\n"
        "try: run()\n"
        "finally: assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
    )
    done = version(code, python_environment, tmp_path)
    assert done.returncode == 0, done.stderr
