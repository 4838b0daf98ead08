"""How tensors get from one process of a pipeline to another: in place where they share memory, else as frames."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxsplit.tensors import Array, dtype_name, numpy_dtype, size_bytes
from runtime import codec
from runtime.arena import Arena, Block, PeerArena, Step
from runtime.errors import ProtocolError
from runtime.extents import aligned
from runtime.messages import Fragment, Memory, Peer, Place, Visit
from runtime.pinned import Pin
from runtime.stage_runner import Shapes
from runtime.transport import Outlet

_LAYOUTS = 256  # that are remembered
_log = logging.getLogger("runtime.payloads")


Readers = Mapping[int, Sequence[str]]
"""The tensors that each peer will get, by its number."""


@dataclass
class Outgoing:
    """Tensors that are about to go to some peers: the arrays, and where those are that lie in shared memory."""

    arrays: dict[str, Array] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    size_bytes: int = 0
    shared_bytes: int = 0

    def count(self) -> None:
        """Add up the bytes of all arrays, and of those in shared memory."""
        self.size_bytes = sum(array.nbytes for array in self.arrays.values())
        self.shared_bytes = sum(self.arrays[name].nbytes for name in self.places)


@dataclass(frozen=True)
class _Layout:
    """How tensors of some shapes go to some peers; worked out once.

    Attributes:
        shapes: of all tensors.
        large: of those that go to shared memory, the offset in a slot of ``size`` bytes.
        rows: the returns of the peers that read from the slot.
        size_bytes: of all tensors.
        shared_bytes: of the large ones, without what lies between them.
        small: arrays for those that go into headers, made when first needed and used again every time.
    """

    shapes: Shapes
    large: Mapping[str, int]
    size: int
    rows: tuple[memoryview, ...]
    size_bytes: int
    shared_bytes: int
    small: dict[str, Array] = field(default_factory=dict)


class Payloads:
    """One process's side: its own memory, and that of the peers it has mapped.

    Args:
        limit_bytes: of own payloads in shared memory at once; what does not fit goes as frames, and with 0 all does.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._arena: Arena | None = None
        if limit_bytes:
            try:
                self._arena = Arena(limit_bytes)
            except OSError as error:
                _log.warning("no shared memory (%s): tensors are copied through sockets", error.strerror)
        self._me = -1
        self._peers: dict[int, PeerArena] = {}
        self._layouts: dict[tuple[int, tuple[tuple[int, Sequence[str]], ...]], _Layout] = {}
        self._rows: dict[int, memoryview] = {}  # returns of the peers that may read this process's memory

    def close(self) -> None:
        """Let go of all memory."""
        self._layouts.clear()
        for row in self._rows.values():
            row.release()
        self._rows.clear()
        for peer in self._peers.values():
            peer.close()
        if self._arena is not None:
            self._arena.close()

    @property
    def memory(self) -> Memory | None:
        """What peers need to map this process's memory."""
        return self._arena.address if self._arena is not None else None

    @property
    def lent_bytes(self) -> int:
        """Bytes of this process's memory that peers have not returned yet."""
        return self._arena.used_bytes if self._arena is not None else 0

    def meet(self, me: int, peers: Mapping[int, Peer]) -> tuple[int, ...]:
        """Learn the own number, and map the memory of peers by theirs; returns those where that went well."""
        self._me = me
        for number, peer in peers.items():
            if peer.memory is None or self._arena is None:
                continue
            try:
                self._peers[number] = PeerArena(peer.memory)
            except (OSError, ProtocolError) as error:
                _log.info("stage %d.%d shares no memory with this process: %s", peer.stage, peer.replica, error)
        return tuple(self._peers)

    def share(self, readers: Iterable[int]) -> None:
        """From now on, lend memory to these peers."""
        self._rows = {reader: self._peers[reader].returns(self._me) for reader in readers if reader in self._peers}
        self._layouts.clear()

    def pin(self, pin: Pin) -> None:
        """Pin own and mapped memory for a device, as it is used."""
        if self._arena is not None:
            self._arena.pin(pin)
        for peer in self._peers.values():
            peer.pin(pin)

    def step(self, peer: int, request: int) -> Step:
        """How far a peer is with a request, as far as its memory tells."""
        return self._peers[peer].step(request) if peer in self._peers else Step.UNKNOWN

    def record(self, request: int, step: Step) -> None:
        """Let peers see how far this process is with a request."""
        if self._arena is not None:
            self._arena.record(request, step)

    # Outgoing

    def reserve(self, shapes: Shapes, readers: Readers) -> Outgoing:
        """Arrays for tensors that peers will get: large ones in shared memory, as far as it goes.

        Small ones lie where those of the last call lay, since they are copied as they are sent. ``shapes`` must not
        change any more.
        """
        going = Outgoing()
        layout = self._layout(shapes, readers)
        self._place(going, layout)
        for name, (dtype, shape) in shapes.items():
            if name in going.arrays:
                continue
            array = layout.small.get(name)
            if array is None:
                array = np.empty(shape, numpy_dtype(dtype))
                if array.nbytes <= codec.INLINE_BYTES:
                    layout.small[name] = array
            going.arrays[name] = array
        going.size_bytes = layout.size_bytes
        return going

    def place(self, going: Outgoing, shapes: Shapes, readers: Readers) -> None:
        """Add arrays in shared memory, for those tensors where it is worth it and there is room."""
        if self._rows:
            self._place(going, self._make_layout(shapes, readers))

    def _place(self, going: Outgoing, layout: _Layout) -> None:
        if not layout.large:
            return
        assert self._arena is not None
        block = self._arena.reserve(layout.size, layout.rows)
        if block is None:
            return
        going.blocks.append(block)
        going.shared_bytes += layout.shared_bytes
        for name, at in layout.large.items():
            going.arrays[name] = self._arena.array(block, at, *layout.shapes[name])
            going.places[name] = block.place(at)

    def _layout(self, shapes: Shapes, readers: Readers) -> _Layout:
        key = (id(shapes), tuple(readers.items()))  # the layout holds the shapes, so the number stays theirs
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = self._make_layout(shapes, readers)
        return layout

    def _make_layout(self, shapes: Shapes, readers: Readers) -> _Layout:
        shared = {name for reader, names in readers.items() if reader in self._rows for name in names}
        sizes = {name: size_bytes(*spec) for name, spec in shapes.items() if spec[0] != "string"}
        large, at = {}, 0
        for name, size in sizes.items():
            if size > codec.INLINE_BYTES and name in shared:
                large[name] = at
                at += aligned(size)
        rows = [row for reader, row in self._rows.items() if not large.keys().isdisjoint(readers.get(reader, ()))]
        return _Layout(
            shapes=shapes,
            large=large,
            size=at,
            rows=tuple(rows),
            size_bytes=sum(sizes.values()),
            shared_bytes=sum(sizes[name] for name in large),
        )

    def complete(self, going: Outgoing, tensors: Mapping[str, Array], readers: Readers) -> None:
        """See that ``going`` holds all of ``tensors``: what is not there yet is copied to where readers find it."""
        if tensors is going.arrays:
            return
        rest = {name: tensor for name, tensor in tensors.items() if going.arrays.get(name) is not tensor}
        for name in rest:
            going.places.pop(name, None)
        self.place(going, shapes_of(rest), readers)
        for name, tensor in rest.items():
            if name in going.places:
                going.arrays[name][...] = tensor
            else:
                going.arrays[name] = tensor
        going.count()

    def drop(self, going: Outgoing) -> None:
        """Take the tensors back: they go nowhere."""
        for block in going.blocks:
            block.readers.clear()

    def send(
        self,
        link: Outlet,
        reader: int,
        going: Outgoing,
        names: Iterable[str],
        *,
        request: int,
        source: int,
        route: tuple[int, ...],
        wanted: tuple[str, ...],
        history: tuple[Visit, ...] = (),
    ) -> None:
        """Send some of the tensors to one of the peers they are for."""
        shared = reader in self._rows
        heads, frames = codec.encode_tensors({n: going.arrays[n] for n in names}, going.places if shared else {})
        header = codec.encode(Fragment(request, self._me, source, route, wanted, heads, history))
        trackers = link.send(header, frames, track=bool(frames and going.blocks))
        for block in going.blocks:
            block.sending += trackers

    # Incoming

    def receive(self, fragment: Fragment, frames: Sequence[codec.Buffer]) -> dict[str, Array]:
        """The tensors of a fragment, where they are. Give them back with :meth:`give_back`.

        Raises:
            ProtocolError: the message does not hold together.
        """

        def at(place: Place, dtype: str, shape: Sequence[int]) -> Array:
            peer = self._peers.get(fragment.sender)
            if peer is None:
                raise ProtocolError(f"tensors in the memory of process {fragment.sender}, which is not mapped here")
            return peer.array(place, dtype, shape)

        return codec.decode_tensors(fragment.tensors, frames, at)

    def hold(self, fragments: Sequence[Fragment]) -> bool:
        """False when a sender has taken its memory back meanwhile, and what was read there means nothing."""
        for fragment in fragments:
            for head in fragment.tensors:
                if isinstance(head.payload, Place) and not self._peers[fragment.sender].holds(head.payload):
                    return False
        return True

    def give_back(self, fragment: Fragment) -> None:
        """Let the sender have its memory again."""
        slot = -1
        for head in fragment.tensors:
            place = head.payload
            if isinstance(place, Place) and place.slot != slot and self._arena is not None:
                slot = place.slot
                self._arena.give_back(fragment.sender, place)


def shapes_of(tensors: Mapping[str, Array]) -> Shapes:
    """Types and shapes of tensors; those whose type has no name are left out."""
    named = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    return {name: (dtype, tensors[name].shape) for name, dtype in named.items() if dtype is not None}
