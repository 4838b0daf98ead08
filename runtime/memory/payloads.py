"""Passes tensors between processes of a pipeline: in place where they share memory, else as frames."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from onnxsplit.tensors import Array, numpy_dtype
from runtime.balance.board import LoadBoard
from runtime.errors import MemoryWithdrawn, ProtocolError
from runtime.memory.arena import Arena, Block
from runtime.memory.lane import Entry
from runtime.memory.lanes import Lanes, Taken
from runtime.memory.layouts import Layout, Layouts, OutputShapes, shapes_of
from runtime.memory.outgoing import Attempt, Outgoing, Readers
from runtime.memory.peer_arena import PeerArena
from runtime.memory.pinned import Pin
from runtime.wire import codec
from runtime.wire.links import Outlet
from runtime.wire.messages.control import Memory, Peer
from runtime.wire.messages.data import Fragment, Step, TensorPlace

_log = logging.getLogger("runtime.payloads")


class Payloads:
    """A process's own arena, and the arenas of the peers it has mapped.

    Args:
        limit_bytes: the largest size of this process's tensors in shared memory at once. Tensors that do not fit are
            sent as frames; with 0 there is no shared memory.

    Attributes:
        lanes: the lanes to and from these peers.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._arena: Arena | None = None
        if limit_bytes:
            try:
                self._arena = Arena(limit_bytes)
            except OSError as error:
                _log.warning("no shared memory (%s): tensors are copied through sockets", error.strerror)
        self.lanes = Lanes(self._arena)
        self._me = -1
        self._pin: Pin | None = None
        self._peers: dict[int, PeerArena] = {}
        self._gone: set[int] = set()  # peers that have ended, while fragments in their memory are still in use
        self._reading: Counter[int] = Counter()  # number of fragments in use, by the peer in whose memory they lie
        self._layouts = Layouts()
        self._rows: dict[int, memoryview] = {}  # the rows of returns of the peers that read this process's memory
        self._board = self._arena.board if self._arena is not None else LoadBoard()

    def close(self) -> None:
        """Release all memory; what an array still uses, with the last such array."""
        self._layouts.clear()
        self.lanes.close()
        while self._rows:
            self._rows.popitem()[1].release()
        while self._peers:
            self._peers.popitem()[1].close()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    @property
    def memory(self) -> Memory | None:
        """What peers need to map this process's memory."""
        return self._arena.address if self._arena is not None else None

    @property
    def lent_bytes(self) -> int:
        """Bytes of this process's shared memory that are in use."""
        return self._arena.used_bytes if self._arena is not None else 0

    def mend(self, held: Collection[Block]) -> None:
        """Repair this process's memory after an interrupt; see :meth:`.Arena.mend`."""
        if self._arena is not None:
            self._arena.mend(held)

    @property
    def board(self) -> LoadBoard:
        """This process's load board."""
        return self._board

    def boards(self) -> dict[int, LoadBoard]:
        """The load boards of the peers whose memory is mapped, by their numbers."""
        return {number: peer.board for number, peer in self._peers.items() if number not in self._gone}

    def meet(self, me: int, peers: Mapping[int, Peer]) -> tuple[int, ...]:
        """Map the memory of new peers, and take back what was lent to peers that have ended.

        The memory of a peer that has ended stays mapped as long as fragments in it are in use.

        Args:
            me: this process's number.
            peers: all present peers, by their numbers.

        Returns:
            The numbers of the peers whose memory is mapped.
        """
        self._me = me
        for number in [known for known in (*self._peers, *self._rows) if known not in peers]:
            self._forget(number)
        for number, peer in peers.items():
            if peer.memory is None or self._arena is None or number in self._peers:
                continue
            try:
                arena = self._peers[number] = PeerArena(peer.memory)
                if self._pin is not None:
                    arena.pin(self._pin)
                self.lanes.meet(me, number, arena)
            except (OSError, ProtocolError) as error:
                _log.info("stage %d.%d shares no memory with this process: %s", peer.stage, peer.replica, error)
        return tuple(number for number in self._peers if number not in self._gone)

    def _forget(self, number: int) -> None:
        self.lanes.forget(number)
        row = self._rows.pop(number, None)
        if row is not None and self._arena is not None:
            self._arena.forget(row)
            row.release()
        if number in self._peers:
            self._gone.add(number)
            self._unmap_if_unused(number)

    def _unmap_if_unused(self, number: int) -> None:
        if number in self._gone and not self._reading[number]:
            self._gone.remove(number)
            del self._reading[number]
            self._peers.pop(number).close()

    def share(self, readers: Iterable[int], links: Mapping[int, Outlet]) -> None:
        """Lend memory to these peers, in addition to those of earlier calls; ``links`` lead to those it sends to."""
        for reader in readers:
            if reader in self._peers and reader not in self._gone and reader not in self._rows:
                peer = self._peers[reader]
                self._rows[reader] = peer.returns(self._me)
                if reader in links:
                    self.lanes.lend(self._me, reader, peer, links[reader].bell)
        self._layouts.clear()

    def lends_to(self, reader: int) -> bool:
        """Whether a peer reads this process's memory in place."""
        return reader in self._rows

    def pin(self, pin: Pin) -> None:
        """Pin this process's and mapped memory for a device, as it is used."""
        self._pin = pin
        if self._arena is not None:
            self._arena.pin(pin)
        for peer in self._peers.values():
            peer.pin(pin)

    def step(self, peer: int, request: int, attempt: int) -> Step:
        """How far a peer is with an attempt at a request, or was when it died; UNKNOWN when it is not mapped."""
        return self._peers[peer].step(request, attempt) if peer in self._peers else Step.UNKNOWN

    def record(self, request: int, attempt: int, step: Step) -> None:
        """Publish how far this process is with an attempt at a request."""
        if self._arena is not None:
            self._arena.record(request, attempt, step)

    # Outgoing

    def reserve(self, shapes: OutputShapes, shared: tuple[str, ...]) -> Outgoing:
        """Make the arrays for a stage's outputs.

        Tensors that are read in place lie in shared memory while there is room. Other small ones reuse the arrays of
        the last call, because sending copies them.

        Args:
            shapes: types and shapes of all outputs; must not change afterwards.
            shared: the names of those that peers may read in place.
        """
        outgoing = Outgoing()
        layout = self._layouts.of(shapes, shared if self._rows else ())
        if self._place(outgoing, layout):
            outgoing.layout = layout
        for name, (dtype, shape) in shapes.items():
            if name in outgoing.arrays:
                continue
            array = layout.small.get(name)
            if array is None:
                array = np.empty(shape, numpy_dtype(dtype))
                if array.nbytes <= codec.INLINE_BYTES:
                    layout.small[name] = array
            outgoing.arrays[name] = array
        outgoing.size_bytes = layout.size_bytes
        return outgoing

    def reserve_whole(self, shapes: OutputShapes) -> Outgoing | None:
        """Arrays for tensors, no strings, that all lie in one slot of shared memory; None if there is no room."""
        layout = self.layout(shapes)
        block = self.block(layout) if layout.shared else None
        if block is None:
            return None
        places = {name: block.place(at) for name, at in layout.shared.items()}
        arrays = self.arrays(block, layout)
        return Outgoing(arrays, places, [block], layout.size_bytes, layout.shared_bytes, layout)

    def layout(self, shapes: OutputShapes) -> Layout:
        """Where tensors are placed that all lie in shared memory, if there is any."""
        return self._layouts.of(shapes, tuple(shapes) if self._rows else ())

    def place(self, outgoing: Outgoing, shapes: OutputShapes, shared: Collection[str]) -> None:
        """Add arrays in shared memory for the tensors among ``shared``, if there is room."""
        if self._rows:
            self._place(outgoing, Layout.of(shapes, shared))

    def _place(self, outgoing: Outgoing, layout: Layout) -> bool:
        """Add the arrays of a layout in shared memory; False when there is no room."""
        block = self.block(layout) if layout.shared else None
        if block is None:
            return False
        outgoing.blocks.append(block)
        outgoing.shared_bytes += layout.shared_bytes
        outgoing.arrays.update(self.arrays(block, layout))
        outgoing.places.update({name: block.place(at) for name, at in layout.shared.items()})
        return True

    def block(self, layout: Layout) -> Block | None:
        """A slot for tensors, held until it is lent; None when there is no room."""
        assert self._arena is not None
        return self._arena.reserve(layout.size)

    def arrays(self, block: Block, layout: Layout) -> dict[str, Array]:
        """The arrays in a slot."""
        assert self._arena is not None
        return layout.arrays(block, self._arena)

    def lend_block(self, block: Block, readers: Iterable[int]) -> None:
        """Lend a slot to peers; it is free when they have read it."""
        block.lend([self._rows[reader] for reader in readers])

    def complete(self, outgoing: Outgoing, tensors: Mapping[str, Array], shared: Collection[str]) -> None:
        """Add the tensors that are missing in ``outgoing``; if there is room, they are copied to shared memory."""
        if tensors is outgoing.arrays:
            return
        rest = {name: tensor for name, tensor in tensors.items() if outgoing.arrays.get(name) is not tensor}
        for name in rest:
            outgoing.places.pop(name, None)
        outgoing.layout = None
        self.place(outgoing, shapes_of(rest), shared)
        for name, tensor in rest.items():
            if name in outgoing.places:
                outgoing.arrays[name][...] = tensor
            else:
                outgoing.arrays[name] = tensor
        outgoing.count()

    def lend(self, outgoing: Outgoing, readers: Readers) -> None:
        """Lend the shared memory to these peers. It is free when they have read it, and no longer held here."""
        rows = [
            row
            for reader, names in readers.items()
            if (row := self._rows.get(reader)) is not None and not outgoing.places.keys().isdisjoint(names)
        ]
        for block in outgoing.blocks:
            block.lend(rows)

    def lend_too(self, outgoing: Outgoing, reader: int) -> None:
        """Lend the shared memory to one more peer; this process still holds it."""
        row = self._rows.get(reader)
        if row is not None:
            for block in outgoing.blocks:
                block.readers = (*block.readers, row)

    def send(
        self,
        link: Outlet,
        reader: int,
        outgoing: Outgoing,
        names: tuple[str, ...],
        attempt: Attempt,
        source: int,
        compress: Collection[str] = (),
    ) -> None:
        """Send some of the tensors to one peer, as a fragment.

        Args:
            link: the link to the peer.
            reader: the peer's number.
            outgoing: the tensors.
            names: the names of those to send.
            attempt: the attempt they belong to.
            source: the sending stage, or :data:`~onnxsplit.plan.CALLER`.
            compress: the names of those that are compressed.

        Raises:
            StageFailed: they are too large to be sent.
        """
        signature = 0 if compress else self.lanes.send(reader, outgoing, names, attempt, source)
        if signature < 0:
            return
        places = outgoing.places if reader in self._rows else {}
        sent = {n: outgoing.arrays[n] for n in names}
        heads, frames = codec.encode_tensors(sent, places, compress)
        fragment = Fragment(
            attempt.request,
            attempt.attempt,
            attempt.view,
            attempt.cost,
            attempt.budget_ns,
            self._me,
            source,
            attempt.route,
            attempt.wanted,
            heads,
            attempt.history,
            attempt.rows,
            attempt.drawn if reader == 0 else (),
            signature,
        )
        header = codec.encode(fragment)
        codec.check_sizes(sent, header, frames)
        trackers = link.send(header, frames, track=bool(frames and outgoing.blocks))
        for block in outgoing.blocks:
            block.sending = (*block.sending, *trackers)

    # Incoming

    def receive(self, fragment: Fragment, frames: Sequence[codec.Buffer]) -> dict[str, Array]:
        """The tensors of a fragment, as views of the message or of the sender's memory.

        Call :meth:`give_back` when they are no longer read; it is not needed when this raises.

        Raises:
            MemoryWithdrawn: the tensors lie in memory that is not mapped here.
            ProtocolError: the message is malformed.
        """
        in_memory = False

        def at(place: TensorPlace, dtype: str, shape: Sequence[int]) -> Array:
            nonlocal in_memory
            in_memory = True
            peer = self._peers.get(fragment.sender)
            if peer is None:
                raise MemoryWithdrawn(
                    f"tensors lie in the memory of process {fragment.sender}, which is not mapped here"
                )
            return peer.array(place, dtype, shape)

        try:
            tensors = codec.decode_tensors(fragment.tensors, frames, at)
        except BaseException:
            self.refuse(fragment)
            raise
        if in_memory:
            self._reading[fragment.sender] += 1
        return tensors

    def lift(self, taken: Taken) -> tuple[Fragment, dict[str, Array]]:
        """The fragment that an entry of a lane stands for, and its tensors, as :meth:`receive` returns them.

        Raises:
            ProtocolError: the entry is malformed.
        """
        fragment = taken.known.fragment(taken.entry, time.monotonic_ns())
        tensors = taken.known.tensors(taken.entry)
        self._reading[fragment.sender] += 1
        return fragment, tensors

    def return_slot(self, sender: int, entry: Entry) -> None:
        """Return the memory of an entry that was not lifted, and count its work as finished."""
        assert self._arena is not None
        self._board.finish(sender, entry.cost)
        self._arena.give_back(sender, entry.slot, entry.generation)

    def hold(self, fragments: Sequence[Fragment]) -> bool:
        """Whether what was read from these fragments is valid: no sender has taken its memory back meanwhile."""
        for fragment in fragments:
            for head in fragment.tensors:
                if isinstance(head.payload, TensorPlace):
                    peer = self._peers.get(fragment.sender)
                    if peer is None or not peer.holds(head.payload.slot, head.payload.generation):
                        return False
        return True

    def give_back(self, fragment: Fragment) -> None:
        """Return the memory of a received fragment to its sender, and count its work as finished. Call it once."""
        if self.refuse(fragment):
            self._reading[fragment.sender] -= 1
            if self._gone:
                self._unmap_if_unused(fragment.sender)

    def refuse(self, fragment: Fragment) -> bool:
        """Do the same for a fragment that was not received; True if some of its tensors lie in shared memory."""
        self._board.finish(fragment.sender, fragment.cost)
        slot = -1
        for head in fragment.tensors:
            place = head.payload
            if isinstance(place, TensorPlace) and place.slot != slot and self._arena is not None:
                slot = place.slot
                self._arena.give_back(fragment.sender, slot, place.generation)
        return slot >= 0
