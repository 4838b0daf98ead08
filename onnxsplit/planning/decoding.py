"""How a decoder is cut: what stays on the nodes, what every stage computes for itself, and what a step costs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxsplit.cost.profile import shapes_of_run
from onnxsplit.custom_ops import Library
from onnxsplit.decoder.claim import StateClaim
from onnxsplit.decoder.inputs import example_step
from onnxsplit.decoder.local import cheap_ops, control_ops, names_of, ops_together, states_alike
from onnxsplit.decoder.proven import ProvenDecoder
from onnxsplit.errors import ModelError
from onnxsplit.memory import free_memory_bytes
from onnxsplit.model.dimensions import check_dimensions
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.in_memory import runnable
from onnxsplit.model.shapes import Shapes, infer_shapes
from onnxsplit.model.source import SourceModel
from onnxsplit.npz import save_npz
from onnxsplit.plan import Level, TensorSpec
from onnxsplit.step_inputs import state_shape
from onnxsplit.tensors import Array, size_bytes
from onnxsplit.timed import TimedModel

_MOST_STATE_BYTES = 1 << 30  # of the states in the step that costs are taken at
_EXAMPLE_ROWS, _EXAMPLE_CONTEXT, _EXAMPLE_NEW = 1, 6, 2
_PROMPT_TOKENS = 128
_SHORT, _LONG = 5, 7  # lengths whose comparison shows which tensors grow


@dataclass(frozen=True)
class StepSize:
    """A step that costs are taken at: its rows, the positions of each before it, and the new tokens of each."""

    rows: int
    context: int
    new: int = 1


@dataclass(frozen=True)
class Prefill:
    """Time of the whole model for the first tokens of one sequence in one run, in nanoseconds."""

    tokens: int
    time_ns: int


@dataclass(frozen=True)
class Decoding:
    """How a decoder is cut.

    Attributes:
        decoder: the decoder.
        specs: types and shapes of the model's inputs.
        step: the step that costs are taken at.
        cache_tokens: the positions, over all sequences, for which stages have memory.
        local: ops that every stage that reads them computes for itself.
        together: groups of ops that must share a stage.
        alike: for each state, the number of a group; of states of one group, all sizes that ops ask for are the same.
        prefill: time for a prompt; None if nothing was measured.
    """

    decoder: ProvenDecoder
    specs: Mapping[str, TensorSpec]
    step: StepSize
    cache_tokens: int
    local: frozenset[int] = frozenset()
    together: tuple[tuple[int, ...], ...] = ()
    alike: Mapping[str, int] = field(default_factory=dict)
    prefill: Prefill | None = None

    @property
    def stays(self) -> frozenset[str]:
        """Inputs and outputs that do not cross in a step."""
        return names_of(self.decoder.claim)

    def token_bytes(self, state: StateClaim) -> int:
        """Bytes of one position of a state; 0 where the number of positions does not matter."""
        return 0 if state.kind in ("recurrent", "window") else self._bytes(state, 1)

    def fixed_bytes(self, state: StateClaim) -> int:
        """Bytes that a state takes for a sequence of any length; 0 where the number of positions matters."""
        return self._bytes(state, state.capacity or 1) if state.kind in ("recurrent", "window") else 0

    def cache_bytes(self, graph: OpGraph, ops: Collection[int]) -> int:
        """Bytes of the states that some ops write."""
        held = [s for s in self.decoder.claim.states if graph.producer.get(s.present) in ops]
        rows = max(1, self.step.rows)
        return sum(self.cache_tokens * self.token_bytes(s) + rows * self.fixed_bytes(s) for s in held)

    def without_states(self, shapes: Shapes) -> Shapes:
        """Shapes in which the states take no memory, except outputs that ONNX Runtime does not write in place."""
        states = self.decoder.claim.states
        gone = {s.past for s in states} | {s.present for s in states if s.kind == "in-place"}
        return Shapes(shapes.specs, {name: size for name, size in shapes.sizes.items() if name not in gone})

    def example(self) -> dict[str, Array]:
        """Inputs of a small step, with states of few positions."""
        most = self.decoder.claim.max_length or _EXAMPLE_CONTEXT + _EXAMPLE_NEW
        context = max(0, min(_EXAMPLE_CONTEXT, most - _EXAMPLE_NEW))
        new = _EXAMPLE_NEW if self.decoder.chunk == "rows" else 1
        return example_step(self.decoder.claim, self.specs, rows=_EXAMPLE_ROWS, context=context, new=new)

    def _bytes(self, state: StateClaim, positions: int) -> int:
        return size_bytes(self.specs[state.past].dtype, state_shape(state, 1, positions))


def step_size(
    decoder: ProvenDecoder, specs: Mapping[str, TensorSpec], wanted: StepSize, dims: Mapping[str, int]
) -> StepSize:
    """The step that costs are taken at: as wanted, or smaller where the model or the memory demands it.

    Args:
        decoder: the decoder.
        specs: types and shapes of the model's inputs.
        wanted: the wanted step.
        dims: sizes of free dimensions that the user gave; they come before ``wanted``, and before what memory allows.

    Raises:
        InputError: the model has no such dimension.
    """
    claim = decoder.claim
    check_dimensions(specs, dims)
    names = _dimensions(decoder, specs)
    given = {role: dims[name] for role, name in names.items() if isinstance(name, str) and name in dims}
    limits = [claim.max_length, *(state.capacity for state in claim.states if state.kind == "in-place")]
    new = given.get("new", wanted.new)
    context = min([wanted.context, *(max(0, limit - new) for limit in limits if limit is not None)])
    rows = given.get("rows", 1 if decoder.rows == "one" else wanted.rows)
    plain = Decoding(decoder, specs, wanted, 0)
    token = sum(map(plain.token_bytes, claim.states)) * rows
    allowed = min(_MOST_STATE_BYTES, free_memory_bytes() // 8)
    if token * context > allowed:
        context = max(1, allowed // token)
    return StepSize(rows, given.get("context", context), new)


def _dimensions(decoder: ProvenDecoder, specs: Mapping[str, TensorSpec]) -> dict[str, int | str]:
    """The names of the dimensions that are the rows, the new tokens, and the positions of past."""
    claim = decoder.claim
    tokens = next(specs[control.input].shape for control in claim.controls if control.role == "tokens")
    names: dict[str, int | str] = dict(zip(("rows", "new"), tokens or (), strict=False))
    for state in claim.states:
        shape = specs[state.past].shape
        if state.kind in ("append", "in-place") and state.axis is not None and shape is not None:
            names.setdefault("context", shape[state.axis])
    return names


def decoding(
    graph: OpGraph,
    decoder: ProvenDecoder,
    specs: Mapping[str, TensorSpec],
    step: StepSize,
    cache_tokens: int | None,
    op_ns: Sequence[int],
    *,
    runs: bool,
    custom_ops: Sequence[Library] = (),
) -> Decoding:
    """Find out what stays on the nodes, and what every stage computes for itself.

    Args:
        graph: the model.
        decoder: the decoder.
        specs: types and shapes of the model's inputs.
        step: the step that costs are taken at.
        cache_tokens: the positions that stages have memory for; None for those of the step.
        op_ns: time of each op in nanoseconds.
        runs: whether the model may be run, to see which tensors grow; else they are inferred.
        custom_ops: libraries of custom ops that the model needs.
    """
    claim = decoder.claim
    free = control_ops(graph, claim)
    examples = [example_step(claim, specs, rows=1, context=length) for length in _lengths(decoder)]
    if runs:
        short, long = (shapes_of_run(graph, example, custom_ops=custom_ops) for example in examples)
    else:
        short, long = (
            dict(infer_shapes(graph, {n: a.shape for n, a in example.items()}).sizes) for example in examples
        )
    alike = states_alike(graph, claim, specs)
    return Decoding(
        decoder=decoder,
        specs=specs,
        step=step,
        cache_tokens=cache_tokens if cache_tokens is not None else step.rows * (step.context + 1),
        local=cheap_ops(graph, free, op_ns),
        together=tuple(tuple(group) for group in ops_together(graph, claim, free, short, long, alike)),
        alike=alike,
    )


def measured_prefill(
    source: SourceModel,
    decoder: ProvenDecoder,
    specs: Mapping[str, TensorSpec],
    *,
    threads: int,
    level: Level,
    provider: str,
    custom_ops: Sequence[Library] = (),
) -> Prefill | None:
    """Measure how long the whole model takes for a prompt; None if it does not run on one of that length.

    Args:
        source: the model.
        decoder: the decoder.
        specs: types and shapes of the model's inputs.
        threads: threads of the session.
        level: optimisation level of the session.
        provider: execution provider.
        custom_ops: libraries of custom ops that the session loads.
    """
    limits = [decoder.claim.max_length, *(s.capacity for s in decoder.claim.states if s.kind == "in-place")]
    tokens = min([_PROMPT_TOKENS, *(limit for limit in limits if limit is not None)])
    with runnable(source) as file, tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        feed = Path(folder) / "in.npz"
        save_npz(feed, example_step(decoder.claim, specs, rows=1, context=0, new=tokens))
        try:
            with TimedModel(
                file.path,
                feed,
                threads=threads,
                level=level,
                provider=provider,
                data_folder=file.data_folder,
                custom_ops=custom_ops,
                in_place=decoder.in_place,
            ) as timed:
                return Prefill(tokens, min(timed.run(0.0, least=2).costs_ns))
        except ModelError:
            return None


def _lengths(decoder: ProvenDecoder) -> tuple[int, int]:
    """Two lengths that the model takes; a window that is full would not show what grows."""
    most = min(
        [s.capacity for s in decoder.claim.states if s.kind == "window" and s.capacity is not None], default=_LONG
    )
    return max(0, min(_SHORT, most - 2)), min(_LONG, most)
