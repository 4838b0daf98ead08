from __future__ import annotations

import re

import msgspec
import onnx
import pytest
from decoder_chain import StageChain
from decoder_parts import Size
from decoder_runs import FAMILIES, Reference

from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.decoder.reference import ReferenceDecoder
from onnxsplit.plan_check import plan_problems
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify

PROMPTS = ([3, 17, 52, 9, 80, 41, 6], [71, 5, 28])
DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder]
SKIPPING = [name for name in DECODERS if name.startswith("gqa")]  # the sum of the skip connections crosses too


@pytest.fixture
def estimated(monkeypatch):
    """Costs are estimated, so that a plan takes a second; the model itself runs, and its claims are proven."""
    monkeypatch.setattr(
        "onnxsplit.planning.examine.measured_costs", lambda graph, shapes, *_, **__: analytic_costs(graph, shapes)
    )


def cut(folder, name, stages, **options):
    model = FAMILIES[name].make()
    onnx.save(model, folder / "m.onnx")
    if name == "gqa, free width":
        from decoders import write_genai_config

        write_genai_config(folder)
    return partition(folder / "m.onnx", out=folder / "m.plan", stages=stages, decode_rows=2, context=16, **options)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_stages_with_their_own_states_continue_texts_as_the_whole_model_does(tmp_path, estimated, name, stages):
    plan = cut(tmp_path, name, stages)
    chain = StageChain(tmp_path / "m.plan", plan)
    pipeline = ReferenceDecoder(chain, plan.decoder, plan.tensors)
    texts = [pipeline.greedy(prompt, 20)[0] for prompt in PROMPTS]
    assert texts == [Reference(FAMILIES[name]).greedy(prompt, 20) for prompt in PROMPTS]
    assert texts[0] != texts[1]
    assert len(plan.stages) == stages
    assert len(chain.crossed) <= (stages - 1) * (2 if name in SKIPPING else 1)
    assert all(shape[:2] == (1, 1) for shape in chain.crossed.values())
    assert load_plan(tmp_path / "m.plan") == plan


@pytest.mark.parametrize("name", ["gqa", "plain", "merged", "tensor scatter", "lstm", "window", "mixed"])
def test_an_ordinary_request_gets_what_the_whole_model_answers(tmp_path, estimated, name):
    cut(tmp_path, name, 2)
    comparisons = verify(tmp_path / "m.plan", tmp_path / "m.onnx")
    assert all(one.good and one.difference == 0 for one in comparisons)
    assert "logits" in {one.output for one in comparisons}


def test_the_block_says_what_a_node_must_know(tmp_path, estimated):
    plan = cut(tmp_path, "gqa", 2, cache_tokens=1000)
    decoder = plan.decoder
    assert (decoder.rows, decoder.chunk, decoder.rollback, decoder.last_only) == ("right", "one-row", True, True)
    assert (decoder.scores, decoder.vocabulary, decoder.max_length) == ("logits", Size.vocabulary, Size.context)
    assert {state.token_bytes for state in decoder.states} == {Size.groups * Size.head * 4}
    assert {control.input: control.role for control in decoder.controls} == {
        "input_ids": "tokens",
        "attention_mask": "mask",
        "first-scored": "first-scored",
    }
    assert (decoder.cost_rows, decoder.cost_context) == (2, 16)
    assert plan.dims["batch_size"] == 2


def test_every_stage_has_memory_for_its_states(tmp_path, estimated):
    plans = [cut(tmp_path, "gqa", 2, cache_tokens=tokens) for tokens in (0, 1000)]
    for stage in range(2):
        none, some = (plan.stages[stage].peak_memory_bytes for plan in plans)
        assert some - none == 1000 * plans[0].decoder.token_bytes(stage)


def test_a_limit_on_memory_holds_with_the_states(tmp_path, estimated):
    tokens = 100_000
    plan = cut(tmp_path, "gqa", 3, cache_tokens=tokens, max_memory=60 << 20)
    assert len({state.stage for state in plan.decoder.states}) > 1
    assert max(stage.peak_memory_bytes for stage in plan.stages) <= 60 << 20


def test_a_decoder_that_is_switched_off_is_cut_as_any_other_model(tmp_path, estimated):
    plan = cut(tmp_path, "gqa", 2, decoder="off", dims={"past_sequence_length": 8, "total_sequence_length": 136})
    assert plan.decoder is None
    assert "first-scored" not in plan.inputs


def test_files_of_the_tokenizer_are_part_of_the_plan(tmp_path, estimated):
    (tmp_path / "tokenizer.json").write_text("{}")
    plan = cut(tmp_path, "gqa", 2)
    assert [entry.name for entry in plan.decoder.text] == ["tokenizer.json"]
    assert (tmp_path / "m.plan" / "tokenizer.json").read_text() == "{}"
    assert load_plan(tmp_path / "m.plan") == plan


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stage": 0}, "is not an input of the model that stage 0 reads"),
        ({"stage": 7}, "belongs to stage 7, and the plan has 2"),
        ({"present": "logits", "stage": 1}, "'logits'.*has 3"),
        ({"present": "logits", "stage": 1}, "output 'logits' is a state or the scores more than once"),
        ({"present": "present.2.key"}, "output 'present.2.key' is a state or the scores more than once"),
        ({"axis": None}, "is of the kind append and has the axis None"),
        ({"axis": 0}, "the batch axis 0 and the axis 0"),
        ({"batch_axis": 9}, "the batch axis 9"),
        ({"shape": (1, 2, 3, 16)}, "is not that of one row and no position"),
        ({"kind": "recurrent"}, "is of the kind recurrent and has the axis 2"),
        ({"fixed_bytes": 8}, "with 128 and 8 bytes"),
    ],
)
def test_a_state_that_contradicts_the_plan_is_found(tmp_path, estimated, change, problem):
    plan = cut(tmp_path, "plain", 2)
    *others, last = plan.decoder.states
    broken = with_block(plan, states=(*others, msgspec.structs.replace(last, **change)))
    assert any(re.search(problem, text) for text in plan_problems(broken))


def with_block(plan, **changes):
    return msgspec.structs.replace(plan, decoder=msgspec.structs.replace(plan.decoder, **changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"controls": ()}, "the decoder has no input with the tokens"),
        ({"scores": "x"}, "the scores 'x' are not an output"),
        ({"scores": "present.0.key"}, "output 'present.0.key' is a state or the scores more than once"),
        ({"end_tokens": (100,)}, "the end token 100 is not below the vocabulary of 100"),
        ({"last_only": False}, "last_only does not fit the controls"),
    ],
)
def test_a_block_that_contradicts_the_plan_is_found(tmp_path, estimated, changes, problem):
    plan = cut(tmp_path, "gqa", 2)
    assert any(problem in text for text in plan_problems(with_block(plan, **changes)))
