"""Lanes: rings in shared memory, by which a process passes ordinary fragments to a peer on its host. Pure.

A fragment is sent as a message when its like has not been sent before; the message then carries a number, the
*signature* (:mod:`runtime.memory.signatures`). From then on, a fixed-size entry in a ring says the same.

    the writer's arena: one ring for each reader        the reader's arena: one row for each writer
    +---------+---------+---------+- ... -+---------+   +----------+-------------------------------+
    | turn 64 | turn 65 | turn 34 |       | turn 63 |   | position | the signatures that it knows  |
    +---------+---------+---------+- ... -+---------+   +----------+-------------------------------+
        new       new       read              read           63

    word of an entry
     0   turn         number of the entry; it lies at this number modulo ENTRIES, and is written last
     1   request   )
     2   attempt   )
     3   view      )  as in a Fragment
     4   cost      )
     5   deadline     when the request's time is over, by the host's monotonic clock in ns; 0 for no deadline
     6   signature    what the fragments of this signature share
     7   slot      )
     8   generation)  the use of the writer's slot in which the tensors lie
     9   offset       of the slot's first byte, from the start of the writer's arena
    10   visits       number of stages passed
    11   (free)
    16   each visit   8 words, as in a Visit

Each cell has one writer. A process that was suspended and resumes late can therefore damage nobody, and a process that
was killed leaves an entry either whole or unseen. A reader begins a lane by writing a position that no earlier lane has
had, the time, so entries for the process that had its number before are never taken for new ones.

A reader that finds nothing sleeps: it says so in its own arena, looks once more, and waits for a doorbell, an empty
datagram. A writer looks there after each entry, and rings once for each sleep.

Memory order. The argument holds for x86-64, the only machine on which lanes are opened; others send messages. Words are
aligned, and each is read and written by one instruction. The machine lets other cores see stores in the order of the
program, and performs loads in that order. So whoever sees a turn sees its entry; whoever sees a position, or a
signature, may rely on what its writer did before. Only a load may overtake an earlier store to another word. Such an
overtaking could lose a doorbell: the writer looks for a sleeper before its turn is seen, and the reader looks for a
turn before its sleep is seen. Both therefore call :func:`fence` between the store and the load. It takes and releases a
lock, which is one locked instruction, and that is a full barrier.
"""

from __future__ import annotations

import platform
import struct
import threading
from collections.abc import Callable, Hashable

from msgspec import Struct

ENTRIES = 32
"""Entries of a ring. Where more fragments wait, further ones are sent as messages."""

MOST_VISITS = 14
"""The most visits that an entry can hold. Fragments that have passed more stages are sent as messages."""

SIGNATURES = 56
"""Signatures of a lane at once."""

_ENTRIES_A_BELL = 4  # entries that may wait until the reader is woken, while more follow

VISIT_BYTES = 64
HEAD_BYTES = 128
ENTRY_BYTES = HEAD_BYTES + MOST_VISITS * VISIT_BYTES
RING_BYTES = ENTRIES * ENTRY_BYTES
ROW_WORDS = 8 + SIGNATURES
"""Words of a row: the position, alone in its cache line, and the signatures."""

_POSITION, _SIGNATURES_AT = 0, 8
_HEAD = struct.Struct("=10Q")
_ENTRY_WORDS = ENTRY_BYTES // 8
_COST = 4  # the word of an entry that holds its cost
_lock = threading.Lock()

SUPPORTED = platform.machine() in ("x86_64", "AMD64")
"""Whether this machine keeps the memory order that lanes need."""


def fence() -> None:
    """Make the stores before it visible to other processes before any load after it is performed."""
    with _lock:
        pass


class Entry(Struct, frozen=True):
    """One entry; the fields are those of the drawing above. ``visits`` are the bytes of all visits."""

    request: int
    attempt: int
    view: int
    cost: int
    deadline_ns: int
    signature: int
    slot: int
    generation: int
    offset: int
    visits: bytes


class Sleep:
    """The cell by which a reader says that it sleeps: odd while it does.

    Args:
        cell: one word of the reader's arena; a peer can only read it.
    """

    __slots__ = ("_cell",)

    def __init__(self, cell: memoryview) -> None:
        self._cell = cell

    def begin(self) -> None:
        """The reader will wait. It must look at its lanes once more before it does."""
        if not self._cell[0] & 1:
            self._cell[0] += 1
        fence()

    def end(self) -> None:
        """The reader is awake, and will look at its lanes."""
        if self._cell[0] & 1:
            self._cell[0] += 1

    @property
    def count(self) -> int:
        """The number of times that the reader has fallen asleep or woken up."""
        return int(self._cell[0])

    def release(self) -> None:
        """Release the memory."""
        self._cell.release()


