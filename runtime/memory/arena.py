"""Shared memory for tensors on one host: written by its owner, read in place by the owner's peers.

Every process of a pipeline, the caller's included, owns one arena and maps the arenas of its neighbours for reading. A
process writes only into its own arena, so a process that was suspended and resumes late cannot damage another one.

    part          size                  content
    token         32 bytes, 1 page      random bytes, by which a peer checks that it has mapped the right memory
    board         whole pages           the owner's load; see runtime/balance/board.py
    ledger        4096 x u64            by request number modulo 4096: the request, its attempt, and the owner's step
    generations   1024 x u64            by slot: the number of its present use
    returns       peers x 1024 x u64    by peer and the peer's slot: the last use that the owner has finished reading
    data          the rest              tensors, each at a multiple of 64 bytes

The owner lends a slot to some readers for one use. A reader that has finished writes the slot's generation into the
returns of its own arena, and the slot is free when all its readers have done so. The owner looks there when it needs
room, so no message is needed. After a run, a reader compares the generation again: if it has changed, the owner had
taken the memory back, and the reader drops its result. The ledger can also be read after its owner has died.

The memory is a sealed memfd. It cannot shrink under a reader, leaves no file behind, and can be opened by a peer
through ``/proc/PID/fd`` even after its owner was killed.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import secrets
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from onnxsplit.tensors import Array, element_count, numpy_dtype
from runtime.balance.board import BOARD_BYTES, PEERS, LoadBoard
from runtime.errors import ProtocolError
from runtime.memory.extents import Extents, aligned
from runtime.memory.pinned import Pin
from runtime.wire.messages.control import Memory
from runtime.wire.messages.data import SLOTS, Step, TensorPlace

_LEDGER_ENTRIES = 4096
_TOKEN_BYTES = 32
_PAGE = mmap.PAGESIZE
_BOARD_AT = _PAGE
_LEDGER_AT = _BOARD_AT + -(-BOARD_BYTES // _PAGE) * _PAGE
_GENERATIONS_AT = _LEDGER_AT + 8 * _LEDGER_ENTRIES
_RETURNS_AT = _GENERATIONS_AT + 8 * SLOTS
_DATA_AT = _RETURNS_AT + 8 * SLOTS * PEERS
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_STEP_BYTES = 1 << 20  # memory is allocated in steps of this size
_SPARE_BYTES = 64 << 20  # allocated memory that is kept even when it is not used
_TRIM_INTERVAL = 1000  # uses of slots after which unused memory is returned to the system
_SCAN_LIMIT = 32  # number of lent slots up to which all are checked when room is needed
_ATTEMPTS = 1 << 8  # attempts at a request that the ledger distinguishes


class SendTracker(Protocol):
    """Tells when the memory of a frame that is being sent may change (a zmq.MessageTracker)."""

    @property
    def done(self) -> bool:
        """True once the memory may change."""
        ...


@dataclass
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
    readers: list[memoryview] = field(default_factory=list)
    sending: list[SendTracker] = field(default_factory=list)
    held: bool = True

    def lend(self, readers: Sequence[memoryview]) -> None:
        """Lend it to the peers with these rows of returns; the owner no longer holds it."""
        self.readers = list(readers)
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

    Raises:
        OSError: the memory cannot be made.
    """

    def __init__(self, limit_bytes: int) -> None:
        size = _DATA_AT + aligned(limit_bytes)
        self._descriptor = os.memfd_create("onnxsplit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, size)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self._descriptor, size)
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._map[:_TOKEN_BYTES] = token
        self.address = Memory(host_token(), os.getpid(), self._descriptor, token, size)
        view = memoryview(self._map)
        self.board = LoadBoard(view[_BOARD_AT : _BOARD_AT + BOARD_BYTES])
        self._ledger = view[_LEDGER_AT:_GENERATIONS_AT].cast("Q")
        self._generations = view[_GENERATIONS_AT:_RETURNS_AT].cast("Q")
        self._returns = view[_RETURNS_AT:_DATA_AT].cast("Q")
        self._extents = Extents(size - _DATA_AT)
        self._numbers = list(range(SLOTS - 1, -1, -1))
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
            pin(self._address + _DATA_AT, self._allocated, False)

    @property
    def _address(self) -> int:
        return np.frombuffer(self._map, np.uint8).ctypes.data

    def close(self) -> None:
        """Release the memory. Peers that have mapped it keep it until they unmap it."""
        for view in (self.board, self._ledger, self._generations, self._returns):
            view.release()
        with suppress(BufferError):  # arrays in it are still in use: the memory is released with the last one
            self._map.close()
        os.close(self._descriptor)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are in use."""
        self._sweep(thorough=True)
        return self._extents.used

    @property
    def busy(self) -> int:
        """Number of slots that are in use."""
        self._sweep(thorough=True)
        return len(self._busy)

    def reserve(self, size: int) -> Block | None:
        """A slot of ``size`` bytes, held by the owner until it is lent; None when there is no room."""
        self._sweep()
        offset = self._extents.take(size)
        if offset is None or not self._numbers:
            if offset is not None:
                self._extents.give(offset, size)
            if not self._sweep(thorough=True):
                return None
            return self.reserve(size)
        if not self._allocate(offset + aligned(size)):
            self._extents.give(offset, size)
            return None
        self._generation += 1
        block = Block(self._numbers.pop(), self._generation, _DATA_AT + offset, size)
        self._generations[block.number] = block.generation
        self._busy.append(block)
        return block

    def array(self, block: Block, at: int, dtype: str, shape: Sequence[int]) -> Array:
        """The writable array at byte ``at`` of a block, of an ONNX type and a shape."""
        return np.ndarray(tuple(shape), numpy_dtype(dtype), self._map, block.offset + at)

    def forget(self, row: memoryview) -> None:
        """Take back what was lent to the peer with this row of returns, because the peer has ended."""
        for block in self._busy:
            block.readers = [reader for reader in block.readers if reader is not row]

    def give_back(self, peer: int, place: TensorPlace) -> None:
        """Note in the returns that this process has finished reading a slot of a peer."""
        self._returns[peer * SLOTS + place.slot] = place.generation

    def record(self, request: int, attempt: int, step: Step) -> None:
        """Note in the ledger how far this process is with an attempt at a request."""
        self._ledger[request % _LEDGER_ENTRIES] = (request * _ATTEMPTS + attempt % _ATTEMPTS) << 2 | step

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
                self._extents.give(block.offset - _DATA_AT, block.size)
                self._numbers.append(block.number)
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
        self._uses += 1
        if self._uses >= _TRIM_INTERVAL:
            self._uses = 0
            self._trim()
        if reach <= self._allocated:
            return True
        wanted = min(self._extents.size, -(-reach // _STEP_BYTES) * _STEP_BYTES)
        try:
            os.posix_fallocate(self._descriptor, _DATA_AT + self._allocated, wanted - self._allocated)
        except OSError:
            return False
        if self._pin is not None:
            self._pin(self._address + _DATA_AT + self._allocated, wanted - self._allocated, False)
        self._allocated = wanted
        return True

    def _trim(self) -> None:
        """Return memory to the system that the last uses did not need."""
        keep = -(-(2 * self._peak + _SPARE_BYTES) // _PAGE) * _PAGE
        if (
            self._pin is None
            and self._allocated > keep
            and all(block.offset + block.size <= _DATA_AT + keep for block in self._busy)
        ):
            self._map.madvise(mmap.MADV_REMOVE, _DATA_AT + keep, self._allocated - keep)
            self._allocated = keep
        self._peak = 0


class PeerArena:
    """A peer's arena, mapped for reading.

    Args:
        memory: what the peer has announced.

    Attributes:
        board: the peer's load board.

    Raises:
        OSError: it cannot be opened, because the peer is on another host, belongs to another user or has ended.
        ProtocolError: it is not the memory that the peer has announced.
    """

    def __init__(self, memory: Memory) -> None:
        if memory.host != host_token():
            raise OSError("the peer is on another host")
        descriptor = os.open(f"/proc/{memory.pid}/fd/{memory.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size != memory.size_bytes or size < _DATA_AT or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != _SEALS:
                raise ProtocolError(f"process {memory.pid} does not hold the memory that it has announced")
            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        if not secrets.compare_digest(self._map[:_TOKEN_BYTES], memory.token):
            self._map.close()
            raise ProtocolError(f"process {memory.pid} does not hold the memory that it has announced")
        self._size = size
        self._pin: Pin | None = None
        self._pinned = _DATA_AT
        view = memoryview(self._map)
        self.board = LoadBoard(view[_BOARD_AT : _BOARD_AT + BOARD_BYTES])
        self._ledger = view[_LEDGER_AT:_GENERATIONS_AT].cast("Q")
        self._generations = view[_GENERATIONS_AT:_RETURNS_AT].cast("Q")
        self._returns = view[_RETURNS_AT:_DATA_AT].cast("Q")

    def close(self) -> None:
        """Unmap the memory."""
        for view in (self.board, self._ledger, self._generations, self._returns):
            with suppress(BufferError):
                view.release()
        with suppress(BufferError):
            self._map.close()

    def pin(self, pin: Pin) -> None:
        """Pin the memory that is read from now on."""
        self._pin = pin

    def array(self, place: TensorPlace, dtype: str, shape: Sequence[int]) -> Array:
        """The read-only array at a place in the peer's memory.

        Args:
            place: where it lies.
            dtype: its ONNX type.
            shape: its shape.

        Raises:
            ProtocolError: it would lie outside the memory.
        """
        kind = numpy_dtype(dtype)
        count = element_count(shape, kind.itemsize)
        if count is None:
            raise ProtocolError(f"a tensor of the shape {list(shape)} would lie outside any memory")
        size = count * kind.itemsize
        if not (0 <= place.slot < SLOTS and _DATA_AT <= place.offset <= self._size - size):
            raise ProtocolError(f"{size} bytes in slot {place.slot} at {place.offset} lie outside the peer's memory")
        if self._pin is not None and place.offset + size > self._pinned:
            reach = min(self._size, -(-(place.offset + size) // _STEP_BYTES) * _STEP_BYTES)
            address = np.frombuffer(self._map, np.uint8).ctypes.data
            self._pin(address + self._pinned, reach - self._pinned, True)
            self._pinned = reach
        return np.ndarray(tuple(shape), kind, self._map, place.offset)

    def holds(self, place: TensorPlace) -> bool:
        """Whether the slot is still lent for this use. If so, what was read from it before this call is valid."""
        return self._generations[place.slot] == place.generation

    def returns(self, owner: int) -> memoryview:
        """The row of the peer's returns for the slots of process number ``owner``."""
        return self._returns[owner * SLOTS : (owner + 1) * SLOTS]

    def step(self, request: int, attempt: int) -> Step:
        """How far the peer is with an attempt at a request, or was when it died."""
        entry = self._ledger[request % _LEDGER_ENTRIES]
        same = entry >> 2 == request * _ATTEMPTS + attempt % _ATTEMPTS
        return Step(entry & 3) if same and entry & 3 < len(Step) else Step.UNKNOWN


@functools.cache
def host_token() -> str:
    """Identifies the boot, the PID namespace and the user: equal in processes that can map each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"  # noqa: PTH115  no path
