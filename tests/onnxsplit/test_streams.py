"""The command line with full, closed or unread streams, and with a command that raises any error."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import build
import pytest

from onnxsplit.cli.output import make_command

FULL = "onnxsplit: cannot write to standard output: No space left on device\n"
CLOSED = "onnxsplit: cannot write to standard output: Bad file descriptor\n"
SPEAKING = [["--help"], ["completion", "bash"], ["doctor", "--json"]]
FAILING = [["run", "absent.plan", "--json"], ["partition", "--nonsense", "--json"]]


@pytest.fixture
def onnxsplit(python_environment, tmp_path):
    """Call it through a shell, which can close descriptors; return the exit code and the text on stderr."""

    def call(arguments, redirection: str, stderr=subprocess.PIPE):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "onnxsplit", *arguments],
            stdout=subprocess.DEVNULL, stderr=stderr, env=python_environment, cwd=tmp_path, check=False, timeout=120,
        )  # fmt: skip
        return done.returncode, (done.stderr or b"").decode()

    return call


@pytest.mark.parametrize("arguments", SPEAKING, ids=" ".join)
def test_output_that_cannot_be_written_is_one_message(onnxsplit, arguments):
    assert onnxsplit(arguments, "> /dev/full") == (1, FULL)
    assert onnxsplit(arguments, ">&-") == (1, CLOSED)


@pytest.mark.parametrize("arguments", FAILING, ids=" ".join)
def test_an_error_is_printed_although_its_json_cannot_be_written(onnxsplit, arguments):
    code, told = onnxsplit(arguments, "> /dev/full")
    assert code == 1
    assert told.endswith(FULL)
    assert "absent.plan" in told or "--nonsense" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("arguments", SPEAKING[:2], ids=" ".join)
def test_a_reader_that_leaves_ends_it_without_a_word(arguments, python_environment, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "onnxsplit", *arguments],
        stdout=writing, stderr=subprocess.PIPE, env=python_environment, cwd=tmp_path, check=False, timeout=120,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-", "<&- 2>&-"])
@pytest.mark.parametrize(("arguments", "code"), [(["keys", "new", "x/x"], 0), (["keys", "new", "."], 1), (["x"], 2)])
def test_what_is_lost_on_stderr_changes_nothing_else(onnxsplit, tmp_path, redirection, arguments, code):
    (tmp_path / "file").touch()
    assert onnxsplit(arguments, redirection)[0] == code


def test_a_whole_command_runs_with_no_descriptor_open(onnxsplit, tmp_path):
    build.save(build.chain(), tmp_path)
    assert onnxsplit(["partition", "model.onnx", "--costs", "analytic", "-q"], "<&- >&- 2>&-")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.plan"]


@contextmanager
def limited(kind: int, most: int):
    """Limits that a child process inherits: the size of files, and memory."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def plain(arguments, environment, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnxsplit", *arguments],
        capture_output=True, text=True, env=environment, cwd=folder, check=False, timeout=120,
    )  # fmt: skip


def test_a_disk_that_is_full_is_one_message_and_nothing_is_left(python_environment, tmp_path):
    build.save(build.chain(width=64), tmp_path)
    with limited(resource.RLIMIT_FSIZE, 20_000):
        done = plain(["partition", "model.onnx", "--costs", "analytic", "--json"], python_environment, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("onnxsplit: cannot write ")
    assert done.stderr.endswith("File too large\n")
    assert json.loads(done.stdout)["error"]["message"] in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "there is not enough memory for this; free some, or use a smaller model or smaller sizes"),
        (RecursionError("too deep"), "the input is nested too deeply to be read"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "f"), "f: No space left on device"),
        (ZeroDivisionError("a\nb"), "internal error: ZeroDivisionError: a b. Please report it with the output of -v"),
    ],
)
def test_whatever_is_raised_inside_a_command_is_one_message(capfd, error, words):
    @make_command
    def broken(output):
        raise error

    for options in ([], ["--json"], ["-v"]):
        with pytest.raises(SystemExit, match="1"):
            broken(options, standalone_mode=False)
        told, said = capfd.readouterr()
        assert said.splitlines()[-1] == f"onnxsplit: {words}"
        assert ("Traceback" in said) == (options == ["-v"])
        assert told == "" or json.loads(told) == {"error": {"type": type(error).__name__, "message": words}}


def test_a_folder_that_was_removed_is_one_message(python_environment, tmp_path):
    (tmp_path / "gone").mkdir()
    code = "import os\nos.chdir('gone')\nos.rmdir('../gone')\nfrom onnxsplit.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        capture_output=True, text=True, env=python_environment, cwd=tmp_path, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "onnxsplit: No such file or directory\n")


def test_file_names_that_are_not_text_are_refused_in_words(python_environment, tmp_path):
    strange = os.fsdecode(b"\xff.onnx")
    build.save(build.chain(), tmp_path, strange)
    done = plain(["inspect", strange, "--json"], python_environment, tmp_path)
    assert done.returncode == 1
    assert "'\\udcff.onnx', is not UTF-8 text" in done.stderr
    assert "is not UTF-8 text" in json.loads(done.stdout)["error"]["message"]
