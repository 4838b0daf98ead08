"""A text follows its grammar, whatever the model prefers; a grammar that is too large is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import text_plans
from guided import END, SIZE, TOKENIZER, Guided
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.errors import InputError, ModelError
from runtime.guided.bounds import grammar_problem
from runtime.guided.guide import GuidedTokenizer, check_grammar
from runtime.node.sampling import TokenSampler
from runtime.wire.messages.sequences import Sampling, StepRow

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def of_schema(schema) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


def of_lark(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


@pytest.fixture(scope="module")
def tokenizer():
    return GuidedTokenizer(TOKENIZER.to_str().encode(), (END,))


@settings(max_examples=40, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 3]),
    top_p=st.sampled_from([1.0, 0.3, 0.0]),
    min_p=st.sampled_from([0.0, 0.5]),
    repetition=st.sampled_from([1.0, 5.0]),
    bias=st.sampled_from([(), ((END, 1e9),), ((90, 1e9), (5, 1e9)), ((END, -1e9),)]),
    min_tokens=st.sampled_from([0, 150]),
    vocabulary=st.sampled_from([SIZE, SIZE + 77]),
)
def test_a_random_model_writes_json_by_the_schema(tokenizer, vocabulary, **sampling):
    text = Guided(tokenizer, of_schema(PERSON), vocabulary=vocabulary, **sampling).finish()
    jsonschema.validate(json.loads(text), PERSON)


def test_tokens_beyond_the_models_vocabulary_are_left_out(tokenizer):
    jsonschema.validate(json.loads(Guided(tokenizer, of_schema(PERSON), vocabulary=261).finish()), PERSON)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_replay_and_a_doubled_step_go_on_exactly(tokenizer, data):
    one = Guided(tokenizer, of_schema(PERSON), temperature=1.0, seed=data.draw(st.integers(0, 99)))
    one.finish()
    whole, count = list(one.tokens), len(one.prompt)
    at = data.draw(st.integers(count, len(whole) - 1), label="tokens before the replay")
    parts = sorted(data.draw(st.sets(st.integers(1, at - 1), max_size=4), label="borders of the parts"))
    replayed = one.fresh()
    for begin, end in zip([0, *parts], [*parts, at], strict=True):
        replayed.feed(begin, tuple(whole[begin:end]))
    one.tokens = whole[:at]
    assert one.draw(at - 1, replayed) == whole[at]
    back = data.draw(st.integers(count, at), label="tokens after going back")
    one.tokens = whole[:back]
    assert one.draw(back - 1, replayed) == whole[back]
    one.tokens = whole[:at]
    assert one.draw(back - 1, replayed) == whole[at]


def test_the_text_ends_where_the_grammar_must_end_and_only_where_it_may(tokenizer):
    one = Guided(tokenizer, of_lark('start: "yes" | "no"'), bias=((END, 1e9),), min_tokens=60)
    assert one.finish() in ("yes", "no")
    assert Guided(tokenizer, of_lark('start: "ab"*'), bias=((END, 1e9),)).finish() == ""


def test_the_text_ends_where_no_token_of_the_model_fits(tokenizer):
    one = Guided(tokenizer, of_lark("start: /[€]/"), vocabulary=60)
    assert one.finish() == ""


def test_the_logarithms_of_probability_are_the_models_own(tokenizer):
    one = Guided(tokenizer, of_lark('start: "yes"'), logprobs=2)
    one.sampler.feed(0, one.prompt)
    scores = one.scores()
    drawn = one.sampler.draw(StepRow(1, 1, 0, 0, one.prompt, True), scores)
    shares = np.log(np.exp(scores.astype(float)) / np.exp(scores.astype(float)).sum())
    assert drawn.logprob == pytest.approx(shares[drawn.token], abs=1e-4)
    assert [token for token, _ in drawn.top] == list(np.argsort(-scores)[:2])


def test_special_tokens_are_no_text_and_a_stop_token_of_the_caller_ends_only_a_whole_text(tokenizer):
    allowed, may_end = tokenizer.guide(of_lark("start: /(.|\\n)*/")).allowed(SIZE)
    assert may_end
    letter, special = TOKENIZER.token_to_id("a"), [TOKENIZER.token_to_id(name) for name in text_plans.SPECIAL]
    assert allowed[letter]
    assert not allowed[special].any()
    sampler = TokenSampler(Sampling(end_tokens=(letter,)), 1, SIZE, tokenizer.guide(of_lark('start: "b"')))
    sampler.feed(0, (7,))
    first = sampler.draw(StepRow(1, 1, 0, 0, (7,), True), np.zeros(SIZE, np.float32)).token
    sampler.feed(1, (first,))
    assert TOKENIZER.id_to_token(first) == "b"
    assert sampler.draw(StepRow(1, 1, 0, 1, (first,), True), np.zeros(SIZE, np.float32)).token == letter


@pytest.mark.parametrize("text", [b"", b"/etc/passwd", b"gpt2", b"{", b"{}", b"\xff", b'{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_refused(text):
    with pytest.raises(ModelError):
        GuidedTokenizer(text, (0,))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("garbage", "Expected token"),
        (of_lark("start: /(a/"), "unclosed group"),
        (of_schema({"$ref": "http://example.com/x"}), "does not fetch"),
        (of_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (of_schema({"not": {"type": "string"}}), "not"),
        (json.dumps({"grammars": []}), "1 to 128 parts"),
        ('{"grammars": [', "not JSON"),
        ('{"grammars": [{"nodes": []}]}', "must be objects of"),
        (json.dumps({"grammars": [{"json_schema": "x"}]}), "must be an object"),
        (of_schema({"type": "integer", "multipleOf": 100_000_007}), "multipleOf"),
        (of_schema({"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967)]}), "multipleOf"),
        (of_lark('start: %json {"type": "integer", "multiple\\u004ff": 100000007.0}'), "multipleOf"),
        (of_lark("start: /" + "(a|b)?" * 5000 + "/"), "at most 4000"),
        (of_lark("start: /" + "a{0,1}" * 5000 + "/"), "at most 4000"),
        (of_schema({"patternProperties": {"a?" * 5000: True}}), "at most 4000"),
        ("x" * (1 << 18) + "x", "at most 262144"),
        (" ", "empty"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(grammar, reason):
    with pytest.raises(InputError, match=reason):
        check_grammar(grammar)


@pytest.mark.parametrize("divisor", [0.01, 0.0005, 5, 86400, 1e6, 1e-30, 10**400, float("inf"), "5", None, {}, True, 0])
def test_usual_divisors_are_within_the_bounds(divisor):
    assert grammar_problem(of_schema({"type": "number", "multipleOf": divisor})) == ""


def hostile(size: int) -> list[str]:
    """Grammars whose reading would overflow the stack, or take minutes."""

    def chain(definition):
        return of_schema(
            {"$ref": "#/$defs/d0", "$defs": {f"d{n}": definition(n) for n in range(size)} | {f"d{size}": {}}}
        )

    return [
        of_lark("start: " + "(" * size + '"a"' + ")" * size),
        of_lark("start: r0\n" + "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(size)) + f'r{size}: "a"'),
        of_lark("start: T0\n" + "".join(f"T{n}: T{n + 1} T{n + 1}\n" for n in range(size)) + f'T{size}: "a"'),
        of_lark('start: "a"' + "?" * size),
        of_lark("start: /a" + "{2}" * size + "/"),
        of_lark("start: /" + "(a|b|c)?" * size * 4 + "/"),
        of_lark("start: /a.*/" + " & /a.*/" * size),
        of_lark("start: " + "r? " * size + '\nr: "a" | "b" r'),
        of_lark("start: /[ab]*a[ab]{" + str(size) + "}/"),
        of_lark("start: /(x+x+)+y|(.*a){20}.{" + str(size) + "}/"),
        of_lark('start: ("a"{1,' + str(size) + "}){1," + str(size) + "}"),
        '{"grammars":[{"json_schema":' + '{"items":' * size + "{}" + "}" * size + "}]}",
        chain(lambda n: {"$ref": f"#/$defs/d{n + 1}"}),
        chain(lambda n: {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}, "required": ["a"]}),
        chain(lambda n: {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}),
        of_schema({"$ref": "#"}),
        of_schema({"allOf": [{"$ref": "#"}, {"type": "object"}]}),
        of_schema({"enum": [f"value {n}" for n in range(size)]}),
        of_schema({"type": "object", "properties": {f"name{n}": {"type": "string"} for n in range(size)}}),
        of_schema({"type": "integer", "multipleOf": 100_000_007 * size}),
        of_schema({"type": "integer", "multipleOf": 49_999}),
        of_schema({"properties": {f"p{n}": {"type": "integer", "multipleOf": 49_999} for n in range(size)}}),
        json.dumps({"grammars": [{"name": f"a{n}", "lark_grammar": f"start: @a{n + 1}"} for n in range(size)]}),
    ]


def follow_hostile(size: int) -> None:
    """Make a guide of each hostile grammar and follow it; print how long the slowest took."""
    tokenizer, slowest = GuidedTokenizer(TOKENIZER.to_str().encode(), (END,)), 0.0
    for grammar in hostile(size):
        begun = time.process_time()
        try:
            check_grammar(grammar)
            one = Guided(tokenizer, grammar)
            one.finish(60)
        except (InputError, ModelError, AssertionError):
            pass
        took = time.process_time() - begun
        slowest = max(slowest, took)
    print(slowest)


@pytest.mark.parametrize("size", [30, 140, 190, 900, 5000])
def test_no_grammar_ends_the_process_or_takes_minutes(size):
    """In a process of its own, because a stack that overflows ends it."""
    run = subprocess.run(
        [sys.executable, "-c", f"import test_guided; test_guided.follow_hostile({size})"],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-500:]
    assert float(run.stdout) < 30


@given(st.text(alphabet='(){}[]":,ab#/$ref', max_size=60))
def test_the_bounds_take_any_text(text):
    assert isinstance(grammar_problem(text), str)
    assert isinstance(grammar_problem('{"grammars":[' + text + "]}"), str)
