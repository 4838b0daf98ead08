"""How tensors get from one process of a pipeline to another: in place where they share memory, else as frames."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from onnxsplit.tensors import Array, numpy_dtype, size_bytes
from runtime.balance.board import LoadBoard
from runtime.errors import MemoryWithdrawn, ProtocolError
from runtime.memory.arena import Arena, PeerArena
from runtime.memory.extents import aligned
from runtime.memory.outgoing import Attempt, Layout, Outgoing, OutputShapes, Readers, shapes_of
from runtime.memory.pinned import Pin
from runtime.wire import codec
from runtime.wire.links import Outlet
from runtime.wire.messages.control import Memory, Peer
from runtime.wire.messages.data import Fragment, Step, TensorPlace

_LAYOUTS = 256  # that are remembered
_log = logging.getLogger("runtime.payloads")


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
        self._pin: Pin | None = None
        self._peers: dict[int, PeerArena] = {}
        self._gone: set[int] = set()  # peers of whose memory something may still be read
        self._reading: Counter[int] = Counter()  # fragments by the peer in whose memory they lie
        self._layouts: dict[tuple[int, tuple[str, ...]], Layout] = {}
        self._rows: dict[int, memoryview] = {}  # returns of the peers that may read this process's memory
        self._board = self._arena.board if self._arena is not None else LoadBoard()

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

    @property
    def board(self) -> LoadBoard:
        """This process's own."""
        return self._board

    def boards(self) -> dict[int, LoadBoard]:
        """Those of the peers whose memory is mapped, by number."""
        return {number: peer.board for number, peer in self._peers.items() if number not in self._gone}

    def meet(self, me: int, peers: Mapping[int, Peer]) -> tuple[int, ...]:
        """Learn the own number and all peers there are now, by theirs; returns those whose memory is mapped.

        A peer that is there no more reads nothing of this process's memory any more; its own stays as long as
        fragments in it are held.
        """
        self._me = me
        for number in [known for known in (*self._peers, *self._rows) if known not in peers]:
            self._part(number)
        for number, peer in peers.items():
            if peer.memory is None or self._arena is None or number in self._peers:
                continue
            try:
                arena = self._peers[number] = PeerArena(peer.memory)
                if self._pin is not None:
                    arena.pin(self._pin)
            except (OSError, ProtocolError) as error:
                _log.info("stage %d.%d shares no memory with this process: %s", peer.stage, peer.replica, error)
        return tuple(number for number in self._peers if number not in self._gone)

    def _part(self, number: int) -> None:
        row = self._rows.pop(number, None)
        if row is not None and self._arena is not None:
            self._arena.forget(row)
            row.release()
        if number in self._peers:
            self._gone.add(number)
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        if number in self._gone and not self._reading[number]:
            self._gone.remove(number)
            del self._reading[number]
            self._peers.pop(number).close()

    def share(self, readers: Iterable[int]) -> None:
        """From now on, lend memory to these peers, which are those of before and more."""
        for reader in readers:
            if reader in self._peers and reader not in self._gone and reader not in self._rows:
                self._rows[reader] = self._peers[reader].returns(self._me)
        self._layouts.clear()

    def lends_to(self, reader: int) -> bool:
        """True when a peer reads this process's memory in place."""
        return reader in self._rows

    def pin(self, pin: Pin) -> None:
        """Pin own and mapped memory for a device, as it is used."""
        self._pin = pin
        if self._arena is not None:
            self._arena.pin(pin)
        for peer in self._peers.values():
            peer.pin(pin)

    def step(self, peer: int, request: int, attempt: int) -> Step:
        """How far a peer is, or was when it died, with an attempt at a request, as far as its memory tells."""
        return self._peers[peer].step(request, attempt) if peer in self._peers else Step.UNKNOWN

    def record(self, request: int, attempt: int, step: Step) -> None:
        """Let peers see how far this process is with an attempt at a request."""
        if self._arena is not None:
            self._arena.record(request, attempt, step)

    # Outgoing

    def reserve(self, shapes: OutputShapes, leaving: tuple[str, ...]) -> Outgoing:
        """Arrays for tensors: those ``leaving`` for peers, where large, in shared memory, as far as it goes.

        Small ones lie where those of the last call lay, since they are copied as they are sent. ``shapes`` must not
        change any more.
        """
        going = Outgoing()
        layout = self._layout(shapes, leaving)
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

    def place(self, going: Outgoing, shapes: OutputShapes, leaving: Collection[str]) -> None:
        """Add arrays in shared memory, for those tensors where it is worth it and there is room."""
        if self._rows:
            self._place(going, self._make_layout(shapes, leaving))

    def _place(self, going: Outgoing, layout: Layout) -> None:
        if not layout.large:
            return
        assert self._arena is not None
        block = self._arena.reserve(layout.size)
        if block is None:
            return
        going.blocks.append(block)
        going.shared_bytes += layout.shared_bytes
        for name, at in layout.large.items():
            going.arrays[name] = self._arena.array(block, at, *layout.shapes[name])
            going.places[name] = block.place(at)

    def _layout(self, shapes: OutputShapes, leaving: tuple[str, ...]) -> Layout:
        key = (id(shapes), leaving)  # the layout holds the shapes, so the number stays theirs
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = self._make_layout(shapes, leaving)
        return layout

    def _make_layout(self, shapes: OutputShapes, leaving: Collection[str]) -> Layout:
        sizes = {name: size_bytes(*spec) for name, spec in shapes.items() if spec[0] != "string"}
        large, at = {}, 0
        for name, size in sizes.items():
            if self._rows and size > codec.INLINE_BYTES and name in leaving:
                large[name] = at
                at += aligned(size)
        return Layout(
            shapes=shapes,
            large=large,
            size=at,
            size_bytes=sum(sizes.values()),
            shared_bytes=sum(sizes[name] for name in large),
        )

    def complete(self, going: Outgoing, tensors: Mapping[str, Array], leaving: Collection[str]) -> None:
        """See that ``going`` holds all of ``tensors``: what is not there yet is copied to where readers find it."""
        if tensors is going.arrays:
            return
        rest = {name: tensor for name, tensor in tensors.items() if going.arrays.get(name) is not tensor}
        for name in rest:
            going.places.pop(name, None)
        self.place(going, shapes_of(rest), leaving)
        for name, tensor in rest.items():
            if name in going.places:
                going.arrays[name][...] = tensor
            else:
                going.arrays[name] = tensor
        going.count()

    def lend(self, going: Outgoing, readers: Readers) -> None:
        """The tensors are for these peers alone: what lies in shared memory is free again when they have read it."""
        rows = [
            row
            for reader, names in readers.items()
            if (row := self._rows.get(reader)) is not None and not going.places.keys().isdisjoint(names)
        ]
        for block in going.blocks:
            block.lend(rows)

    def lend_too(self, going: Outgoing, reader: int) -> None:
        """One more peer reads them; this process still holds them."""
        row = self._rows.get(reader)
        if row is not None:
            for block in going.blocks:
                block.readers.append(row)

    def release(self, going: Outgoing) -> None:
        """This process holds the tensors no more; those they were lent to may."""
        for block in going.blocks:
            block.held = False

    def drop(self, going: Outgoing) -> None:
        """Take the tensors back: they go nowhere."""
        for block in going.blocks:
            block.lend(())

    def send(
        self, link: Outlet, reader: int, going: Outgoing, names: Iterable[str], attempt: Attempt, source: int
    ) -> None:
        """Send some of the tensors to one of the peers they are for.

        Raises:
            StageFailed: they are too large to be sent.
        """
        places = going.places if reader in self._rows else {}
        sent = {n: going.arrays[n] for n in names}
        heads, frames = codec.encode_tensors(sent, places)
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
        )
        header = codec.encode(fragment)
        codec.check_sizes(sent, header, frames)
        trackers = link.send(header, frames, track=bool(frames and going.blocks))
        for block in going.blocks:
            block.sending += trackers

    # Incoming

    def receive(self, fragment: Fragment, frames: Sequence[codec.Buffer]) -> dict[str, Array]:
        """The tensors of a fragment, where they are. Give them back with :meth:`give_back`.

        When this raises, the sender has been given its memory back.

        Raises:
            MemoryWithdrawn: the tensors lie in memory that is not mapped here.
            ProtocolError: the message does not hold together.
        """
        lies = False

        def at(place: TensorPlace, dtype: str, shape: Sequence[int]) -> Array:
            nonlocal lies
            lies = True
            peer = self._peers.get(fragment.sender)
            if peer is None:
                raise MemoryWithdrawn(f"tensors in the memory of process {fragment.sender}, which is not mapped here")
            return peer.array(place, dtype, shape)

        try:
            tensors = codec.decode_tensors(fragment.tensors, frames, at)
        except BaseException:
            self.refuse(fragment)
            raise
        if lies:
            self._reading[fragment.sender] += 1
        return tensors

    def hold(self, fragments: Sequence[Fragment]) -> bool:
        """False when a sender has taken its memory back meanwhile, and what was read there means nothing."""
        for fragment in fragments:
            for head in fragment.tensors:
                if isinstance(head.payload, TensorPlace):
                    peer = self._peers.get(fragment.sender)
                    if peer is None or not peer.holds(head.payload):
                        return False
        return True

    def give_back(self, fragment: Fragment) -> None:
        """Let the sender have its memory again, and know that its work is done with. Once for each fragment."""
        if self.refuse(fragment):
            self._reading[fragment.sender] -= 1
            if self._gone:
                self._let_go(fragment.sender)

    def refuse(self, fragment: Fragment) -> bool:
        """The same for a fragment that was not received; True where some of its tensors lie in shared memory."""
        self._board.finish(fragment.sender, fragment.cost)
        slot = -1
        for head in fragment.tensors:
            place = head.payload
            if isinstance(place, TensorPlace) and place.slot != slot and self._arena is not None:
                slot = place.slot
                self._arena.give_back(fragment.sender, place)
        return slot >= 0
