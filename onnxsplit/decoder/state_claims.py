"""Kinds, axes and sizes of the states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from onnxsplit.decoder.claim import StateClaim
from onnxsplit.decoder.files import Beside
from onnxsplit.decoder.names import kind_of_state
from onnxsplit.decoder.override import StateOverride
from onnxsplit.decoder.pairing import StatePair
from onnxsplit.decoder.reasons import DECIDE, NotClaimed
from onnxsplit.plan import Shape, TensorSpec
from onnxsplit.plan_decoder import StateKind

_KEY_AND_VALUE = 2
_OF_ATTENTION = frozenset({"key", "value", "k", "v"})


@dataclass(frozen=True)
class _Ends:
    """The shapes of both ends of a state, of equal rank, and the size or name of the axis of the rows.

    A size of ``present`` is ``"?"`` where it is not known.
    """

    past: Shape
    present: Shape
    batch: int | str | None

    def size(self, axis: int) -> int | None:
        """The fixed size of an axis; None for a free one."""
        return next((size for size in (self.past[axis], self.present[axis]) if isinstance(size, int)), None)

    def grow(self) -> list[int]:
        """The free axes, other than that of the rows, whose sizes have another name in the second end."""
        return [
            axis
            for axis, (one, other) in enumerate(zip(self.past, self.present, strict=True))
            if isinstance(one, str) and isinstance(other, str) and one not in (other, self.batch) and other != "?"
        ]


def state_claim(
    pair: StatePair, specs: Mapping[str, TensorSpec], batch: int | str | None, beside: Beside
) -> StateClaim:
    """Claim one state.

    Args:
        pair: its two ends.
        specs: types and shapes of inputs and outputs.
        batch: the size or name of the tokens' first axis; None where it is not known.
        beside: what the files beside the model say.

    Raises:
        NotClaimed: its kind, its axes or its sizes are not clear.
    """
    ends = _ends(pair, specs, batch)
    _refuse_layers(pair, ends)
    given = pair.given or StateOverride(pair.past, pair.present)
    kind, axis = _kind(pair, ends, given)
    batch_axis = given.batch_axis
    if batch_axis is None:
        told = pair.trace.batch_axis if pair.trace is not None else None
        batch_axis = told if told is not None else _batch_axis(pair, ends, axis, batch)
    for name, place in (("axis", axis), ("batch_axis", batch_axis)):
        if place is not None and (place >= len(ends.past) or (name == "axis" and place == batch_axis)):
            raise NotClaimed(
                f"{name} = {place} does not fit {pair.past!r} {_text(ends.past)}; correct the --decoder file"
            )
    capacity = ends.size(axis) if axis is not None else None
    if kind == "window":
        capacity = _window(pair, capacity)
    elif kind == "append" and axis is not None and isinstance(ends.past[axis], int):
        raise NotClaimed(
            f"the cache {pair.past!r} {_text(ends.past)} has a fixed number of positions, and each step adds to them; "
            "export it with a free axis"
        )
    return StateClaim(
        past=pair.past,
        present=pair.present,
        kind=kind,
        batch_axis=batch_axis,
        axis=axis,
        shape=_shape(pair, ends, given, (batch_axis, axis), beside),
        capacity=capacity if kind in ("in-place", "window") else None,
    )


def _refuse_layers(pair: StatePair, ends: _Ends) -> None:
    """Refuse a cache that holds several layers, unless the user gave it: all of them would be in one stage."""
    trace = pair.trace
    if pair.given is None and trace is not None and trace.kind != "recurrent" and trace.pieces > _KEY_AND_VALUE:
        raise NotClaimed(
            f"{pair.past!r} {_text(ends.past)} holds the caches of several layers, so one stage would have to hold "
            f"all of them; export the model with a cache for each layer, or {DECIDE}"
        )


def _ends(pair: StatePair, specs: Mapping[str, TensorSpec], batch: int | str | None) -> _Ends:
    past, present = specs.get(pair.past), specs.get(pair.present)
    if past is None or past.shape is None:
        raise NotClaimed(f"the cache {pair.past!r} declares no shape; export the model with the ranks of its inputs")
    if present is not None and present.dtype != past.dtype:
        raise NotClaimed(
            f"{pair.past!r} is {past.dtype} and {pair.present!r} is {present.dtype}, so one cannot become the other"
        )
    after = present.shape if present is not None else None
    if after is not None and len(after) != len(past.shape):
        raise NotClaimed(
            f"{pair.past!r} has {len(past.shape)} axes and {pair.present!r} has {len(after)}, so one cannot become "
            "the other"
        )
    return _Ends(past.shape, after if after is not None else ("?",) * len(past.shape), batch)


def _kind(pair: StatePair, ends: _Ends, given: StateOverride) -> tuple[StateKind, int | None]:
    """The kind of a state and the axis of its positions."""
    trace = pair.trace
    kind, axis = given.kind, given.axis
    if kind is None:
        kind = trace.kind if trace is not None else _kind_by_shapes(pair, ends)
        assert kind is not None
    if kind == "recurrent":
        return kind, None
    if axis is None and trace is not None:
        axis = trace.axis
    if axis is None:
        grows = ends.grow()
        if len(grows) != 1:
            raise NotClaimed(
                f"the axis of the positions of {pair.past!r} {_text(ends.past)} is not clear; give it as axis = N in "
                "--decoder FILE.toml"
            )
        axis = grows[0]
    fixed = axis < len(ends.past) and isinstance(ends.past[axis], int)
    if kind == "window" and fixed and given.kind is None:  # it is full from the start, so a step replaces it
        return "recurrent", None
    return kind, axis


def _kind_by_shapes(pair: StatePair, ends: _Ends) -> StateKind:
    """The kind of a pair that only names speak for: recurrent if its shape stays and it is not a key or a value."""
    if ends.grow():
        raise NotClaimed(
            f"names pair {pair.past!r} {_text(ends.past)} with {pair.present!r} {_text(ends.present)}, but no op that "
            f"adds positions was found between them; {DECIDE}"
        )
    if not _OF_ATTENTION.isdisjoint(kind_of_state(pair.past)):
        raise NotClaimed(
            f"names pair {pair.past!r} with {pair.present!r}, but no op that updates a cache was found between them; "
            f"{DECIDE}"
        )
    return "recurrent"


def _batch_axis(pair: StatePair, ends: _Ends, axis: int | None, batch: int | str | None) -> int:
    """The axis of the rows: that named as the tokens' rows, else the only free one, else the first of size 1."""
    others = [place for place in range(len(ends.past)) if place != axis]
    if isinstance(batch, str) and batch != "?":
        named = [place for place in others if ends.past[place] == batch]
        if len(named) == 1:
            return named[0]
        for place in others:
            _refuse_product(pair, ends.past, place, batch)
    free = [place for place in others if not isinstance(ends.past[place], int)]
    if len(free) == 1:
        return free[0]
    if not free:
        ones = [place for place in others if ends.past[place] == 1]
        if ones:
            return ones[0]
    if 0 in free:
        return 0
    raise NotClaimed(
        f"the axis of the rows of {pair.past!r} {_text(ends.past)} is not clear; give it as batch_axis = N in "
        "--decoder FILE.toml"
    )


