"""``onnxsplit chat`` and ``onnxsplit generate TEXT`` as people use them: on a terminal, and with pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest
from processes import running
from text_plans import END, text_plan
from waiting import PATIENCE_S, wait_until

from runtime import Pipeline

LONG = ("--stop-tokens", "none")  # the random model goes on until the context is full


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plan(tmp_path_factory.mktemp("chat") / "m.plan")


@pytest.fixture(scope="module")
def large_plan(tmp_path_factory):
    """One whose answers take seconds."""
    return text_plan(tmp_path_factory.mktemp("large") / "m.plan", length=8192)


@pytest.fixture(scope="module")
def text(plan):
    with Pipeline.launch(plan, threads=1) as pipeline:
        yield pipeline.text


def command(*words) -> list[str]:
    return [sys.executable, "-P", "-m", "onnxsplit", *map(str, words), "--threads", "1"]


def onnxsplit(environment, *words, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), env=environment, capture_output=True, text=True, check=False, **options)


_TAKE_TERMINAL = (  # a terminal that the leader of a session opens sends its Ctrl-C to it
    "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A command on a pseudo-terminal: what it shows is read until a text appears."""

    def __init__(self, environment, *words):
        self.main, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command(*words)],
            env={**environment, "TERM": "dumb"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self.shown = ""

    def until(self, pattern: str) -> str:
        """Read until a pattern appears in what is new; returns what came before its end."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.main], [], [], 0.1)[0]:
                self._read()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def _read(self) -> bool:
        try:
            data = os.read(self.main, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def interrupt_prompt(self) -> None:
        """Type Ctrl-C once the command waits for a key: ``input`` misses one between the prompt and its wait."""
        wait_until(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING, "the wait for a key")
        self.type("\x03")

    def end(self) -> int:
        """Wait for the end of the command; returns its exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.main], [], [], 0.1)[0]:
                self._read()
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.main)


def descendants(terminal) -> list[psutil.Process]:
    return psutil.Process(terminal.process.pid).children(recursive=True)


def all_gone(processes) -> bool:
    return not running(process.pid for process in processes)


def printable(text) -> str:
    return "".join(letter for letter in text if letter.isprintable() and letter != "\ufffd")


