"""Requests whose like was executed before: what was found out about the first of them holds for all. Pure.

    message   | constant bytes | tensor | constant bytes | tensor |

Two messages are alike if they have the same length, the same bytes outside their tensors, and their tensors at the same
places. Everything but the values of the tensors is then the same, too, so the message needs no decoding and no checks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from onnxsplit.tensors import Array
from runtime.gateway.batcher import Batcher, Checked
from runtime.gateway.models.version import Version
from runtime.gateway.protocol.inference import InferRequest, RequestedOutput

_MOST_CONSTANT_BYTES = 4 << 10  # of a message that is remembered
_MOST_KEYS = 256
_MOST_ALIKE = 4  # requests of one key that are remembered


class _TensorPlace(Struct, frozen=True):
    """Where a tensor lies in a message."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    start: int

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.count * self.dtype.itemsize


class PreparedRequest(Struct, frozen=True, eq=False):
    """What is known of a request beside its tensors.

    Attributes:
        version: The version that executes it.
        batcher: The version's batcher, for which it was checked.
        request: The request; once it is remembered, without its tensors and parameters.
        requested: The outputs that the response holds.
        checked: What the batcher knows of it; None for a request of a sequence.
    """

    version: Version
    batcher: Batcher
    request: InferRequest
    requested: tuple[RequestedOutput, ...]
    checked: Checked | None


Recalled = tuple[PreparedRequest, Mapping[str, Array]]
"""What is known of a request beside its inputs, and its inputs."""


class _Alike(Struct, frozen=True):
    """A kind of message, and what is known of its requests."""

    prepared: PreparedRequest
    constants: tuple[tuple[int, bytes], ...]
    places: tuple[_TensorPlace, ...]


class PreparedRequests:
    """Remembers requests. They are found by a key, which every protocol chooses, and by the bytes of the message.

    The key must hold the length of the message, and what says how the message is decoded. All requests are forgotten
    when the models change: ``changes`` is how often that has happened.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[_Alike, ...]] = {}
        self._changes = 0

    def find(self, changes: int, key: Hashable, message: bytes | bytearray) -> Recalled | None:
        """What is known of a request; None if its like was not seen before. The inputs are views of the message."""
        if changes != self._changes:
            self._known.clear()
            self._changes = changes
        for alike in self._known.get(key, ()):
            for start, constant in alike.constants:
                if not message.startswith(constant, start):
                    break
            else:
                return alike.prepared, {
                    place.name: np.frombuffer(message, place.dtype, place.count, place.start).reshape(place.shape)
                    for place in alike.places
                }
        return None

    def learn(self, changes: int, key: Hashable, message: bytes | bytearray, prepared: PreparedRequest) -> None:
        """Remember a request, if all of its inputs are views of the message and it has no name of its own.

        Requests of sequences are not remembered: few are alike, and they are checked with their states.

        Args:
            changes: How often the models had changed when its version was looked up.
            key: Its key.
            message: The whole message.
            prepared: What is known of it, with its inputs.
        """
        if prepared.request.sequence is not None:
            return
        places = _places(message, prepared.request.inputs)
        if places is None or prepared.request.id or changes != self._changes:
            return
        if len(message) - sum(place.size_bytes for place in places) > _MOST_CONSTANT_BYTES:
            return
        constants = _constants(message, places)
        if len(self._known) >= _MOST_KEYS and key not in self._known:
            self._known.clear()
        request = msgspec.structs.replace(prepared.request, inputs={}, parameters={})
        prepared = msgspec.structs.replace(prepared, request=request)
        newest = _Alike(prepared, constants, places)
        others = [alike for alike in self._known.get(key, ()) if alike.constants != constants]
        self._known[key] = (newest, *others[: _MOST_ALIKE - 1])


def _places(message: bytes | bytearray, inputs: Mapping[str, Array]) -> tuple[_TensorPlace, ...] | None:
    """Where the inputs lie in a message; None if one does not."""
    begin = _address(np.frombuffer(message, np.uint8)) if message else 0
    places = []
    for name, array in inputs.items():
        start = _address(array) - begin
        if not array.size or not array.flags.c_contiguous or not 0 <= start <= len(message) - array.nbytes:
            return None
        places.append(_TensorPlace(name, array.dtype, array.shape, array.size, start))
    return tuple(places)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _constants(message: bytes | bytearray, places: tuple[_TensorPlace, ...]) -> tuple[tuple[int, bytes], ...]:
    """The bytes of a message around its tensors, with their positions."""
    constants, at = [], 0
    for place in sorted(places, key=lambda place: place.start):
        constants.append((at, bytes(message[at : place.start])))
        at = place.start + place.size_bytes
    constants.append((at, bytes(message[at:])))
    return tuple(pair for pair in constants if pair[1])
