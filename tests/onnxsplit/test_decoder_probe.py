from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from decoder_runs import FAMILIES, Reference

from onnxsplit.decoder.claim import NoDecoder
from onnxsplit.decoder.find import find_decoder
from onnxsplit.decoder.inputs import example_step
from onnxsplit.decoder.prepare import prepare
from onnxsplit.decoder.probe import probe
from onnxsplit.decoder.reference import ReferenceDecoder, StepRunner
from onnxsplit.errors import InputError
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import open_any
from onnxsplit.model.shapes import input_specs, symbolic_specs
from onnxsplit.session import open_session

LAYOUTS = {
    "gqa": ("right", "one-row", {"in-place"}),
    "gqa, 4 bits": ("right", "one-row", {"in-place"}),
    "gqa, local window": ("right", "one-row", {"in-place"}),
    "plain": ("left", "rows", {"append"}),
    "plain, no positions": ("left", "rows", {"append"}),
    "plain, causal by position": ("equal", "rows", {"append"}),
    "merged": ("left", "rows", {"append"}),
    "gpt2": ("left", "rows", {"append"}),
    "torch export": ("left", "rows", {"append"}),
    "attention 23": ("left", "rows", {"append"}),
    "attention 23, causal": ("equal", "rows", {"append"}),
    "tensor scatter": ("right", "rows", {"in-place"}),
    "tensor scatter, free": ("right", "rows", {"in-place"}),
    "lstm": ("right", "rows", {"recurrent"}),
    "gru": ("right", "rows", {"recurrent"}),
    "window": ("equal", "rows", {"window"}),
    "mixed": ("left", "rows", {"append", "recurrent"}),
    "relative bias": ("left", "rows", {"append"}),
    "alibi": ("left", "rows", {"append"}),
}


class Model:
    """A small decoder in a session, with what is claimed of it."""

    def __init__(self, name, *, opset=None):
        self.proto = FAMILIES[name].make()
        graph = build_graph(open_any(self.proto))
        self.specs = input_specs(graph)
        self.claim = find_decoder(graph, symbolic_specs(graph))
        self.session = open_session(self.proto.SerializeToString(), threads=1)

    def proven(self, claim=None):
        claim = claim or self.claim
        return probe(StepRunner(self.session, claim, self.specs), claim, allowed=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_show_what_a_family_can_do(name):
    decoder = prepare(open_any(FAMILIES[name].make()), "auto", runs=True).decoder
    assert (decoder.rows, decoder.chunk, {s.kind for s in decoder.claim.states}) == LAYOUTS[name]
    assert max(decoder.proof.differences.values()) < 1e-5
    assert {"steps", f"rows {decoder.rows}"} <= decoder.proof.differences.keys()
    assert decoder.proof.runs > 30


@pytest.mark.parametrize("name", ["crossed", "stacked", "puzzling"])
def test_a_model_that_is_not_understood_is_left_as_it_is(name):
    source = open_any(FAMILIES[name].make())
    prepared = prepare(source, "auto", runs=True)
    assert isinstance(prepared.decoder, NoDecoder)
    assert prepared.decoder.reason
    assert prepared.source is source


def test_a_model_without_caches_has_no_reason():
    add = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) {y = Add(x, x)}'
    )
    assert prepare(open_any(add), "auto", runs=True).decoder == NoDecoder()


@pytest.mark.parametrize(("choice", "runs"), [("off", True), ("auto", False)])
def test_nothing_is_used_that_was_not_asked_for_or_not_proven(choice, runs):
    assert isinstance(prepare(open_any(FAMILIES["gqa"].make()), choice, runs=runs).decoder, NoDecoder)


def test_a_file_makes_a_decoder_without_runs_and_claims_the_least(tmp_path):
    (tmp_path / "decoder.toml").write_text("max_length = 99")
    decoder = prepare(open_any(FAMILIES["gqa"].make()), tmp_path / "decoder.toml", runs=False).decoder
    assert (decoder.rows, decoder.chunk, decoder.proof, decoder.claim.max_length) == ("one", "none", None, 99)


def test_states_of_other_layers_are_refuted():
    model = Model("plain")
    one, two, *rest = model.claim.states
    third = rest[0]
    swapped = (replace(one, present=third.present), two, replace(third, present=one.present), *rest[1:])
    found = model.proven(replace(model.claim, states=swapped))
    assert isinstance(found, NoDecoder)
    assert "of their scale apart" in found.reason or "does not begin" in found.reason


def test_states_that_cannot_be_written_in_place_are_appended_to():
    model = Model("plain")
    claimed = tuple(replace(state, kind="in-place") for state in model.claim.states)
    found = model.proven(replace(model.claim, states=claimed))
    assert isinstance(found, NoDecoder) or {state.kind for state in found.claim.states} == {"append"}


def test_a_wrong_role_is_refuted():
    model = Model("plain")
    controls = tuple(
        replace_role(control, "past-length") if control.role == "positions" else control
        for control in model.claim.controls
    )
    assert isinstance(model.proven(replace(model.claim, controls=controls)), NoDecoder)


def replace_role(control, role):
    return type(control)(input=control.input, role=role)


def test_a_context_that_is_too_short_for_a_proof_is_refused():
    model = Model("gqa")
    found = model.proven(replace(model.claim, max_length=5))
    assert found == NoDecoder("a sequence has at most 5 positions, and a proof needs 8")


@pytest.mark.parametrize("length", [8, 12, 20])
def test_a_short_context_is_enough(length):
    model = Model("gqa")
    assert model.proven(replace(model.claim, max_length=length)).rows == "right"


@pytest.mark.parametrize("name", ["gqa", "plain", "tensor scatter", "lstm", "window", "mixed"])
@pytest.mark.parametrize("chunk", [None, 3, 1])
def test_the_reference_continues_a_text_as_plain_runs_do(name, chunk):
    model = Model(name)
    prompt = [3, 17, 52, 9, 80, 41, 6]
    tokens, scores = ReferenceDecoder(model.session, model.claim, model.specs).greedy(prompt, 20, chunk=chunk)
    assert tokens == Reference(FAMILIES[name]).greedy(prompt, 20)
    assert scores.argmax(-1).tolist() == tokens


def test_the_reference_begins_anew_with_each_prompt():
    model = Model("gqa")
    reference = ReferenceDecoder(model.session, model.claim, model.specs)
    first = reference.prefill([1, 2, 3])
    reference.greedy([9] * 80, 30)
    assert np.array_equal(reference.prefill([1, 2, 3]), first)
    with pytest.raises(InputError, match="at least one token"):
        reference.prefill([])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "merged"])
def test_made_up_inputs_of_a_step_fit_the_model(name):
    model = Model(name)
    inputs = example_step(model.claim, model.specs, rows=2, context=9)
    outputs = model.session.run(inputs)
    assert outputs[model.claim.scores].shape[0] == 2
    assert np.isfinite(outputs[model.claim.scores]).all()