def chat_messages(*turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


def test_a_chat_on_a_terminal_streams_remembers_and_ends_with_ctrl_d(plan, text, python_environment):
    first = text.chat(chat_messages("dog"), max_tokens=5).result().text
    second = text.chat(chat_messages("dog", first, "fox"), max_tokens=5).result()
    with Terminal(python_environment, "chat", plan, "--max-tokens", 5) as terminal:
        terminal.until("> ")
        terminal.type("dog\n")
        terminal.until("5 tokens, [0-9.]+ tokens/s, first after [0-9.]+ ms")
        terminal.until("> ")
        nodes = descendants(terminal)
        assert len(nodes) >= 3, "two nodes and the process of the template"
        terminal.type("fox\n")
        shown = terminal.until("5 tokens, ")
        assert printable(second.text) in printable(shown)
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    wait_until(lambda: all_gone(nodes), "the end of the nodes")


def test_ctrl_c_stops_the_answer_and_not_the_chat(large_plan, python_environment):
    with Terminal(python_environment, "chat", large_plan, *LONG) as terminal:
        terminal.until("> ")
        for _ in range(2):
            terminal.type("dog\n")
            terminal.until(r"dog\r\n\S")  # the answer has begun
            terminal.type("\x03")
            terminal.until(r"tokens/s, first after [0-9.,]+ ms; stopped")
            terminal.until("> ")
        nodes = descendants(terminal)
        assert len(nodes) >= 3
        terminal.interrupt_prompt()
        assert terminal.end() == 0
        assert "Traceback" not in terminal.shown
    wait_until(lambda: all_gone(nodes), "the end of the nodes")


def test_commands_of_a_chat(plan, text, python_environment):
    told = text.chat(chat_messages("dog", system="be brief"), max_tokens=3).result()
    with Terminal(python_environment, "chat", plan, "--max-tokens", 3, "--system", "be long") as terminal:
        terminal.until("> ")
        terminal.type("/help\n")
        terminal.until("/clear forgets the conversation")
        terminal.type("/system be brief\n")
        terminal.until("told so from now on")
        terminal.type("dog\n")
        terminal.until("3 tokens, ")
        terminal.type("/clear\n")
        terminal.until("is forgotten")
        terminal.type("/exit\n")
        assert terminal.end() == 0
    shown = onnxsplit(
        python_environment, "chat", plan, "--max-tokens", 3, "--system", "be brief", "--json", input="dog\n"
    )
    assert json.loads(shown.stdout)["tokens"] == list(told.tokens)


def test_a_killed_chat_leaves_no_process(plan, python_environment):
    with Terminal(python_environment, "chat", plan, "--max-tokens", 3) as terminal:
        terminal.until("> ")
        terminal.type("dog\n")
        terminal.until("3 tokens, ")
        nodes = descendants(terminal)
        terminal.process.send_signal(signal.SIGKILL)
        terminal.end()
    wait_until(lambda: all_gone(nodes), "the end of the nodes")


def test_without_a_terminal_each_line_is_a_message(plan, text, python_environment):
    first = text.chat(chat_messages("dog"), max_tokens=5).result().text
    second = text.chat(chat_messages("dog", first, "/clear"), max_tokens=5).result().text
    words = ("chat", plan, "--max-tokens", 5)
    shown = onnxsplit(python_environment, *words, input="dog\n\n/clear\n", encoding="utf-8")
    assert (shown.returncode, shown.stdout) == (0, f"{first}\n{second}\n")
    assert shown.stderr.count("5 tokens, ") == 2
    lines = onnxsplit(python_environment, *words, "--json", input="dog\n/clear", encoding="utf-8").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["text"] for answer in answers] == [first, second]
    assert {answer["reason"] for answer in answers} == {"length"}
    quiet = onnxsplit(python_environment, *words, "-q", input="dog\n", encoding="utf-8")
    assert (quiet.stdout, quiet.stderr) == (f"{first}\n", "")


def test_a_full_context_forgets_the_oldest_messages_and_says_so(plan, python_environment):
    lines = "".join(f"message {number} of a long conversation about a dog\n" for number in range(9))
    shown = onnxsplit(python_environment, "chat", plan, "--max-tokens", 30, *LONG, input=lines, errors="replace")
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.count("30 tokens, ") == 9
    assert "The context is full; the 2 oldest messages are forgotten." in shown.stderr


def test_a_message_that_never_fits_is_refused(plan, python_environment):
    shown = onnxsplit(python_environment, "chat", plan, input="dog " * 500)
    assert shown.returncode == 1
    assert "this pipeline has room for sequences of 256 tokens" in shown.stderr


def test_generate_prints_a_text_as_the_library_gives_it(plan, text, python_environment):
    wanted = text.complete("The quick", max_tokens=8, temperature=1.0, seed=2).result()
    words = ("generate", plan, "The quick", "--max-tokens", 8, "--temperature", 1, "--seed", 2)
    shown = onnxsplit(python_environment, *words, encoding="utf-8")
    assert shown.stdout.startswith(f"{wanted.text}\n\n8 tokens after {wanted.usage.prompt}, ended by")
    answer = json.loads(onnxsplit(python_environment, *words, "--json", "--logprobs", 1).stdout)
    assert (answer["text"], answer["tokens"]) == (wanted.text, list(wanted.tokens))
    assert (answer["reason"], answer["stop"]) == ("length", None)
    assert answer["usage"] == {"prompt": wanted.usage.prompt, "completion": 8, "cached": 0}
    assert answer["first_token_s"] > 0
    assert answer["tokens_per_s"] > 0
    assert len(answer["logprobs"]) == 8


