"""A model as its plan carries it: rebuilt from the stages, with the costs that were measured when it was cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

import onnxsplit
from onnxsplit.cost import OpCosts
from onnxsplit.custom_ops import Library
from onnxsplit.decoder.claim import DecoderClaim, StateClaim
from onnxsplit.decoder.local import states_alike
from onnxsplit.decoder.proven import ProvenDecoder
from onnxsplit.errors import PlanError
from onnxsplit.model.atoms import build_atoms
from onnxsplit.model.graph import OpGraph, build_graph
from onnxsplit.model.outline import open_outline, share_equal_data
from onnxsplit.model.shapes import Shapes, input_specs
from onnxsplit.model.source import SourceModel
from onnxsplit.plan import CreatedWith, Plan
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_decoder import Decoder
from onnxsplit.planning.decoding import Decoding, StepSize
from onnxsplit.planning.op_costs import KnownCosts, first_output
from onnxsplit.planning.origin import Origin
from onnxsplit.planning.subject import Subject
from onnxsplit.stages.merge import merged, put_in_order
from onnxsplit.tensors import Array, numpy_dtype


@dataclass(frozen=True)
class Carried:
    """A model that was rebuilt from a plan.

    Attributes:
        subject: the model, as if it had just been examined.
        stage_of: for each op by index, the stage of the plan that it is in; of a copied op, the first one.
    """

    subject: Subject
    stage_of: tuple[int, ...]


def carried(folder: Path, plan: Plan, known: KnownCosts) -> Carried:
    """Rebuild the model of a plan. Large weights stay in the plan's files.

    Args:
        folder: the plan directory.
        plan: the plan.
        known: its costs.

    Raises:
        ModelError: a stage is not a usable model.
        PlanError: the costs are those of another model.
    """
    parts = [open_outline(folder / stage.file).proto for stage in plan.stages]
    proto = merged(folder, plan, parts)
    put_in_order(proto.graph, known.op_ns)
    source = SourceModel(Path(plan.model.name), proto, plan.model.sha256, in_file=False, data_folder=folder)
    share_equal_data(source.place, list(proto.graph.initializer))
    graph = build_graph(source)
    outputs = [first_output(graph, index) for index in range(len(graph.ops))]
    unknown = next((name for name in outputs if name not in known.op_ns), None)
    if unknown is not None:
        raise PlanError(f"the costs of {folder} do not name the op that writes {unknown!r}. Partition the model again")
    index_of = {name: index for index, name in enumerate(outputs)}
    costs = OpCosts(
        time_ns=tuple(known.op_ns[name] for name in outputs),
        whole_ns=plan.costs.whole_time_ns,
        level=plan.costs.whole_optimization_level,
        source=plan.costs.source,
        shapes=known.shapes,
    )
    decoding = _decoding(graph, plan.decoder, known, index_of) if plan.decoder is not None else None
    together, local = (decoding.together, decoding.local) if decoding is not None else ((), frozenset[int]())
    subject = Subject(
        graph,
        costs,
        build_atoms(graph, known.shapes, together, local=local),
        inputs=dict(_stand_ins(graph, known.shapes)),
        dims=plan.dims,
        custom_ops=tuple(Library(one.name, "", one.sha256) for one in plan.custom_ops),
        decoding=decoding,
    )
    first: dict[str, int] = {}
    for stage, part in enumerate(parts):
        for node in part.graph.node:
            for name in node.output:
                first.setdefault(name, stage)
    return Carried(subject, tuple(first[name] for name in outputs))


def _stand_ins(graph: OpGraph, shapes: Shapes) -> Iterator[tuple[str, Array]]:
    """Inputs of the right shapes that take no memory: only shapes of inputs count where nothing is run."""
    for name in graph.inputs:
        if name in shapes.sizes and name in shapes.specs:
            zero = np.zeros(1, numpy_dtype(shapes.specs[name].dtype))
            size = shapes.sizes[name]
            yield name, as_strided(zero, size, (0,) * len(size), writeable=False)


def _decoding(graph: OpGraph, block: Decoder, known: KnownCosts, index_of: Mapping[str, int]) -> Decoding:
    """How a decoder is cut, as it was when the plan was made."""
    claim = DecoderClaim(
        states=tuple(
            StateClaim(
                past=state.past,
                present=state.present,
                kind=state.kind,
                batch_axis=state.batch_axis,
                axis=state.axis,
                shape=state.shape,
                capacity=state.capacity,
            )
            for state in block.states
        ),
        controls=block.controls,
        scores=block.scores,
        vocabulary=block.vocabulary,
        tokens_below=block.tokens_below,
        max_length=block.max_length,
        end_tokens=block.end_tokens,
    )
    specs = input_specs(graph)
    return Decoding(
        decoder=ProvenDecoder(claim, block.rows, block.chunk, block.proof),
        specs=specs,
        step=StepSize(block.cost_rows, block.cost_context),
        cache_tokens=block.cache_tokens,
        local=frozenset(index_of[name] for name in known.local if name in index_of),
        together=tuple(tuple(index_of[name] for name in group if name in index_of) for group in known.together),
        alike=states_alike(graph, claim, specs),
    )


def carried_origin(folder: Path, plan: Plan, draft: Path) -> Origin:
    """What a plan says of its model, for another plan; copies the files that belong to it.

    Args:
        folder: the plan directory.
        plan: the plan.
        draft: the folder of the other plan.

    Raises:
        PlanError: a file cannot be copied.
    """
    text = plan.decoder.text if plan.decoder is not None else ()
    constants = [one.file for one in plan.passthrough.values() if one.file is not None]
    examples = [plan.example_inputs] if plan.example_inputs is not None else []
    _copy(folder, draft, [*examples, *constants, *plan.defaults.values(), *text])
    return Origin(
        created_with=CreatedWith(onnxsplit=onnxsplit.__version__, onnxruntime=plan.created_with.onnxruntime),
        model=plan.model,
        passthrough=plan.passthrough,
        example_inputs=plan.example_inputs,
        defaults=plan.defaults,
        constant_inputs=plan.constant_inputs,
        dropped_outputs=plan.dropped_outputs,
        dropped_inputs=plan.dropped_inputs,
        custom_ops=plan.custom_ops,
        text=text,
    )


def _copy(folder: Path, draft: Path, entries: Sequence[FileEntry]) -> None:
    for entry in entries:
        try:
            shutil.copyfile(folder / entry.name, draft / entry.name)
        except OSError as error:
            where = os.fsdecode(error.filename or folder / entry.name)
            raise PlanError(f"cannot copy {where} into the plan: {error.strerror}") from error


def with_times(known: KnownCosts, graph: OpGraph, op_ns: Sequence[int]) -> KnownCosts:
    """The costs with other times of the ops."""
    return replace(known, op_ns={first_output(graph, index): time_ns for index, time_ns in enumerate(op_ns)})
