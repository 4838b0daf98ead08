"""The inputs of a step of a whole decoder: states that are empty or made up, and the controls of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxsplit.decoder.claim import DecoderClaim, StateClaim
from onnxsplit.plan import TensorSpec
from onnxsplit.plan_decoder import Control, Decoder, RowLayout, State
from onnxsplit.step_inputs import control_array, state_shape
from onnxsplit.tensors import Array, numpy_dtype

AnyDecoder = DecoderClaim | Decoder
"""A decoder as claimed, or as a plan describes it."""

AnyState = StateClaim | State


def room(states: Iterable[AnyState], least: int) -> int:
    """The number of positions in the buffers of in-place states: the capacity that one demands, or ``least``."""
    return max((state.capacity or 0 for state in states if state.kind == "in-place"), default=0) or least


def empty_state(state: AnyState, spec: TensorSpec, rows: int, positions: int) -> Array:
    """What a state holds before the first step of its rows.

    Args:
        state: the state.
        spec: the type and the declared shape of past.
        rows: the number of rows.
        positions: the size of the buffer of an in-place state; other states hold no position.
    """
    fixed = spec.shape[state.axis] if spec.shape is not None and state.axis is not None else None
    held = positions if state.kind == "in-place" else 0
    shape = state_shape(state, rows, fixed if isinstance(fixed, int) else held)
    return np.zeros(shape, numpy_dtype(spec.dtype))


def controls_of(
    controls: Iterable[Control],
    specs: Mapping[str, TensorSpec],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
    width: int,
    layout: RowLayout,
    *,
    all_scores: bool = False,
) -> dict[str, Array]:
    """All controls of a step by name.

    Args:
        controls: the controls.
        specs: the types and shapes of the inputs.
        starts: for each row, the number of its positions before the step.
        tokens: for each row, its new tokens; all rows have the same number.
        width: the size of past along the axis of the positions.
        layout: how the rows share the run.
        all_scores: True computes the scores of all new positions, where the model can also leave out some.
    """
    new = len(tokens[0])
    arrays = {}
    for control in controls:
        array = control_array(control, specs[control.input], starts, new, tokens, width, layout)
        arrays[control.input] = np.zeros_like(array) if all_scores and control.role == "first-scored" else array
    return arrays


def example_step(
    decoder: AnyDecoder,
    specs: Mapping[str, TensorSpec],
    *,
    rows: int,
    context: int,
    new: int = 1,
) -> dict[str, Array]:
    """Made-up inputs of a step that computes all scores; the same arguments give the same inputs.

    All rows have the same length. States hold small random numbers, and tokens are random.

    Args:
        decoder: the decoder.
        specs: the types and shapes of the inputs.
        rows: the number of rows.
        context: the number of positions of each row before the step.
        new: the number of new tokens of each row.
    """
    random = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    width = context
    for state in decoder.states:
        spec = specs[state.past]
        held = context
        if state.kind == "in-place":
            held = state.capacity or context + new
        elif state.kind == "window":
            held = width = min(context, state.capacity or context)
        fixed = spec.shape[state.axis] if spec.shape is not None and state.axis is not None else None
        shape = state_shape(state, rows, fixed if isinstance(fixed, int) else held)
        kind = numpy_dtype(spec.dtype)
        values = random.standard_normal(shape, np.float32)
        inputs[state.past] = (values if kind.kind not in "iub" else np.zeros(shape)).astype(kind)
    below = min(decoder.vocabulary, decoder.tokens_below or decoder.vocabulary)
    tokens = random.integers(0, below, (rows, new)).tolist()
    layout: RowLayout = "equal" if rows > 1 else "one"
    starts = [context] * rows
    return inputs | controls_of(decoder.controls, specs, starts, tokens, width, layout, all_scores=True)
