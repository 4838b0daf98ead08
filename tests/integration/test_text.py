"""Texts are continued by real processes, by the tokenizer and the template of their plan."""

from __future__ import annotations

import asyncio
import gc
import threading

import numpy as np
import psutil
import pytest
from text_plans import END, text_plan
from waiting import wait_until

from onnxsplit.errors import InputError
from runtime import Pipeline
from runtime.errors import Cancelled, PipelineClosed

ASK = [{"role": "user", "content": "Grüße aus Köln!"}]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plan(tmp_path_factory.mktemp("text") / "m.plan")


@pytest.fixture(scope="module")
def pipeline(plan):
    with Pipeline.launch(plan, threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def text(pipeline):
    return pipeline.text


@pytest.fixture(autouse=True)
def _nothing_is_left(pipeline):
    yield
    gc.collect()
    wait_until(
        lambda: all(stats.sequences == pipeline.sequences.kept for stats in pipeline.stats()),
        "the end of all sequences",
    )


def whole_text(text, prompt, count, **options) -> str:
    """The text of the tokens that the engine gives, all at once."""
    with text._generate(prompt, max_tokens=count, **options) as generation:
        return text.tokenizer.decode(generation.result().tokens)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 3.0, "seed": 8}])
def test_pieces_are_the_text_of_the_tokens(text, options):
    prompt = text.encode("The quick brown")
    wanted = whole_text(text, prompt, 60, stop_tokens=(), **options)
    pieces = list(text.complete("The quick brown", max_tokens=60, stop_tokens=(), **options))
    assert "".join(piece.text for piece in pieces) == wanted
    assert [piece.reason for piece in pieces] == [None] * 59 + ["length"]
    assert not any("\ufffd" in piece.text for piece in pieces if "\ufffd" not in wanted)


def test_a_prompt_is_a_text_or_its_tokens(text):
    prompt = text.encode("fox")
    texts = [text.complete(one, max_tokens=8).result().text for one in ("fox", prompt, list(prompt), np.array(prompt))]
    assert len(set(texts)) == 1


def test_a_conversation_is_rendered_and_answered(text):
    tokens = text.encode("<|im_start|>user\nGrüße aus Köln!<|im_end|>\n<|im_start|>assistant\n", special=False)
    assert text.chat_tokens(ASK) == tokens
    assert text.chat(ASK, max_tokens=9).result().tokens == text.complete(tokens, max_tokens=9).result().tokens
    assert text.chat(ASK, max_tokens=1).prompt == tokens


def test_a_stop_string_ends_the_text_and_the_sequence(text, pipeline):
    options = {"max_tokens": 200, "stop_tokens": (), "temperature": 1.0, "seed": 3}
    whole = text.complete("dog", **options).result().text
    stop = whole[40:43]
    wanted = whole[: whole.index(stop)]
    with text.complete("dog", stop=["never there", stop], **options) as generation:
        result = generation.result()
        assert (result.text, result.reason, result.stop) == (wanted, "stop", stop)
        assert result.usage.completion == len(result.tokens) < 200
        assert text.tokenizer.decode(result.tokens).startswith(wanted + stop)
        wait_until(lambda: generation.generation.done, "the end of the sequence")
    kept = text.complete("dog", stop=stop, include_stop=True, **options).result()
    assert kept.text == wanted + stop


def test_an_end_token_is_not_in_the_text(text):
    bias = {END: 1e6}
    result = text.complete("dog", min_tokens=3, max_tokens=9, logit_bias=bias, logprobs=2).result()
    assert (result.reason, result.stop, len(result.tokens), result.tokens[-1]) == ("stop", END, 4, END)
    assert "<|end|>" not in result.text
    assert len(result.logprobs) == 4
    assert {len(one.top) for one in result.logprobs} == {2}


def test_the_result_has_also_what_was_read_before_and_can_be_had_again(text):
    whole = text.complete("dog", max_tokens=12, seed=1).result()
    generation = text.complete("dog", max_tokens=12, seed=1)
    next(generation)
    assert generation.usage.completion == 1
    assert (generation.result(), generation.result()) == (whole, whole)
    assert list(generation) == []


