"""Ordinary requests: whole ones of a kind that was checked before. Their checks and sizes are known from that time."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxsplit.tensors import Array
from runtime.coordinator.answers import Answer
from runtime.coordinator.pending import unsendable
from runtime.coordinator.request_io import RequestIO
from runtime.memory.layouts import OutputShapes, shapes_of
from runtime.requests.admission import Admission
from runtime.requests.request import Answering, OutputSelection

_REMEMBERED = 256  # kinds of requests that are remembered


@dataclass(frozen=True, eq=False, slots=True)
class Ordinary:
    """What all requests share whose inputs have the same names, types and shapes and that ask for the same outputs.

    Attributes:
        selection: the outputs that they ask for; all are computed by stages.
        shapes: type and shape of each input.
        size: bytes of their inputs.
        cost: their cost, in thousandths of an ordinary request.
    """

    selection: OutputSelection
    shapes: OutputShapes
    size: int
    cost: int


class OrdinaryRequests:
    """Remembers the kinds of requests that have passed all checks and run whole."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, Ordinary] = {}

    def find(self, inputs: object, outputs: object) -> Ordinary | None:
        """The kind of a request, with the arguments of its caller; None if its like was not seen before."""
        key = _key(inputs, outputs)
        try:
            return None if key is None else self._kinds.get(key)
        except TypeError:  # a name that cannot be hashed
            return None

    def latest(self, most: int) -> list[Ordinary]:
        """The kinds that were remembered last."""
        return list(self._kinds.values())[-most:]

    def learn(
        self, inputs: Mapping[str, Array], selection: OutputSelection, *, asked: bool, size: int, cost: int
    ) -> Ordinary | None:
        """Remember a request that was checked and is neither split nor completed; None if it holds strings.

        Args:
            inputs: its inputs.
            selection: its outputs.
            asked: whether the caller has named the outputs.
            size: bytes of the inputs.
            cost: its cost.
        """
        key = _key(inputs, selection.names if asked else None)
        shapes = shapes_of(inputs)
        if key is None or any(dtype == "string" for dtype, _ in shapes.values()):
            return None
        if len(self._kinds) >= _REMEMBERED:
            self._kinds.clear()
        kind = self._kinds[key] = Ordinary(selection, shapes, size, cost)
        return kind


def _key(inputs: object, outputs: object) -> Hashable | None:
    """What identifies the kind of a request; None if it is not made of plain arrays."""
    if type(inputs) is not dict or not (outputs is None or type(outputs) in (tuple, list)):
        return None
    key: list[Any] = [None if outputs is None else tuple(outputs)]  # type: ignore[arg-type]
    for name, array in inputs.items():
        if type(array) is not np.ndarray:
            return None
        key += name, array.dtype, array.shape
    return tuple(key)


class WholeRequest(Answering):
    """The future of an ordinary request, and its place in the pipeline.

    Args:
        request_io: sends it to the nodes.
        admission: gives a place to this object.
        kind: what is known of it.
        inputs: its inputs.
        deadline_ns: its deadline; None for no deadline.

    Attributes:
        size: bytes of its inputs.
    """

    def __init__(
        self,
        request_io: RequestIO,
        admission: Admission,
        kind: Ordinary,
        inputs: Mapping[str, Array],
        deadline_ns: int | None,
    ) -> None:
        super().__init__(request_io=request_io)
        self.size = kind.size
        self._admission = admission
        self._kind = kind
        self._inputs: Mapping[str, Array] | None = inputs  # until they are sent
        self._deadline_ns = deadline_ns
        self._number: int | None = None

    @property
    def future(self) -> Answering:
        """The request itself."""
        return self

    @property
    def whole_size(self) -> int:
        """Bytes of its inputs."""
        return self.size

    @property
    def place(self) -> object:
        """What the admission knows the request by: the request itself."""
        return self

    def enter(self) -> None:
        """Send it; it has been admitted."""
        kind, request_io, inputs = self._kind, self._request_io, self._inputs
        assert request_io is not None
        assert inputs is not None
        self._inputs = None
        try:
            self._number = request_io.submit(
                inputs, kind.selection.computed, kind.cost, self._deadline_ns, self._answered, kind.shapes
            )
        except Exception as error:
            self._answered(Answer({}, unsendable(error)))

    def abandon(self) -> None:
        """End it, and give its place back, because its caller was interrupted while it entered."""
        self._give_up()
        self._admission.leave(self)

    def _give_up(self) -> None:
        if self._number is not None and self._request_io is not None:
            self._request_io.give_up(self._number)

    def _answered(self, answer: Answer) -> None:
        """End the future, and give its place back."""
        self._admission.leave(self)
        if not self.set_running_or_notify_cancel():
            return
        if answer.error is not None:
            self.set_exception(answer.error)
            return
        self.visits = answer.visits
        self.set_result({name: answer.outputs[name] for name in self._kind.selection.names})
