"""What ``partition`` and ``inspect`` say of decoders."""

from __future__ import annotations

import json

import onnx
import pytest
from click.testing import CliRunner
from decoder_runs import FAMILIES

from onnxsplit.cli import cli
from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.plan_files import load_plan


@pytest.fixture
def onnxsplit(monkeypatch, tmp_path):
    """Runs a command in this process; costs are estimated, and the probe runs the model."""
    monkeypatch.setattr(
        "onnxsplit.planning.examine.measured_costs", lambda graph, shapes, *_, **__: analytic_costs(graph, shapes)
    )
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0):
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.output
        return done.output

    return call


def save(name, **options):
    onnx.save(FAMILIES[name].make(**options), "m.onnx")


def test_partition_says_what_was_proven_and_what_was_not(onnxsplit):
    save("gqa")
    text = " ".join(onnxsplit("partition", "m.onnx", "--stages", 2, "--context", 16).split())
    assert "Decoder: 6 states in-place; rows of any lengths share a run; prompts run in chunks, one in a run" in text
    assert "Bytes of states for a token: stage 0" in text
    assert "Costs are those of a step of 4 rows with 16 positions each" in text
    assert "Proven by" in text
    assert "Not used: chunk rows, because batch_size must be 1" in text
    assert "for a prompt of 128 tokens" in text


def test_partition_says_which_files_of_text_the_plan_has(onnxsplit, tmp_path):
    save("gqa")
    words = ("partition", "m.onnx", "--stages", 2, "--context", 16)
    assert "No text, numbers of tokens only: there is no tokenizer.json beside the model." in onnxsplit(*words)
    for name in ("tokenizer.json", "generation_config.json", "unrelated.json"):
        (tmp_path / name).write_text("{}")
    assert "Text: tokenizer.json, generation_config.json beside the model." in onnxsplit(*words)


def test_partition_says_of_recurrent_states_what_a_sequence_takes(onnxsplit):
    save("lstm")
    text = onnxsplit("partition", "m.onnx", "--stages", 2)
    assert "2 states recurrent" in text
    assert "Bytes of states for a sequence: stage 0" in text
    assert "for a token" not in text


def test_json_holds_the_block(onnxsplit):
    save("plain")
    result = json.loads(onnxsplit("partition", "m.onnx", "--json", "--cache-tokens", 500))
    assert result["no_decoder"] is None
    assert result["summary"]["decoder"]["rows"] == "left"
    assert result["summary"]["decoder"]["cache_tokens"] == 500
    assert result["prefill"]["tokens"] == 128


def test_a_model_that_looks_like_a_decoder_gets_one_line_with_the_reason(onnxsplit):
    save("puzzling")
    text = onnxsplit("partition", "m.onnx", "--dry-run")
    assert "Not cut as a decoder: nothing says what the input 'style' must be in a step" in text
    assert json.loads(onnxsplit("partition", "m.onnx", "--dry-run", "--json"))["summary"]["decoder"] is None


def test_without_runs_nothing_is_proven_and_a_file_decides(onnxsplit, tmp_path):
    save("gqa")
    text = " ".join(onnxsplit("partition", "m.onnx", "--costs", "analytic").split())
    assert "without runs, nothing is proven of it" in text
    (tmp_path / "decoder.toml").write_text("max_length = 64\nend_tokens = [7]")
    text = onnxsplit("partition", "m.onnx", "--costs", "analytic", "--decoder", "decoder.toml")
    assert "Nothing was proven: the model was not run." in text
    decoder = load_plan(tmp_path / "m.plan").decoder
    assert (decoder.rows, decoder.chunk, decoder.max_length, decoder.end_tokens) == ("one", "none", 64, (7,))


def test_sizes_that_are_given_decide_at_which_step_costs_are_taken(onnxsplit, tmp_path):
    save("plain")
    dims = ("--dim", "batch_size=3", "--dim", "past_sequence_length=9", "--dim", "sequence_length=1")
    onnxsplit("partition", "m.onnx", *dims)
    plan = load_plan(tmp_path / "m.plan")
    assert (plan.decoder.cost_rows, plan.decoder.cost_context) == (3, 9)
    assert plan.dims["past_sequence_length"] == 9


def test_inspect_shows_the_states(onnxsplit):
    save("mixed")
    text = onnxsplit("inspect", "m.onnx", "--context", 16)
    assert "past_conv.0" in text
    assert "recurrent" in text
    assert "Rows of unequal length: left. Chunks of prompts: rows." in text
    facts = json.loads(onnxsplit("inspect", "m.onnx", "--context", 16, "--json"))["inspection"]
    assert {state["kind"] for state in facts["states"]} == {"append", "recurrent"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decode-rows", 0), "0 is not in the range"),
        (("--context", -1), "-1 is not in the range"),
        (("--cache-tokens", "x"), "'x' is not a valid integer"),
    ],
)
def test_numbers_out_of_range_are_refused(onnxsplit, arguments, message):
    save("gqa")
    assert message in onnxsplit("partition", "m.onnx", *arguments, code=2)


def test_a_file_that_is_missing_is_named(onnxsplit):
    save("gqa")
    text = onnxsplit("partition", "m.onnx", "--decoder", "nowhere.toml", code=1)
    assert "cannot read nowhere.toml" in text
