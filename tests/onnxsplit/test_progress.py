"""The line of progress on a terminal: other output stands above it, each on a line of its own."""

from __future__ import annotations

import pytest
from terminal import on_terminal, screen

BEGIN = """
import logging, sys, threading, warnings
from onnxsplit.cli import streams
from onnxsplit.cli.output import Output
streams.prepare()
output = Output(as_json=False)
output.say("one of two")
"""
OTHERS = {
    "a log record": "logging.basicConfig(format='%(message)s'); logging.warning('other')",
    "a log record without a handler": "logging.getLogger('runtime.node').warning('other')",
    "a log record of another thread": (
        "t = threading.Thread(target=lambda: logging.getLogger('x').error('other')); t.start(); t.join()"
    ),
    "a note": "output.note('other')",
    "an aside": "output.aside('other')",
    "a line of the result": "output.line('other')",
    "a warning": "warnings.showwarning = lambda *_: sys.stderr.write('other\\n'); warnings.warn('other')",
    "a line in two parts": "output.piece('oth'); output.say('waits'); output.piece('er\\n'); output.say('one of two')",
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_output_stands_above_the_line_of_progress(python_environment, tmp_path, other):
    assert screen(on_terminal(BEGIN + OTHERS[other], python_environment, tmp_path)) == ["other", "one of two"]


@pytest.mark.parametrize("other", OTHERS)
def test_the_line_of_progress_is_gone_when_it_is_removed(python_environment, tmp_path, other):
    code = f"{BEGIN}{OTHERS[other]}\noutput.done()\noutput.note('end')"
    assert screen(on_terminal(code, python_environment, tmp_path)) == ["other", "end", ""]


def test_many_threads_print_whole_lines(python_environment, tmp_path):
    code = (
        f"{BEGIN}\nlog = logging.getLogger('x')\n"
        "def speak(name):\n    for number in range(50):\n        log.warning('%s %s', name, number)\n"
        "        output.say(f'{name} at {number}')\n"
        "threads = [threading.Thread(target=speak, args=(name,)) for name in 'abcd']\n"
        "for t in threads: t.start()\nfor t in threads: t.join()\noutput.done()"
    )
    shown = screen(on_terminal(code, python_environment, tmp_path))
    assert sorted(shown) == sorted(["", *(f"{name} {number}" for name in "abcd" for number in range(50))])


def test_a_long_text_takes_one_line(python_environment, tmp_path):
    code = BEGIN + "output.say('x' * 100); output.note('other')"
    assert screen(on_terminal(code, python_environment, tmp_path, columns=40)) == ["other", "x" * 39]


def test_a_terminal_that_knows_no_control_sequences_gets_none(python_environment, tmp_path):
    code = "import os; os.environ['TERM'] = 'dumb'\n" + BEGIN + OTHERS["a note"]
    assert "\x1b" not in on_terminal(code, python_environment, tmp_path)
