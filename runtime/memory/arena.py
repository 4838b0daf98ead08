"""The shared memory that a process owns; :mod:`runtime.memory.regions` draws it."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxsplit.tensors import Array, numpy_dtype
from runtime.balance.board import BOARD_BYTES, LoadBoard
from runtime.memory.extents import Extents, aligned
from runtime.memory.lane import Sleep
from runtime.memory.pinned import Pin
from runtime.memory.regions import (
    ATTEMPTS,
    BOARD_AT,
    DATA_AT,
    GENERATIONS_AT,
    LEDGER_AT,
    LEDGER_ENTRIES,
    PAGE,
    RETURNS_AT,
    SEALS,
    SLEEP_AT,
    STEP_BYTES,
    TOKEN_BYTES,
    host_token,
    ring_of,
    row_of,
)
from runtime.wire.messages.control import Memory
from runtime.wire.messages.data import SLOTS, Step, TensorPlace

_SPARE_BYTES = 64 << 20  # allocated memory that is kept even when it is not used
_TRIM_INTERVAL = 1000  # uses of slots after which unused memory is returned to the system
_MOST_SPARES = 64  # slots that keep their memory between two uses
_SCAN_LIMIT = 32  # number of lent slots up to which all are checked when room is needed


class SendTracker(Protocol):
    """Tells when the memory of a frame that is being sent may change (a zmq.MessageTracker)."""

    @property
    def done(self) -> bool:
        """True once the memory may change."""
        ...


@dataclass(slots=True)
class Block:
    """One use of a slot: a piece of the owner's memory.

    Attributes:
        number: the slot.
        generation: number of this use.
        offset: of its first byte in the arena.
        size: bytes.
        readers: the rows of returns of the peers it is lent to.
        sending: the frames that are being sent from it.
        held: whether the owner still uses it.
    """

    number: int
    generation: int
    offset: int
    size: int
    readers: Sequence[memoryview] = ()
    sending: Sequence[SendTracker] = ()
    held: bool = True

    def lend(self, readers: Sequence[memoryview]) -> None:
        """Lend it to the peers with these rows of returns; the owner no longer holds it."""
        self.readers = readers
        self.held = False

    def place(self, at: int) -> TensorPlace:
        """The place of its byte ``at``, as it is sent to readers."""
        return TensorPlace(self.number, self.generation, self.offset + at)

    @property
    def free(self) -> bool:
        """Whether neither the owner nor a reader uses it."""
        if self.held:
            return False
        number, generation = self.number, self.generation
        for row in self.readers:
            if row[number] != generation:
                return False
        return not self.sending or all(sent.done for sent in self.sending)


class Arena:
    """This process's own arena.

    Args:
        limit_bytes: the largest size of all tensors in it at once. The system allocates memory only as it is used.

    Attributes:
        address: what peers need to map the arena.
        board: this process's load board.
        sleep: says whether this process waits for entries of lanes.

    Raises:
        OSError: the memory cannot be made.
    """

    def __init__(self, limit_bytes: int) -> None:
        size = DATA_AT + aligned(limit_bytes)
        self._descriptor = os.memfd_create("onnxsplit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, size)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self._descriptor, size)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._map[:TOKEN_BYTES] = token
        self.address = Memory(host_token(), os.getpid(), self._descriptor, token, size)
        view = memoryview(self._map)
        self.board = LoadBoard(view[BOARD_AT : BOARD_AT + BOARD_BYTES])
        self._ledger = view[LEDGER_AT:GENERATIONS_AT].cast("Q")
        self._generations = view[GENERATIONS_AT:RETURNS_AT].cast("Q")
        self._returns = view[RETURNS_AT:SLEEP_AT].cast("Q")
        self.sleep = Sleep(view[SLEEP_AT : SLEEP_AT + 8].cast("Q"))
        self._extents = Extents(size - DATA_AT)
        self._numbers = list(range(SLOTS - 1, -1, -1))
        self._spares: dict[int, list[tuple[int, int]]] = {}  # by size, free slots and where their memory is
        self._spare_count = self._spare_bytes = 0
        self._busy: deque[Block] = deque()
        # Larger than any that a process of the same number has used before, so that returns to it have no effect here.
        self._generation = time.monotonic_ns()
        self._allocated = 0
        self._peak = 0
        self._uses = 0
        self._pin: Pin | None = None

    def pin(self, pin: Pin) -> None:
        """Pin all memory that is used from now on. Pinned memory is never returned to the system."""
        self._pin = pin
        if self._allocated:
            pin(self._address + DATA_AT, self._allocated, False)

    @property
    def _address(self) -> int:
        return np.frombuffer(self._map, np.uint8).ctypes.data

    def close(self) -> None:
        """Release the memory. Peers that have mapped it keep it until they unmap it."""
        for view in (self.board, self._ledger, self._generations, self._returns, self.sleep):
            view.release()
        del self._map  # arrays in it may still be in use: the memory is released with the last one
        os.close(self._descriptor)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are in use."""
        self._sweep(thorough=True)
        return self._extents.used - self._spare_bytes

    @property
    def busy(self) -> int:
        """Number of slots that are in use."""
        self._sweep(thorough=True)
        return len(self._busy)

    def reserve(self, size: int) -> Block | None:
        """A slot of ``size`` bytes, held by the owner until it is lent; None when there is no room.

        Sizes recur, so a slot that was used for the same size before is used again, with the same memory. Readers then
        find the same tensors at the same addresses.
        """
        size = aligned(size)
        self._uses += 1
        if self._uses >= _TRIM_INTERVAL:
            self._uses = 0
            self._trim()
        if not (spares := self._spares.get(size)):
            self._sweep()
            spares = self._spares.get(size)
        if spares:
            number, offset = spares.pop()
            self._spare_count -= 1
            self._spare_bytes -= size
            self._peak = max(self._peak, offset - DATA_AT + size)
        else:
            found = self._take(size)
            if found is None:
                return None
            number, offset = found
        self._generation += 1
        block = Block(number, self._generation, offset, size)
        self._generations[number] = block.generation
        self._busy.append(block)
        return block

    def _take(self, size: int) -> tuple[int, int] | None:
        """A free slot, and the offset of new memory for it; None when there is no room."""
        offset = self._extents.take(size)
        if offset is None or not self._numbers:
            if offset is not None:
                self._extents.give(offset, size)
            freed = self._sweep(thorough=True)
            return self._take(size) if self._drop_spares() or freed else None
        if not self._allocate(offset + size):
            self._extents.give(offset, size)
            return None
        return self._numbers.pop(), DATA_AT + offset

    def mend(self, held: Collection[Block]) -> None:
        """Find out anew what is free, because an interrupt may have left a change half done.

        Args:
            held: the blocks that their owner still needs. Others that it seems to hold have been forgotten.
        """
        for block in self._busy:
            if block.held and not any(block is other for other in held):
                block.lend(())
        self._busy = deque(block for block in self._busy if not block.free)
        self._extents.keep_only((block.offset - DATA_AT, block.size) for block in self._busy)
        taken = {block.number for block in self._busy}
        self._numbers = [number for number in range(SLOTS - 1, -1, -1) if number not in taken]
        self._spares.clear()
        self._spare_count = self._spare_bytes = 0

    def _drop_spares(self) -> bool:
        """Let other sizes have the memory of all free slots; True if there were any."""
        found = self._spare_count > 0
        for size, spares in self._spares.items():
            for number, offset in spares:
                self._extents.give(offset - DATA_AT, size)
                self._numbers.append(number)
        self._spares.clear()
        self._spare_count = self._spare_bytes = 0
        return found

    def array(self, block: Block, at: int, dtype: str, shape: Sequence[int]) -> Array:
        """The writable array at byte ``at`` of a block, of an ONNX type and a shape."""
        return np.ndarray(tuple(shape), numpy_dtype(dtype), self._map, block.offset + at)

    def forget(self, row: memoryview) -> None:
        """Take back what was lent to the peer with this row of returns, because the peer has ended."""
        for block in self._busy:
            block.readers = [reader for reader in block.readers if reader is not row]

    def give_back(self, peer: int, slot: int, generation: int) -> None:
        """Note in the returns that this process has finished reading a use of a peer's slot."""
        self._returns[peer * SLOTS + slot] = generation

    def ring(self, reader: int) -> memoryview:
        """The ring of the lane to a peer."""
        return ring_of(self._map, reader)

    def row(self, writer: int) -> memoryview:
        """The row of the lane from a peer."""
        return row_of(self._map, writer)

    def record(self, request: int, attempt: int, step: Step) -> None:
        """Note in the ledger how far this process is with an attempt at a request."""
        self._ledger[request % LEDGER_ENTRIES] = (request * ATTEMPTS + attempt % ATTEMPTS) << 2 | step

    def _sweep(self, *, thorough: bool = False) -> bool:
        """Free the slots that all readers have returned; True if there were any.

        When more than ``_SCAN_LIMIT`` are lent, only the oldest ones are checked unless ``thorough``.
        """
        freed = False
        thorough = thorough or len(self._busy) <= _SCAN_LIMIT
        for _ in range(len(self._busy)):
            block = self._busy[0]
            if block.free:
                self._busy.popleft()
                if self._spare_count >= _MOST_SPARES:
                    self._drop_spares()
                self._spares.setdefault(block.size, []).append((block.number, block.offset))
                self._spare_count += 1
                self._spare_bytes += block.size
                freed = True
            elif thorough:
                self._busy.rotate(-1)
            else:
                break
        return freed

    def _allocate(self, reach: int) -> bool:
        """Allocate the first ``reach`` bytes of data; False when the system has no memory left.

        Without it, a write to a page that the system cannot provide kills the process with SIGBUS.
        """
        self._peak = max(self._peak, reach)
        if reach <= self._allocated:
            return True
        wanted = min(self._extents.size, -(-reach // STEP_BYTES) * STEP_BYTES)
        try:
            os.posix_fallocate(self._descriptor, DATA_AT + self._allocated, wanted - self._allocated)
        except OSError:
            return False
        if self._pin is not None:
            self._pin(self._address + DATA_AT + self._allocated, wanted - self._allocated, False)
        self._allocated = wanted
        return True

    def _trim(self) -> None:
        """Return memory to the system that the last uses did not need."""
        keep = -(-(2 * self._peak + _SPARE_BYTES) // PAGE) * PAGE
        self._peak = 0
        if self._pin is not None or self._allocated <= _SPARE_BYTES:
            return
        self._sweep(thorough=True)
        self._drop_spares()  # otherwise tensors of another size would never take their memory
        if self._allocated > keep and all(block.offset + block.size <= DATA_AT + keep for block in self._busy):
            self._map.madvise(mmap.MADV_REMOVE, DATA_AT + keep, self._allocated - keep)
            self._allocated = keep
