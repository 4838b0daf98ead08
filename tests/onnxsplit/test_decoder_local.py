from __future__ import annotations

import pytest
from decoder_runs import FAMILIES
from decoder_traps import unequal_heads

from onnxsplit.decoder.inputs import example_step
from onnxsplit.decoder.local import cheap_ops, control_ops, names_of, ops_together, states_alike
from onnxsplit.decoder.prepare import prepare
from onnxsplit.model.atoms import build_atoms
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import open_any
from onnxsplit.model.shapes import infer_shapes, input_specs
from onnxsplit.stages.parts import stage_parts


class Prepared:
    """A proven decoder, with the ops that every stage computes for itself."""

    def __init__(self, name, model=None):
        prepared = prepare(open_any(model or FAMILIES[name].make()), "auto", runs=True)
        self.graph = build_graph(prepared.source)
        self.claim = prepared.decoder.claim
        self.specs = input_specs(self.graph)
        self.free = control_ops(self.graph, self.claim)
        self.shapes, other = (
            infer_shapes(
                self.graph, {n: a.shape for n, a in example_step(self.claim, self.specs, rows=2, context=c).items()}
            )
            for c in (5, 7)
        )
        self.alike = states_alike(self.graph, self.claim, self.specs)
        self.together = ops_together(self.graph, self.claim, self.free, self.shapes.sizes, other.sizes, self.alike)
        self.atoms = build_atoms(self.graph, self.shapes, self.together, local=self.free)

    def stages(self, count):
        atoms = len(self.atoms.ops)
        assignment = [min(count - 1, atom * count // atoms) for atom in range(atoms)]
        return stage_parts(self.graph, self.atoms, assignment, self.alike)


@pytest.mark.parametrize("name", ["plain", "gpt2", "torch export", "attention 23", "tensor scatter", "alibi", "mixed"])
def test_masks_and_tables_follow_from_controls(name):
    model = Prepared(name)
    assert model.free
    pasts = {state.past for state in model.claim.states}
    tokens = {control.input for control in model.claim.controls if control.role == "tokens"}
    for index in model.free:
        op = model.graph.ops[index]
        if op.op_type not in ("Shape", "Size"):
            assert not (pasts | tokens) & set(op.reads)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", ["gqa", "plain", "torch export", "attention 23", "window", "mixed", "lstm by layer"])
def test_no_state_crosses_wherever_the_cut_is(name, count):
    check_states(Prepared(name), count)


@pytest.mark.parametrize("asks_heads", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_no_state_crosses_where_layers_have_other_numbers_of_heads(count, asks_heads):
    model = Prepared("unequal heads", unequal_heads(asks_heads=asks_heads))
    parts = check_states(model, count)
    assert all(part.own for part in parts) or asks_heads  # an op that asks for heads shares a stage with that state


def check_states(model, count):
    stays = names_of(model.claim)
    parts = model.stages(count)
    owner = {}
    for index, part in enumerate(parts):
        for tensor in part.inputs:
            if tensor in {state.past for state in model.claim.states}:
                assert owner.setdefault(tensor, index) == index
    for state in model.claim.states:
        assert state.present in parts[owner[state.past]].outputs
    produced = {tensor: index for index, part in enumerate(parts) for tensor in part.outputs}
    for index, part in enumerate(parts):
        crossing = {tensor for tensor in part.inputs if produced.get(tensor, index) != index}
        assert not crossing & stays
    return parts


def test_a_copied_op_reads_the_shape_of_a_state_that_the_stage_has():
    model = Prepared("torch export")
    parts = model.stages(3)
    assert any(part.renamed for part in parts)
    for part in parts:
        assert all(new in part.inputs and old not in part.inputs for old, new in part.renamed.items())


def test_an_op_that_is_expensive_or_reads_large_constants_is_not_copied():
    model = Prepared("plain, gathered tables")
    times = [1000] * len(model.graph.ops)
    assert cheap_ops(model.graph, model.free, times) == model.free
    slow = min(model.free)
    times[slow] = 10**9
    assert cheap_ops(model.graph, model.free, times) == model.free - {slow}
