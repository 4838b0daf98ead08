"""Real processes write text that follows a grammar, also while nodes are lost and beside other sequences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jsonschema
import pytest
import text_plans

from onnxsplit.errors import InputError
from runtime import Pipeline
from runtime.timings import Timings

QUICK = Timings(beat_s=0.2, silence_s=2.0, stall_s=3.0, stall_factor=5)
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 10, "maximum": 99}, "s": {"enum": ["ab", "cd"]}},
        "required": ["n", "s"],
        "additionalProperties": False,
    },
    "minItems": 6,
    "maxItems": 6,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
PROMPTS = [[60 + row, 7, 45, 90][: 2 + row % 3] for row in range(8)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return text_plans.text_plan(tmp_path_factory.mktemp("guided") / "m.plan", length=512)


def text_of(tokens) -> str:
    return text_plans.small_tokenizer().decode(list(tokens))


def begin(pipeline, row: int, **options):
    grammar = GRAMMAR if row % 2 else ""
    return pipeline.generate(PROMPTS[row], max_tokens=200, temperature=1.0, seed=row, grammar=grammar, **options)


def check(results) -> None:
    for row, result in enumerate(results):
        if row % 2:
            assert result.reason == "stop"
            jsonschema.validate(json.loads(text_of(result.tokens)), SCHEMA)


def test_guided_sequences_and_others_share_steps(plan):
    with Pipeline.launch(plan, threads=1, max_rows=8) as pipeline:
        alone = [begin(pipeline, row).result() for row in range(8)]
        together = [generation.result() for generation in [begin(pipeline, row) for row in range(8)]]
        check(together)
        assert [result.tokens for result in together] == [result.tokens for result in alone]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_lost_node_leaves_no_mark_in_the_text(plan, stage):
    with Pipeline.launch(plan, threads=1, max_rows=8, timings=QUICK) as pipeline:
        wanted = [begin(pipeline, row).result() for row in range(8)]
        begun = [begin(pipeline, row) for row in range(8)]
        for _ in range(5):
            next(begun[1])
        os.kill(next(node.pid for node in pipeline.nodes if node.stage == stage), signal.SIGKILL)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda generation: generation.result(), begun))
        check(results)
        assert [result.tokens for result in results] == [result.tokens for result in wanted]


def test_what_cannot_be_guided_is_refused_before_it_starts(plan):
    with Pipeline.launch(plan, threads=1) as pipeline:
        for options, reason in (
            ({"grammar": "garbage"}, "cannot be used"),
            ({"grammar": 7}, "must be a text"),
            ({"grammar": GRAMMAR, "stop_tokens": ()}, "needs a token that ends"),
        ):
            with pytest.raises(InputError, match=reason):
                pipeline.generate([5, 6], **options)


def test_a_plan_without_a_tokenizer_cannot_guide(plan, tmp_path):
    bare = text_plans.text_plan(tmp_path / "m.plan")
    described = json.loads((bare / "plan.json").read_text())
    described["decoder"]["text"] = []
    (bare / "plan.json").write_text(json.dumps(described))
    with Pipeline.launch(bare, threads=1) as pipeline:
        with pytest.raises(InputError, match=r"stage 1 .*: the plan holds no tokenizer.json"):
            pipeline.generate([5, 6], grammar=GRAMMAR)
        assert pipeline.generate([5, 6], max_tokens=3, stop_tokens=()).result().usage.completion == 3


def test_a_grammar_that_only_the_node_refuses_fails_its_own_sequence_alone(plan):
    """The library tells that this schema takes too much work only when it knows the tokenizer."""
    schema = {"type": "integer", "multipleOf": 49_999, "minimum": 7, "maximum": 10**8}
    hard = json.dumps({"grammars": [{"json_schema": schema}]})
    with Pipeline.launch(plan, threads=1, max_rows=8) as pipeline:
        nodes = [node.pid for node in pipeline.nodes]
        begun = [begin(pipeline, row) for row in range(4)]
        with pytest.raises(InputError, match="the grammar cannot be used"):
            pipeline.generate([5, 6], grammar=hard).result()
        check([generation.result() for generation in begun])
        assert [node.pid for node in pipeline.nodes] == nodes
        assert pipeline.sequences.replays == 0


def test_a_node_survives_grammars_that_nobody_has_checked(plan, monkeypatch):
    monkeypatch.setattr("runtime.requests.generator.check_grammar", lambda grammar: None)
    rules = "".join(f"r{n}: r{n + 1} r{n + 1}\n" for n in range(8000))
    chain = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(3000)}
    with Pipeline.launch(plan, threads=1) as pipeline:
        nodes = [node.pid for node in pipeline.nodes]
        for grammar in (
            "garbage",
            f'start: r0\n{rules}r8000: "a"',
            json.dumps({"grammars": [{"json_schema": {"$ref": "#/$defs/d0", "$defs": chain}}]}),
            "start: " + "(" * 100_000 + '"a"' + ")" * 100_000,
        ):
            with pytest.raises(InputError, match="the grammar cannot be used"):
                pipeline.generate([5, 6], grammar=grammar).result()
        jsonschema.validate(json.loads(text_of(begin(pipeline, 1).result().tokens)), SCHEMA)
        assert [node.pid for node in pipeline.nodes] == nodes


@contextmanager
def node(address, environment, stage: int, *, without: str = ""):
    """A node that fetches its stage; a package may be hidden from it."""
    begin = f"import sys; sys.modules[{without!r}] = None; " if without else "import sys; "
    options = ["node", "--connect", address, "--fetch", "--stage", str(stage)]
    code = f"{begin}from onnxsplit.cli import main; sys.argv = ['onnxsplit', *{options!r}]; main()"
    process = subprocess.Popen([sys.executable, "-P", "-c", code], env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("without", ["", "llguidance"])
def test_a_node_on_another_host_fetches_the_tokenizer_with_the_last_stage(
    plan, free_port, python_environment, tmp_path, without
):
    address = f"tcp://127.0.0.1:{free_port}"
    places = [{**python_environment, "XDG_CACHE_HOME": str(tmp_path / str(stage))} for stage in (0, 1)]
    with (
        node(address, places[0], 0),
        node(address, places[1], 1, without=without),
        Pipeline.listen(plan, bind=address, start_timeout=120) as pipeline,
    ):
        if without:
            with pytest.raises(InputError, match=r"stage 1 .*llguidance is not installed; pip install 'onnxsplit\["):
                begin(pipeline, 1)
            assert begin(pipeline, 0).result().usage.completion
        else:
            jsonschema.validate(json.loads(text_of(begin(pipeline, 1).result().tokens)), SCHEMA)
    found = [len(list((tmp_path / stage).rglob("tokenizer.json"))) for stage in ("0", "1")]
    assert found == [0, 1]
