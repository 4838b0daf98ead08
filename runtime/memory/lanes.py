"""The lanes of one process: those it reads, and those it writes. See :mod:`runtime.memory.lane`."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from msgspec import Struct

from runtime.errors import ProtocolError
from runtime.memory.arena import Arena, Block
from runtime.memory.lane import SUPPORTED, Entry, LaneReader, LaneWriter
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.memory.peer_arena import PeerArena
from runtime.memory.signatures import MOST_NS, Known, Signatures, bytes_of, is_sound
from runtime.wire.messages.data import Fragment


class Taken(Struct, frozen=True):
    """An entry that was taken from a lane, and its signature."""

    entry: Entry
    known: Known


class Incoming:
    """A lane that this process reads.

    Args:
        sender: the number of the process that writes it.
        arena: this process's arena.
        peer: the sender's arena.
        me: this process's number.
    """

    def __init__(self, sender: int, arena: Arena, peer: PeerArena, me: int) -> None:
        self.sender = sender
        self._reader = LaneReader(peer.ring(me), arena.row(sender), time.monotonic_ns())
        self._signatures = Signatures(sender, peer)

    @property
    def waiting(self) -> bool:
        """Whether there is an entry."""
        return self._reader.waiting

    @property
    def following_cost(self) -> int:
        """The cost of the next entry if another one waits behind it; else 0."""
        return self._reader.next_cost if self._reader.holds(2) else 0

    def take(self) -> Taken | None:
        """The next entry; None when there is none.

        Raises:
            ProtocolError: it is malformed. It is not returned again.
        """
        entry = self._reader.take()
        if entry is None:
            return None
        known = self._signatures.get(entry.signature)
        if known is None or not is_sound(entry):
            raise ProtocolError(f"process {self.sender} wrote an entry that no fragment can have: {entry}")
        return Taken(entry, known)

    def learn(self, fragment: Fragment) -> None:
        """Take in the signature of a fragment that came as a message, and tell the sender so."""
        if self._signatures.learn(fragment):
            self._reader.learn(fragment.signature)


class Lanes:
    """The lanes of one process.

    Its methods for sending, and those that open and close lanes, need the same lock where several threads use them.
    Those for receiving may be called meanwhile by one other thread.

    Args:
        arena: this process's arena; None for a process without shared memory, which has no lanes.

    Attributes:
        incoming: the lanes that are read. Replaced, never changed.
    """

    def __init__(self, arena: Arena | None) -> None:
        self.incoming: tuple[Incoming, ...] = ()
        self._arena = arena if SUPPORTED else None
        self._writers: dict[int, LaneWriter] = {}

    # Opening and closing

    def meet(self, me: int, sender: int, peer: PeerArena) -> None:
        """Begin a lane from a peer whose memory is mapped."""
        if self._arena is not None:
            self.incoming = (*self.incoming, Incoming(sender, self._arena, peer, me))

    def lend(self, me: int, reader: int, peer: PeerArena, ring_bell: Callable[[], None] | None) -> None:
        """Begin a lane to a peer that has mapped this process's memory, if there is a way to wake it."""
        if self._arena is not None and ring_bell is not None:
            self._writers[reader] = LaneWriter(self._arena.ring(reader), peer.row(me), peer.sleep, ring_bell)

    def forget(self, number: int) -> None:
        """Close the lanes of a peer that has ended. What it has written and nobody has read is dropped."""
        self.incoming = tuple(lane for lane in self.incoming if lane.sender != number)
        self._writers.pop(number, None)

    def close(self) -> None:
        """Close all lanes."""
        self.incoming = ()
        self._writers.clear()
        self._arena = None

    # Receiving

    @property
    def waiting(self) -> bool:
        """Whether any lane has an entry."""
        return any(lane.waiting for lane in self.incoming)

    def fall_asleep(self) -> bool:
        """Ask writers for a doorbell from now on; False, and the process is awake, if there is an entry already."""
        if not self.incoming:
            return True
        assert self._arena is not None
        self._arena.sleep.begin()
        if not self.waiting:
            return True
        self._arena.sleep.end()
        return False

    def wake_up(self) -> None:
        """Take the request for a doorbell back."""
        if self._arena is not None:
            self._arena.sleep.end()

    def learn(self, fragment: Fragment) -> None:
        """Take in the signature of a fragment that came as a message, if it has one."""
        for lane in self.incoming:
            if lane.sender == fragment.sender and fragment.signature:
                lane.learn(fragment)

    # Sending

    def writer(self, reader: int) -> LaneWriter | None:
        """The lane to a peer; None when there is none."""
        return self._writers.get(reader)

    def send(self, reader: int, outgoing: Outgoing, names: tuple[str, ...], attempt: Attempt, source: int) -> int:
        """Send tensors through the lane to a peer, if it is an ordinary fragment that the peer knows.

        Returns:
            -1 when they were sent; else they must be sent as a message, with this signature (0 for none).
        """
        lane, layout = self._writers.get(reader), outgoing.layout
        start = None if layout is None else layout.start(names)
        if lane is None or start is None or attempt.rows or attempt.drawn:
            return 0
        number = lane.signature((layout, names, source, attempt.route, attempt.wanted))
        if not lane.knows(number):
            return number
        try:
            visits = b"".join([bytes_of(visit) for visit in attempt.history])
        except struct.error:  # a stage of -1, which messages may hold
            return 0
        block = outgoing.blocks[0]
        deadline_ns = min(time.monotonic_ns() + attempt.budget_ns, MOST_NS) if attempt.budget_ns else 0
        sent = lane.write(entry_of(attempt, deadline_ns, number, block, start, visits))
        return -1 if sent else number


def entry_of(what: Attempt | Entry, deadline_ns: int, signature: int, block: Block, start: int, visits: bytes) -> Entry:
    """The entry for tensors in a block, for the same attempt as ``what``.

    Args:
        what: the attempt.
        deadline_ns: its deadline by the host's monotonic clock; 0 for none.
        signature: the signature of the fragment.
        block: the block.
        start: where the first tensor lies in it.
        visits: the stages that were passed.
    """
    return Entry(
        what.request,
        what.attempt,
        what.view,
        what.cost,
        deadline_ns,
        signature,
        block.number,
        block.generation,
        block.offset + start,
        visits,
    )
