"""Chat templates are rendered as ``transformers`` renders them, in a process that keeps its limits."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, TOKENS
from text_plans import small_tokenizer
from waiting import wait_until

from onnxsplit.errors import InputError
from runtime.errors import PipelineClosed
from runtime.text.template import ChatTemplate
from runtime.text.template_process import TemplateProcess

transformers = pytest.importorskip("transformers")

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def process():
    shared = TemplateProcess(limit_s=60.0)  # far more than any test takes on a busy machine
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def fast_tokenizer():
    return transformers.PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), **TOKENS)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def rendered_or_refused(render) -> str | None:
    """The text, or None where the template refuses the conversation."""
    try:
        return render()
    except Exception:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name, process, fast_tokenizer):
    source = TEMPLATES[name]
    template = ChatTemplate(source, TOKENS, process)
    texts = 0
    for messages, variables in CONVERSATIONS:
        for prompts in (True, False):
            given = {"add_generation_prompt": prompts, **variables}
            theirs = partial(fast_tokenizer.apply_chat_template, chat_template=source, tokenize=False)
            ours = rendered_or_refused(partial(template.render, messages, **given))
            theirs = rendered_or_refused(partial(theirs, messages, **given))
            assert ours == theirs
            texts += ours is not None
    assert texts >= len(CONVERSATIONS), "most conversations are accepted"


ENDLESS = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
BOMBS = {
    "a text times a number": ('{{ "a" * 10**10 }}', "is too large"),
    "a list times a number": ("{{ ([1] * 10**9)|length }}", "is too large"),
    "a power": ("{{ 10**(10**9) }}", "is too large"),
    "a text joined with itself": (
        '{% set ns = namespace(x="a") %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}',
        "too much memory",
    ),
    "a list added to itself": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "too much memory",
    ),
    "a wide number": ('{{ "%1000000000d" % 1 }}', "too much memory"),
    "a wide format": ("{{ '{:1000000000}'.format(1) }}", "too much memory"),
    "a wide text": ("{{ 'x'|center(10**9) }}", "too much memory"),
    "a deep indent": ("{{ messages|tojson(indent=10**9) }}", "too much memory"),
    "a long range": ("{{ range(10**9) }}", "Range too big"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
    "brackets in brackets": ("{{ " + "(" * 5000, "calls itself too often"),
    "a long text": ("{% for i in range(10**5) %}{{ 'a' * 1000 }}{% endfor %}", "more than 8388608 characters"),
    "classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a module of a function": ("{{ raise_exception.__globals__.sys.modules }}", "refuses"),
    "the environment": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "refuses"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a module": ("{% import 'os' as os %}", "no loader"),
    "not a template": ("{% for %}", "line 1"),
    "its own words": ("{{ raise_exception('no system here') }}", "refuses the messages: no system here"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_does_harm_is_refused_and_the_next_one_works(name, process):
    source, message = BOMBS[name]
    with pytest.raises(InputError, match=message):
        ChatTemplate(source, {}, process).render(ASK)
    assert ChatTemplate("{{ messages[0].content }}", {}, process).render(ASK) == "hi"


def test_a_template_that_takes_too_long_is_ended_and_the_next_one_works():
    process = TemplateProcess(limit_s=0.2)
    try:
        with pytest.raises(InputError, match=r"takes more than 0\.2 s"):
            ChatTemplate(ENDLESS, {}, process).render(ASK)
        process._limit_s = 60.0
        assert ChatTemplate("{{ messages[0].content }}", {}, process).render(ASK) == "hi"
    finally:
        process.close()


def test_the_process_has_little_memory_and_no_more_descriptors_than_it_needs(process):
    ChatTemplate("{{ 1 }}", {}, process).render(ASK)
    child = psutil.Process(process._running._process.pid)
    assert child.rlimit(psutil.RLIMIT_AS) == (512 << 20, 512 << 20)
    assert child.num_fds() == 3
    assert set(child.environ()) <= {"PATH", "TZ", "LD_LIBRARY_PATH"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list"),
        (["hi"], "holds 'hi' at place 0"),
        ([{"role": "user", "content": b"hi"}], "data of JSON"),
        ([{"role": "user", "content": "x" * (33 << 20)}], "at most 33554432 are allowed"),
    ],
)
def test_only_json_goes_in(messages, message, process):
    with pytest.raises(InputError, match=message):
        ChatTemplate("{{ messages }}", {}, process).render(messages)


def test_tools_take_the_template_for_them(process):
    both = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"}, {}, process)
    assert [both.render(ASK), both.render(ASK, tools=[{}])] == ["plain", "tools"]
    assert ChatTemplate({"default": "plain"}, {}, process).render(ASK, tools=[{}]) == "plain"
    with pytest.raises(InputError, match="none is named default"):
        ChatTemplate({"rag": "rag"}, {}, process).render(ASK)


def test_variables_of_the_caller_come_before_those_of_the_model_and_never_replace_messages(process):
    template = ChatTemplate("{{ bos_token }}{{ self_ }}{{ messages[0].content }}", {"bos_token": "<s>"}, process)
    assert template.render(ASK, bos_token="<t>", self_=1, messages=[]) == "<t>1hi"


def test_many_threads_get_their_own_texts():
    process = TemplateProcess()
    template = ChatTemplate("{{ messages[0].content * 100 }}", {}, process)
    wrong = []

    def ask(number: int) -> None:
        for turn in range(50):
            text = f"{number}.{turn} "
            if template.render([{"role": "user", "content": text}]) != text * 100:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.close()
    assert not wrong


def test_a_killed_process_is_replaced_and_none_is_left():
    before, open_before = children(), psutil.Process().num_fds()
    template = ChatTemplate("{{ messages[0].content }}", {})
    for _ in range(3):
        template.render(ASK)
        (child,) = children() - before
        psutil.Process(child).kill()
        with pytest.raises(InputError, match="ended the process"):
            template.render(ASK)
    assert template.render(ASK) == "hi"
    template.close()
    template.close()
    assert (children(), psutil.Process().num_fds()) == (before, open_before)
    with pytest.raises(PipelineClosed):
        template.render(ASK)


def test_a_template_that_nobody_holds_leaves_no_process():
    before = children()
    template = ChatTemplate("{{ 1 }}", {})
    template.render(ASK)
    assert len(children() - before) == 1
    del template
    gc.collect()
    assert children() == before


def test_closing_does_not_wait_for_a_rendering():
    template = ChatTemplate(ENDLESS, {}, TemplateProcess(limit_s=600))
    failures: list[Exception] = []

    def ask() -> None:
        try:
            template.render(ASK)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: template._process._running is not None, "the start")
    time.sleep(0.2)  # so that it renders; closing is right before, too
    template.close()
    thread.join(30)
    assert [type(failure) for failure in failures] == [PipelineClosed]


def test_the_process_ends_with_its_parent(tmp_path):
    program = (
        "import os, signal\n"
        "from runtime.text.template import ChatTemplate\n"
        "template = ChatTemplate('{{ 1 }}', {})\n"
        "template.render([{'role': 'user', 'content': ''}])\n"
        "print(template._process._running._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True
    )
    wait_until(lambda: not psutil.pid_exists(int(ended.stdout)), "the end of the process")


def test_an_interrupt_while_it_waits_does_not_mix_up_answers(monkeypatch):
    process = TemplateProcess()
    template = ChatTemplate("{{ messages[0].content }}", {}, process)
    template.render(ASK)
    running = process._running
    monkeypatch.setattr(running, "receive", lambda limit_s: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "second"
    process.close()


def test_json_of_variables_may_hold_anything_that_json_can(process):
    value = {"a": [1, 2.5, None, True, "ü🙃\ud83d", {"b": []}]}
    text = ChatTemplate("{{ x | tojson }}", {}, process).render(ASK, x=value)
    assert json.loads(text) == value