class LaneWriter:
    """The end of a lane at which entries are written.

    Args:
        ring: the ring in this process's arena, of :data:`RING_BYTES`.
        row: the reader's row for this process.
        sleep: the reader's cell.
        ring_bell: wakes the reader.
    """

    __slots__ = ("_bytes", "_keys", "_last", "_numbers", "_ring_bell", "_row", "_rung", "_sleep", "_turn", "_words")

    def __init__(self, ring: memoryview, row: memoryview, sleep: Sleep, ring_bell: Callable[[], None]) -> None:
        self._bytes = ring
        self._words = ring.cast("Q")
        self._row = row
        self._sleep = sleep
        self._ring_bell = ring_bell
        self._turn = row[_POSITION]
        self._rung = 0
        self._last = 0  # the last signature
        self._numbers: dict[Hashable, int] = {}
        self._keys: list[Hashable] = [None] * SIGNATURES  # by signature, modulo their number

    def write(self, entry: Entry, *, more: bool = False) -> bool:
        """Write an entry and wake the reader if it sleeps; False when there is no room.

        The reader must know the entry's signature; see :meth:`knows`. With ``more``, another entry follows soon, so the
        reader may sleep until a few entries wait. The caller then calls :meth:`ring` if none follows.
        """
        turn = self._turn + 1
        visits = entry.visits
        if not 0 < turn - self._row[_POSITION] <= ENTRIES or len(visits) > MOST_VISITS * VISIT_BYTES:
            return False
        at = turn % ENTRIES * ENTRY_BYTES
        _HEAD.pack_into(
            self._bytes,
            at + 8,
            entry.request,
            entry.attempt,
            entry.view,
            entry.cost,
            entry.deadline_ns,
            entry.signature,
            entry.slot,
            entry.generation,
            entry.offset,
            len(visits) // VISIT_BYTES,
        )
        if visits:
            self._bytes[at + HEAD_BYTES : at + HEAD_BYTES + len(visits)] = visits
        self._words[at >> 3] = self._turn = turn  # no signal handler can run between these two
        fence()
        if not more or self.unread >= _ENTRIES_A_BELL:
            self.ring()
        return True

    @property
    def unread(self) -> int:
        """The number of entries that the reader has not taken."""
        return self._turn - self._row[_POSITION]

    def ring(self) -> None:
        """Wake the reader if it sleeps and has not been woken yet."""
        count = self._sleep.count
        if count & 1 and count != self._rung:
            self._rung = count
            self._ring_bell()

    def signature(self, key: Hashable) -> int:
        """The signature of fragments that share what ``key`` stands for; 0 when there is none for them now.

        An old signature is replaced only when the reader has taken all entries, so it is not needed any more.
        """
        number = self._numbers.get(key, 0)
        if number:
            return number
        place = (self._last + 1) % SIGNATURES
        if (old := self._keys[place]) is not None:
            if self._row[_POSITION] != self._turn:
                return 0
            self._numbers.pop(old, None)
        self._last += 1
        self._keys[place] = key
        self._numbers[key] = self._last
        return self._last

    def knows(self, signature: int) -> bool:
        """Whether the reader knows a signature, and it has not been replaced since."""
        known = self._row[_SIGNATURES_AT + signature % SIGNATURES]
        return bool(known == signature > max(0, self._last - SIGNATURES))


class LaneReader:
    """The end of a lane at which entries are read. To make one begins a lane.

    Args:
        ring: the ring in the writer's arena.
        row: the writer's row in this process's arena.
        start: the first position. No earlier lane of the same two numbers may have reached it.
    """

    __slots__ = ("_bytes", "_position", "_row", "_words")

    def __init__(self, ring: memoryview, row: memoryview, start: int) -> None:
        self._bytes = ring
        self._words = ring.cast("Q")
        self._row = row
        row[_SIGNATURES_AT:] = memoryview(bytes(8 * SIGNATURES)).cast("Q")
        self._position = row[_POSITION] = start

    @property
    def waiting(self) -> bool:
        """Whether there is an entry."""
        return self.holds(1)

    def holds(self, count: int) -> bool:
        """Whether there are at least so many entries, up to the size of the ring."""
        turn = self._position + count
        return bool(self._words[turn % ENTRIES * _ENTRY_WORDS] == turn)

    @property
    def next_cost(self) -> int:
        """The cost of the next entry; 0 when there is none."""
        at = (self._position + 1) % ENTRIES * _ENTRY_WORDS
        return int(self._words[at + _COST]) if self._words[at] == self._position + 1 else 0

    def take(self) -> Entry | None:
        """The next entry; None when there is none.

        The caller must check the entry's numbers: a faulty writer may write any.
        """
        turn = self._position + 1
        at = turn % ENTRIES * ENTRY_BYTES
        if self._words[at >> 3] != turn:
            return None
        *head, visits = _HEAD.unpack_from(self._bytes, at + 8)
        end = at + HEAD_BYTES + min(visits, MOST_VISITS) * VISIT_BYTES
        entry = Entry(*head, bytes(self._bytes[at + HEAD_BYTES : end]))  # type: ignore[call-arg]  # ten words
        self._row[_POSITION] = self._position = turn
        return entry

    def learn(self, signature: int) -> None:
        """Tell the writer that this process knows a signature."""
        self._row[_SIGNATURES_AT + signature % SIGNATURES] = signature