def test_generate_takes_a_message_standard_input_and_stop_strings(plan, text, python_environment):
    options = {"max_tokens": 40, "stop_tokens": (), "temperature": 1.0, "seed": 2}
    whole = text.chat(chat_messages("Grüße"), **options).result().text
    stop = next(letter for letter in whole[5:] if letter.isascii() and letter.isalnum())
    words = ("generate", plan, "-", "--chat", "--max-tokens", 40, *LONG, "--temperature", 1, "--seed", 2)
    shown = onnxsplit(python_environment, *words, "--stop", "never", "--stop", stop, "--json", input="Grüße\n")
    answer = json.loads(shown.stdout)
    assert (answer["text"], answer["reason"], answer["stop"]) == (whole[: whole.index(stop)], "stop", stop)
    ended = onnxsplit(python_environment, "generate", plan, "dog", "--logit-bias", f"{END}=1e6", "--json")
    assert (json.loads(ended.stdout)["text"], json.loads(ended.stdout)["stop"]) == ("", END)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["generate"], 2, "TEXT - is read from standard input"),
        (["generate", "text", "--tokens", "1"], 2, "give either TEXT or --tokens"),
        (["generate", "--tokens", "1", "--chat"], 2, "--chat and --stop are for a TEXT"),
        (["generate", ""], 1, "the prompt '' has no tokens"),
        (["generate", "x", "--stop", ""], 1, "stop holds ''"),
    ],
)
def test_wrong_words_give_one_message(plan, python_environment, words, code, message):
    shown = onnxsplit(python_environment, words[0], plan, *words[1:])
    assert (shown.returncode, message in shown.stderr) == (code, True), shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_plan_without_a_tokenizer_is_refused_before_its_nodes_start(tmp_path, python_environment):
    folder = text_plan(tmp_path / "m.plan")
    plan = json.loads((folder / "plan.json").read_text())
    plan["decoder"]["text"] = []
    (folder / "plan.json").write_text(json.dumps(plan))
    for words in (("generate", folder, "dog"), ("chat", folder)):
        shown = onnxsplit(python_environment, *words, input="")
        assert shown.returncode == 1
        assert "has no tokenizer.json, so it reads no text" in shown.stderr


def test_a_plan_without_a_decoder_reads_no_text_and_no_tokens(chain_plan, python_environment):
    shown = onnxsplit(python_environment, "generate", chain_plan, "dog")
    assert shown.returncode == 1
    assert "has no decoder, so it reads no text; partition the model again" in shown.stderr
    assert "--tokens" not in shown.stderr, "it continues no tokens either"


def test_a_plan_without_a_template_does_not_chat(tmp_path, python_environment):
    shown = onnxsplit(python_environment, "chat", text_plan(tmp_path / "m.plan", template=None), input="dog\n")
    assert shown.returncode == 1
    assert "has no chat template; put chat_template.jinja" in shown.stderr


def test_a_message_that_never_fits_takes_nothing_from_the_conversation(plan, text, python_environment):
    first = text.chat(chat_messages("dog"), max_tokens=3).result().text
    second = text.chat(chat_messages("dog", first, "fox"), max_tokens=3).result()
    with Terminal(python_environment, "chat", plan, "--max-tokens", 3) as terminal:
        terminal.until("> ")
        terminal.type("dog\n")
        terminal.until("3 tokens, ")
        terminal.type("dog " * 300 + "\n")
        refused = terminal.until("shorten the prompt")
        assert "forgotten" not in refused
        terminal.until("> ")
        terminal.type("fox\n")
        shown = terminal.until("3 tokens, ")
        assert printable(second.text) in printable(shown)


def test_an_error_after_a_part_of_the_text_has_a_line_of_its_own(large_plan, python_environment):
    shown = onnxsplit(python_environment, "generate", large_plan, "dog", *LONG, "--timeout", 0.3, errors="replace")
    assert shown.returncode == 1
    assert "time ran out" in shown.stderr
    assert shown.stdout.endswith("\n")
