"""What the entries of a lane leave out, because it recurs: the signature, and how the two become a fragment again."""

from __future__ import annotations

import struct

from msgspec import Struct

from onnxsplit.tensors import Array
from runtime.errors import ProtocolError
from runtime.memory.lane import SIGNATURES, VISIT_BYTES, Entry
from runtime.memory.peer_arena import PeerArena
from runtime.wire.messages.data import SLOTS, Fragment, TensorHead, TensorPlace, Visit

_VISIT = struct.Struct("=8Q")
assert _VISIT.size == VISIT_BYTES
# The bounds of runtime.wire.messages.base.
_MOST_AMOUNT, _MOST_COST, _MOST_INDEX, _MOST_BYTES = 1 << 48, 1 << 40, 1 << 16, 1 << 50
MOST_NS = 1 << 62
"""The largest time in a message or an entry."""

_VIEWS = 64  # slots of a signature whose arrays are kept


class SlotTensor(Struct, frozen=True):
    """One tensor of a signature: its head, and how many bytes after the first tensor it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    at: int


class Signature(Struct, frozen=True):
    """What many fragments of one sender share; the fields are those of a fragment."""

    source: int
    route: tuple[int, ...]
    wanted: tuple[str, ...]
    parts: tuple[SlotTensor, ...]


class Known:
    """A signature, at its reader.

    Attributes:
        sender: the number of the sending process.
        signature: the signature.
    """

    __slots__ = ("_peer", "_views", "sender", "signature")

    def __init__(self, sender: int, signature: Signature, peer: PeerArena) -> None:
        self.sender = sender
        self.signature = signature
        self._peer = peer
        self._views: dict[int, tuple[int, dict[str, Array]]] = {}  # by slot: its offset, and the arrays in it

    def tensors(self, entry: Entry) -> dict[str, Array]:
        """The tensors of an entry, in the sender's memory. The same slot gives the same arrays.

        Raises:
            ProtocolError: they would lie outside the memory.
        """
        kept = self._views.get(entry.slot)
        if kept is not None and kept[0] == entry.offset:
            return kept[1]
        tensors = {
            part.name: self._peer.array(
                TensorPlace(entry.slot, entry.generation, entry.offset + part.at), part.dtype, part.shape
            )
            for part in self.signature.parts
        }
        if len(self._views) >= _VIEWS:
            self._views.clear()
        self._views[entry.slot] = entry.offset, tensors
        return tensors

    def holds(self, entry: Entry) -> bool:
        """Whether what was read from an entry's slot is valid: its use has not ended."""
        return self._peer.holds(entry.slot, entry.generation)

    def fragment(self, entry: Entry, now_ns: int) -> Fragment:
        """The fragment that an entry stands for.

        Raises:
            ProtocolError: its visits are malformed.
        """
        same = self.signature
        return Fragment(
            entry.request,
            entry.attempt,
            entry.view,
            entry.cost,
            max(1, entry.deadline_ns - now_ns) if entry.deadline_ns else 0,
            self.sender,
            same.source,
            same.route,
            same.wanted,
            tuple(
                [
                    TensorHead(
                        part.name,
                        part.dtype,
                        part.shape,
                        TensorPlace(entry.slot, entry.generation, entry.offset + part.at),
                    )
                    for part in same.parts
                ]
            ),
            visits_of(entry.visits),
        )


def visits_of(data: bytes) -> tuple[Visit, ...]:
    """The visits of an entry.

    Raises:
        ProtocolError: a number in them is too large.
    """
    visits = []
    for words in _VISIT.iter_unpack(data):
        if max(words[:2]) > _MOST_INDEX or max(words[2:6]) > MOST_NS or max(words[6:]) > _MOST_BYTES:
            raise ProtocolError(f"an entry of a lane has the visit {words}, whose numbers are too large")
        visits.append(Visit(*words))
    return tuple(visits)


def bytes_of(visit: Visit) -> bytes:
    """A visit as it stands in an entry."""
    return _VISIT.pack(
        visit.stage,
        visit.replica,
        visit.arrived_ns,
        visit.started_ns,
        visit.ended_ns,
        visit.sent_ns,
        visit.output_bytes,
        visit.shared_bytes,
    )


def is_sound(entry: Entry) -> bool:
    """Whether the numbers of an entry are within the bounds of messages."""
    return (
        entry.request <= _MOST_AMOUNT
        and entry.attempt <= _MOST_AMOUNT
        and entry.view <= _MOST_AMOUNT
        and 0 < entry.cost <= _MOST_COST
        and entry.deadline_ns <= MOST_NS
        and entry.slot < SLOTS
        and entry.generation <= MOST_NS
    )


class Signatures:
    """The signatures that one peer's entries refer to.

    Args:
        sender: the peer's number.
        peer: its memory.
    """

    def __init__(self, sender: int, peer: PeerArena) -> None:
        self._sender = sender
        self._peer = peer
        self._numbers = [0] * SIGNATURES
        self._known: list[Known | None] = [None] * SIGNATURES

    def get(self, number: int) -> Known | None:
        """The signature of a number; None when it is not known."""
        place = number % SIGNATURES
        return self._known[place] if self._numbers[place] == number else None

    def learn(self, fragment: Fragment) -> bool:
        """Take in the signature of a fragment that was sent as a message; False when it can have none."""
        places = [head.payload for head in fragment.tensors if isinstance(head.payload, TensorPlace)]
        if len(places) < len(fragment.tensors) or len({place.slot for place in places}) != 1 or fragment.rows:
            return False
        start = min(place.offset for place in places)
        parts = [
            SlotTensor(head.name, head.dtype, head.shape, place.offset - start)
            for head, place in zip(fragment.tensors, places, strict=True)
        ]
        place_in_table = fragment.signature % SIGNATURES
        if fragment.signature < self._numbers[place_in_table]:  # messages can overtake each other
            return False
        self._numbers[place_in_table] = fragment.signature
        self._known[place_in_table] = Known(
            self._sender,
            Signature(fragment.source, fragment.route, fragment.wanted, tuple(parts)),
            self._peer,
        )
        return True