def _refuse_product(pair: StatePair, shape: Shape, place: int, batch: str) -> None:
    """Refuse an axis that rows and heads share, such as ``batch_size x num_heads``."""
    size = shape[place]
    if isinstance(size, str) and batch in size and re.search(r"\*| x ", size):
        raise NotClaimed(
            f"rows and heads share an axis of {pair.past!r} {_text(shape)}; export the model with an axis for each"
        )


def _window(pair: StatePair, size: int | None) -> int:
    """The most positions of a window."""
    most = size if size is not None else pair.trace.most if pair.trace is not None else None
    if most is None:
        raise NotClaimed(
            f"the graph cuts {pair.past!r} to its latest positions, but how many it keeps is not a constant; {DECIDE}"
        )
    return most


def _shape(
    pair: StatePair, ends: _Ends, given: StateOverride, free: tuple[int, int | None], beside: Beside
) -> tuple[int, ...]:
    """The shape of one row: 1 along the axis of the rows, 0 along that of the positions."""
    batch_axis, axis = free
    if given.shape is not None:
        if len(given.shape) != len(ends.past):
            raise NotClaimed(
                f"shape = {list(given.shape)} does not fit {pair.past!r} {_text(ends.past)}; correct the --decoder file"
            )
        sizes = list(given.shape)
    else:
        sizes = [_size(pair, ends, place, free, beside) for place in range(len(ends.past))]
    sizes[batch_axis] = 1
    if axis is not None:
        sizes[axis] = 0
    return tuple(sizes)


def _size(pair: StatePair, ends: _Ends, place: int, free: tuple[int, int | None], beside: Beside) -> int:
    """The size of one axis, as declared, else as the files beside the model say; anything for free axes."""
    if place in free:
        return 0
    size = ends.size(place)
    if size is not None:
        return size
    rest = [other for other in range(len(ends.past)) if other not in free]
    known = {1: beside.head_size, 2: beside.heads} if free[1] is not None else {}
    size = known.get(len(rest) - rest.index(place))  # heads, then the width of a head, are the last two of the others
    if size is None:
        raise NotClaimed(
            f"the size of axis {place} of {pair.past!r} {_text(ends.past)} is not known: neither the model nor "
            "genai_config.json nor config.json beside it says it. Put one there, or give shape = [...] in --decoder "
            "FILE.toml"
        )
    return size


def _text(shape: Shape) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