def test_an_event_loop_reads_and_awaits(text):
    async def both():
        whole = await text.complete("dog", max_tokens=12)
        return whole, [piece async for piece in text.complete("dog", max_tokens=12)]

    whole, pieces = asyncio.run(both())
    assert "".join(piece.text for piece in pieces) == whole.text
    assert whole.usage.completion == 12


def test_another_thread_ends_it(text):
    generation = text.complete("dog", stop_tokens=(), min_tokens=200)
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.extend(piece.text for piece in generation))
    thread.start()
    wait_until(lambda: read or generation.usage.completion > 2, "the first pieces")
    generation.close()
    generation.close()
    thread.join(30)
    assert not thread.is_alive()
    assert list(generation) == []
    with pytest.raises(Cancelled, match="closed before its end"):
        generation.result()


def test_closing_it_ends_a_task_that_waits(text):
    async def close_while_it_waits():
        generation = text.complete("dog", stop_tokens=(), min_tokens=200)
        pieces = []

        async def read():
            async for piece in generation:
                pieces.append(piece)
                if len(pieces) == 3:
                    generation.close()

        await asyncio.wait_for(asyncio.create_task(read()), 30)
        return len(pieces)

    assert asyncio.run(close_while_it_waits()) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda text: text.complete("dog", max_token=3),
            "no option 'max_token'. Did you mean 'max_tokens'. There are stop, .*max_tokens",
        ),
        (lambda text: text.chat(ASK, temprature=1), "no option 'temprature'"),
        (lambda text: text._generate([1], stop="x"), "no option 'stop'.* There are max_tokens"),
        (lambda text: text.complete(""), "the prompt '' has no tokens"),
        (lambda text: text.complete([]), "tokens is empty"),
        (lambda text: text.complete("dog", stop=[""]), "stop holds ''"),
        (lambda text: text.complete("dog", top_p=2), "top_p must be a number from 0 to 1"),
        (lambda text: text.complete("dog " * 500), "the prompt has .* tokens, but this pipeline has room"),
        (lambda text: text.chat([]), "messages is empty"),
        (lambda text: text.chat([{"role": "user", "content": "x"}], variables={"tools": {1}}), "data of JSON"),
    ],
)
def test_wrong_arguments_give_one_message(text, call, message):
    with pytest.raises(InputError, match=message):
        call(text)


def test_recommended_options_apply_where_the_caller_gives_none(text, monkeypatch):
    prompt = text.encode("dog")
    drawn = whole_text(text, prompt, 20, temperature=2.0, seed=5)
    greedy = whole_text(text, prompt, 20)
    assert drawn != greedy
    monkeypatch.setattr(text, "defaults", {"temperature": 2.0})
    assert text.complete("dog", max_tokens=20, seed=5).result().text == drawn
    assert text.complete("dog", max_tokens=20, temperature=0).result().text == greedy


def test_a_plan_with_a_bad_template_still_completes_prompts(tmp_path):
    with Pipeline.launch(text_plan(tmp_path / "m.plan", template="{% for %}"), threads=1) as pipeline:
        assert pipeline.text.complete("dog", max_tokens=3).result().usage.completion == 3
        with pytest.raises(InputError, match="line 1"):
            pipeline.text.chat(ASK)


def test_a_template_that_writes_nothing_is_named(tmp_path):
    plan, message = text_plan(tmp_path / "m.plan", template="{# nothing #}"), "chat template makes an empty text"
    with Pipeline.launch(plan, threads=1) as pipeline, pytest.raises(InputError, match=message):
        pipeline.text.chat(ASK)


def test_a_plan_without_a_template_says_so(tmp_path):
    with Pipeline.launch(text_plan(tmp_path / "m.plan", template=None), threads=1) as pipeline:
        assert pipeline.text.complete("dog", max_tokens=3).result().usage.completion == 3
        with pytest.raises(InputError, match="no chat template"):
            pipeline.text.chat(ASK)


def test_a_closed_pipeline_leaves_no_process(plan):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with Pipeline.launch(plan, threads=1) as pipeline:
        text = pipeline.text
        generation = text.chat(ASK, stop_tokens=(), min_tokens=100)
        next(generation)
    with pytest.raises(PipelineClosed):
        list(generation)
    with pytest.raises(PipelineClosed):
        text.chat(ASK)
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before
