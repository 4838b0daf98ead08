"""The states of a model: pairs of an input and an output that pass from one request of a sequence to the next. Pure.

A sequence starts with zeros. The sizes of these initial states are found when the plan is loaded, axis by axis, in
this order:

    a fixed size of the input
    along the positions of a decoder's cache, which the plan knows: 0, or the size that the model demands
    the size of the axis of another input that has the same name
    along the batch axis, which the plan knows or is a free first axis: the rows of the other inputs
    a fixed size of the output
    0 where the axis has a name and the output's has not the same, because the state grows (a cache)

A size that none of them gives is not known, and then the client sends the initial state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct

from onnxsplit.errors import InputError, shown
from onnxsplit.plan import Plan, TensorSpec
from onnxsplit.plan_decoder import State
from onnxsplit.tensors import Array, dtype_name, element_count, numpy_dtype, size_bytes
from runtime.errors import PipelineError

_UNNAMED = "?"  # an axis without a name


class _Axis(Struct, frozen=True):
    """An axis of another input, whose size an axis of a state has."""

    input: str
    axis: int


_Size = int | tuple[_Axis, ...]
"""A size of an initial state: a number, or that of the first of these axes that a request gives; none: not known."""


class CarriedState(Struct, frozen=True):
    """An input and an output that are one state.

    Attributes:
        input: The input.
        output: The output, which the next request of the sequence gets as the input.
        spec: Type and shape of the input.
        sizes: The sizes of the initial state; None where the rank is not known, and the input's default, if it has
            one, is the initial state.
        has_default: Whether the input has a default.
    """

    input: str
    output: str
    spec: TensorSpec
    sizes: tuple[_Size, ...] | None
    has_default: bool = False

    def initial_shape(self, inputs: Mapping[str, Array]) -> tuple[int, ...]:
        """The shape of the initial state for the other inputs of a request.

        Raises:
            InputError: A size is not known. The message says which.
        """
        if self.sizes is None:
            raise InputError(self._unknown("its number of dimensions is not known"))
        return tuple(self._size(axis, size, inputs) for axis, size in enumerate(self.sizes))

    def check_request(self, state: Array, inputs: Mapping[str, Array]) -> None:
        """Check that a request has the sizes, such as the rows, of its sequence.

        Args:
            state: The state of the sequence.
            inputs: The inputs of the request.

        Raises:
            InputError: A size differs.
        """
        for axis, size in enumerate(self.sizes or ()):
            if isinstance(size, int) or axis >= state.ndim or (place := _given(size, inputs)) is None:
                continue
            own = inputs[place.input].shape[place.axis]
            if own != state.shape[axis]:
                raise InputError(
                    f"axis {place.axis} of input {place.input!r} has size {own}, and the sequence has its state "
                    f"{self.input!r} with size {state.shape[axis]} on axis {axis}; requests of a sequence have the "
                    "same sizes there"
                )

    def _size(self, axis: int, size: _Size, inputs: Mapping[str, Array]) -> int:
        if isinstance(size, int):
            return size
        if (place := _given(size, inputs)) is not None:
            return int(inputs[place.input].shape[place.axis])
        name = self.spec.shape[axis] if self.spec.shape is not None else _UNNAMED
        dimension = f"dimension {axis}" + (f" ({name})" if name != _UNNAMED else "")
        if not size:
            raise InputError(self._unknown(f"the size of {dimension} is not known"))
        places = " or ".join(dict.fromkeys(f"{place.input!r}" for place in size))
        raise InputError(self._unknown(f"the size of {dimension} is that of input {places}, which is missing"))

    def _unknown(self, why: str) -> str:
        return (
            f"the initial state of input {self.input!r} cannot be made: {why}. Send {self.input!r} in the request with "
            "sequence_start"
        )

    def check(self, array: Array) -> None:
        """Check that the input can take what the output gave.

        Raises:
            PipelineError: It cannot.
        """
        shape = self.spec.shape
        fits = shape is None or (
            len(shape) == array.ndim
            and all(not isinstance(want, int) or want == size for want, size in zip(shape, array.shape, strict=True))
        )
        if not fits or dtype_name(array.dtype) != self.spec.dtype:
            raise PipelineError(
                f"output {self.output!r} is {dtype_name(array.dtype)} of shape {list(array.shape)}, which does not fit "
                f"the state {self.input!r}: {_text(self.spec)}; the state stays as it was"
            )


@dataclass(frozen=True)
class ModelStates:
    """The states of one model.

    Attributes:
        pairs: The states; empty where the model has none that are known.
        declared: Whether the user has named them, so that clients do not see them among the inputs and outputs.
        inputs: The inputs that are states.
        outputs: The outputs that are states.
    """

    pairs: tuple[CarriedState, ...] = ()
    declared: bool = False
    inputs: frozenset[str] = field(init=False)
    outputs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", frozenset(pair.input for pair in self.pairs))
        object.__setattr__(self, "outputs", frozenset(pair.output for pair in self.pairs))

    @property
    def hidden(self) -> frozenset[str]:
        """The inputs and outputs that are not announced to clients."""
        return self.inputs | self.outputs if self.declared else frozenset()

    def continued(self, states: Mapping[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of a request that continues a sequence, with the states of the sequence.

        Raises:
            InputError: The request gives a state itself, or has other sizes than the sequence.
        """
        sent = next((name for name in inputs if name in self.inputs), None)
        if sent is not None:
            raise InputError(
                f"input {sent!r} is a state that the server keeps for this sequence; leave it out, or send it with "
                "sequence_start as the initial state"
            )
        for pair in self.pairs:
            pair.check_request(states[pair.input], inputs)
        return {**states, **inputs}

    def initial_shapes(self, inputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
        """The shapes of the initial states that a request does not give. Inputs with defaults need none.

        Raises:
            InputError: A size is not known.
        """
        return {
            pair.input: pair.initial_shape(inputs)
            for pair in self.pairs
            if pair.input not in inputs and not pair.has_default
        }

    def shapes_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bytes of initial states.

        Raises:
            InputError: No array can have one of the shapes.
        """
        total = 0
        for pair in self.pairs:
            if pair.input in shapes:
                shape = shapes[pair.input]
                if element_count(shape, 8) is None:
                    raise InputError(f"the initial state of input {pair.input!r} would have the shape {list(shape)}")
                total += size_bytes(pair.spec.dtype, shape)
        return total

    def zeros(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        """Initial states: zeros, false, or empty texts."""
        return {
            pair.input: np.full(shapes[pair.input], "", object)
            if pair.spec.dtype == "string"
            else np.zeros(shapes[pair.input], numpy_dtype(pair.spec.dtype))
            for pair in self.pairs
            if pair.input in shapes
        }

    def after(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The states after a request, by input name. They share no memory with the answers to other requests.

        Raises:
            PipelineError: An output does not fit the input that takes it.
        """
        states = {}
        for pair in self.pairs:
            array = outputs[pair.output]
            pair.check(array)
            states[pair.input] = array if array.base is None else np.array(array)
        return states


def states_of(model: str, plan: Plan, declared: Sequence[str] = ()) -> ModelStates:
    """The states of a model's plan: those declared as ``INPUT=OUTPUT``, or else those of its decoder.

    Raises:
        InputError: A declared state does not fit the plan. The message lists all that do not.
    """
    if not declared:
        states = plan.decoder.states if plan.decoder is not None else ()
        known = {state.past: state for state in states}
        return ModelStates(_pairs(plan, [(state.past, state.present) for state in states], known))
    found = [_split(plan, text) for text in declared]
    problems = [problem for pair in found for problem in _problems(plan, *pair)]
    for names, what in (([one for one, _ in found], "input"), ([other for _, other in found], "output")):
        problems += [f"{what} {name!r} is in two states" for name, count in Counter(names).items() if count > 1]
    if problems:
        raise InputError(
            f"--state does not fit model {model!r}: {'; '.join(problems)}. It has the inputs {', '.join(plan.inputs)} "
            f"and the outputs {', '.join(plan.outputs)}"
        )
    known = {state.past: state for state in plan.decoder.states} if plan.decoder is not None else {}
    return ModelStates(_pairs(plan, found, known), declared=True)


def candidates(plan: Plan) -> list[str]:
    """Pairs ``INPUT=OUTPUT`` that may be states: only these two have such a type and shape."""
    fits = [
        (one, other)
        for one in plan.inputs
        for other in plan.outputs
        if plan.tensors[one].shape and not _misfit(plan.tensors[one], plan.tensors[other], strict=True)
    ]
    inputs, outputs = Counter(one for one, _ in fits), Counter(other for _, other in fits)
    return [f"{one}={other}" for one, other in fits if inputs[one] == outputs[other] == 1]


def bind_to_models(words: Iterable[str], models: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The states that the words of ``--state`` declare, as ``INPUT=OUTPUT`` by model.

    Args:
        words: ``MODEL:INPUT=OUTPUT``; or ``INPUT=OUTPUT`` where the server has one model.
        models: The models of the server; empty where they come later, and then every word has to name its own.

    Raises:
        InputError: A word has another form, or names no model where it has to.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        model, colon, rest = word.partition(":")
        if not colon or (models and model not in models):
            model, rest = (models[0] if len(models) == 1 else ""), word
        if not model:
            raise InputError(
                f"--state {word} does not say whose state it is: write MODEL:INPUT=OUTPUT, with MODEL one of "
                f"{', '.join(models) or 'those that will be served'}"
            )
        if not all(rest.partition("=")):
            raise InputError(f"--state {word} is not INPUT=OUTPUT or MODEL:INPUT=OUTPUT")
        found[model] = (*found.get(model, ()), rest)
    return found


def _split(plan: Plan, text: str) -> tuple[str, str]:
    """The input and the output that a text names; names may hold ``=``, too."""
    parts = text.split("=")
    ways = [("=".join(parts[:at]), "=".join(parts[at:])) for at in range(1, len(parts))]
    return next((way for way in ways if way[0] in plan.inputs and way[1] in plan.outputs), ways[0])


def _problems(plan: Plan, one: str, other: str) -> list[str]:
    """Why an input and an output cannot be a state."""
    problems = []
    if one not in plan.inputs:
        problems.append(plan.refused_inputs().get(one, f"it has no input {shown(one)}"))
    if other not in plan.outputs:
        left_out = other in plan.dropped_outputs
        problems.append(f"output {shown(other)} was left out of the plan" if left_out else f"no output {shown(other)}")
    if not problems and (misfit := _misfit(plan.tensors[one], plan.tensors[other])):
        problems.append(f"input {one!r} and output {other!r} {misfit}")
    return problems


def _misfit(one: TensorSpec, other: TensorSpec, *, strict: bool = False) -> str:
    """Why an input cannot take an output; empty when it can. ``strict`` refuses fixed sizes for free ones, too."""
    if one.dtype != other.dtype or (
        one.shape is not None
        and other.shape is not None
        and (
            len(one.shape) != len(other.shape)
            or any(
                to != of and (isinstance(to, int) or strict) and isinstance(of, int)
                for to, of in zip(one.shape, other.shape, strict=True)
            )
        )
    ):
        return f"do not fit each other: {_text(one)} and {_text(other)}"
    return ""


def _pairs(
    plan: Plan, names: Iterable[tuple[str, str]], decoder_states: Mapping[str, State]
) -> tuple[CarriedState, ...]:
    names = list(names)
    states = {one for one, _ in names}
    others = {name: plan.tensors[name] for name in plan.inputs if name not in states}
    return tuple(
        CarriedState(
            one,
            other,
            plan.tensors[one],
            _sizes(plan.tensors[one], plan.tensors[other], others, decoder_states.get(one)),
            one in plan.defaults,
        )
        for one, other in names
    )


def _sizes(
    spec: TensorSpec, output: TensorSpec, others: Mapping[str, TensorSpec], state: State | None
) -> tuple[_Size, ...] | None:
    """The sizes of an initial state; see the module."""
    if spec.shape is None:
        return None
    known = (
        output.shape
        if output.shape is not None and len(output.shape) == len(spec.shape)
        else (_UNNAMED,) * len(spec.shape)
    )
    batch_axis = state.batch_axis if state is not None else spec.batch_axis
    sizes: list[_Size] = []
    for axis, size in enumerate(spec.shape):
        after = known[axis]
        if isinstance(size, int):
            sizes.append(size)
        elif state is not None and axis == state.axis:
            sizes.append(state.capacity or 0)
        elif named := _named(size, others):
            sizes.append(named)
        elif axis == (0 if batch_axis is None else batch_axis):
            sizes.append(_rows(others))
        elif state is not None:
            sizes.append(state.shape[axis])
        elif isinstance(after, int):
            sizes.append(after)
        else:
            sizes.append(0 if _UNNAMED != size != after else ())
    return tuple(sizes)


def _named(name: str, others: Mapping[str, TensorSpec]) -> tuple[_Axis, ...]:
    """The axes of other inputs that have a name."""
    return tuple(
        _Axis(other, axis)
        for other, spec in others.items()
        for axis, size in enumerate(spec.shape or ())
        if size == name != _UNNAMED
    )


def _given(places: Sequence[_Axis], inputs: Mapping[str, Array]) -> _Axis | None:
    """The first of some axes that a request has."""
    return next((one for one in places if one.input in inputs and one.axis < inputs[one.input].ndim), None)


def _rows(others: Mapping[str, TensorSpec]) -> tuple[_Axis, ...]:
    """The batch axes of other inputs: those that are proven, or else their free first axes."""
    proven = tuple(_Axis(name, spec.batch_axis) for name, spec in others.items() if spec.batch_axis is not None)
    return proven or tuple(
        _Axis(name, 0) for name, spec in others.items() if spec.shape and not isinstance(spec.shape[0], int)
    )


def _text(spec: TensorSpec) -> str:
    shape = "[?]" if spec.shape is None else f"[{', '.join(map(str, spec.shape))}]"
    return f"{spec.dtype}{shape}"
