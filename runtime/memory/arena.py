"""Shared memory for payloads on one host: written by one process, read in place by its peers.

Every process of a pipeline, the caller's too, owns one arena and maps those of its neighbours for reading. Nobody
ever writes into memory that is not its own, so a process that was stopped and wakes late can hurt nobody:

    sign          token, 32 bytes         who maps the arena compares it with what the owner told
    board         see runtime/balance/board.py    how busy the owner is
    ledger        u64 a request           how far the owner is with which attempt at it; can be read when it is dead
    generations   u64 a slot              which use of the slot holds; a reader looks again after it has read
    returns       u64 a slot, a row a peer   the use of that peer's slot which the owner no longer reads
    data

A slot is lent to its readers for one use. It is free when the returns of all of them show its generation; the owner
looks there when it needs room, so giving back costs no message. The file is a sealed memfd: it can neither shrink
under a reader nor leave anything behind, and a peer opens it through ``/proc/PID/fd`` also after its owner was killed.
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

_LEDGER = 4096
_TOKEN_BYTES = 32
_PAGE = mmap.PAGESIZE
_BOARD_AT = _PAGE
_LEDGER_AT = _BOARD_AT + -(-BOARD_BYTES // _PAGE) * _PAGE
_GENERATIONS_AT = _LEDGER_AT + 8 * _LEDGER
_RETURNS_AT = _GENERATIONS_AT + 8 * SLOTS
_DATA_AT = _RETURNS_AT + 8 * SLOTS * PEERS
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_STEP_BYTES = 1 << 20  # memory is taken from the system in such steps
_SPARE_BYTES = 64 << 20
_LOOK_EVERY = 1000  # uses of slots after which memory that was not needed goes back to the system


_FEW = 32
_ATTEMPTS = 1 << 8  # of a request, that a ledger tells apart


class Sent(Protocol):
    """Something on its way out of a slot's memory."""

    @property
    def done(self) -> bool:
        """True once the memory may change."""
        ...


@dataclass
class Block:
    """One use of a slot: a piece of the owner's memory, and who reads it: the owner itself, while it is ``held``."""

    number: int
    generation: int
    offset: int
    size: int
    readers: list[memoryview] = field(default_factory=list)
    sending: list[Sent] = field(default_factory=list)
    held: bool = True

    def lend(self, readers: Sequence[memoryview]) -> None:
        """From now on the readers with these rows of returns hold it, and the owner does not."""
        self.readers = list(readers)
        self.held = False

    def place(self, at: int) -> TensorPlace:
        """Where the byte ``at`` of the block is, as readers are told."""
        return TensorPlace(self.number, self.generation, self.offset + at)

    @property
    def free(self) -> bool:
        """True when nobody reads it any more."""
        if self.held:
            return False
        number, generation = self.number, self.generation
        for row in self.readers:
            if row[number] != generation:
                return False
        return not self.sending or all(sent.done for sent in self.sending)


class Arena:
    """This process's own memory.

    Args:
        limit_bytes: of payloads at once. Only what was used is taken from the system.
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
        # Later than any that a process in this one's place has used before, so that its returns mean nothing here.
        self._generation = time.monotonic_ns()
        self._taken = 0
        self._peak = 0
        self._uses = 0
        self._pin: Pin | None = None

    def pin(self, pin: Pin) -> None:
        """Pin all memory that is used from now on; it is kept then."""
        self._pin = pin
        if self._taken:
            pin(self._address + _DATA_AT, self._taken, False)

    @property
    def _address(self) -> int:
        return np.frombuffer(self._map, np.uint8).ctypes.data

    def close(self) -> None:
        """Let go of the memory; peers that map it keep it until they let go too."""
        for view in (self.board, self._ledger, self._generations, self._returns):
            view.release()
        with suppress(BufferError):  # arrays that lie in it are still held: it goes with them
            self._map.close()
        os.close(self._descriptor)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are lent."""
        self._sweep(thorough=True)
        return self._extents.used

    @property
    def busy(self) -> int:
        """Slots that are lent."""
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
        if not self._back(offset + aligned(size)):
            self._extents.give(offset, size)
            return None
        self._generation += 1
        block = Block(self._numbers.pop(), self._generation, _DATA_AT + offset, size)
        self._generations[block.number] = block.generation
        self._busy.append(block)
        return block

    def array(self, block: Block, at: int, dtype: str, shape: Sequence[int]) -> Array:
        """The owner's array in a block, from its byte ``at``."""
        return np.ndarray(tuple(shape), numpy_dtype(dtype), self._map, block.offset + at)

    def forget(self, row: memoryview) -> None:
        """The peer with these returns is gone: it reads nothing any more."""
        for block in self._busy:
            block.readers = [reader for reader in block.readers if reader is not row]

    def give_back(self, peer: int, place: TensorPlace) -> None:
        """Say that this process no longer reads a slot of a peer."""
        self._returns[peer * SLOTS + place.slot] = place.generation

    def record(self, request: int, attempt: int, step: Step) -> None:
        """Note in the ledger how far this process is with an attempt at a request."""
        self._ledger[request % _LEDGER] = (request * _ATTEMPTS + attempt % _ATTEMPTS) << 2 | step

    def _sweep(self, *, thorough: bool = False) -> bool:
        """Free the slots that came back: of few all, of many only the oldest unless ``thorough``. True for any."""
        found = False
        thorough = thorough or len(self._busy) <= _FEW
        for _ in range(len(self._busy)):
            block = self._busy[0]
            if block.free:
                self._busy.popleft()
                self._extents.give(block.offset - _DATA_AT, block.size)
                self._numbers.append(block.number)
                found = True
            elif thorough:
                self._busy.rotate(-1)
            else:
                break
        return found

    def _back(self, reach: int) -> bool:
        """See that the system has the first ``reach`` bytes of data: a write to what it lacks kills the process."""
        self._peak = max(self._peak, reach)
        self._uses += 1
        if self._uses >= _LOOK_EVERY:
            self._uses = 0
            self._trim()
        if reach <= self._taken:
            return True
        wanted = min(self._extents.size, -(-reach // _STEP_BYTES) * _STEP_BYTES)
        try:
            os.posix_fallocate(self._descriptor, _DATA_AT + self._taken, wanted - self._taken)
        except OSError:
            return False
        if self._pin is not None:
            self._pin(self._address + _DATA_AT + self._taken, wanted - self._taken, False)
        self._taken = wanted
        return True

    def _trim(self) -> None:
        """Give memory back that the last uses did not need."""
        keep = -(-(2 * self._peak + _SPARE_BYTES) // _PAGE) * _PAGE
        if (
            self._pin is None
            and self._taken > keep
            and all(block.offset + block.size <= _DATA_AT + keep for block in self._busy)
        ):
            self._map.madvise(mmap.MADV_REMOVE, _DATA_AT + keep, self._taken - keep)
            self._taken = keep
        self._peak = 0


class PeerArena:
    """A peer's memory, mapped for reading.

    Raises:
        OSError: it cannot be opened: the peer is on another host or another user's, or long gone.
        ProtocolError: what was found there is not the memory the peer told of.
    """

    def __init__(self, memory: Memory) -> None:
        if memory.host != host_token():
            raise OSError("the peer is on another host")
        descriptor = os.open(f"/proc/{memory.pid}/fd/{memory.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size != memory.size_bytes or size < _DATA_AT or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != _SEALS:
                raise ProtocolError(f"process {memory.pid} does not hold the memory it told of")
            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        if not secrets.compare_digest(self._map[:_TOKEN_BYTES], memory.token):
            self._map.close()
            raise ProtocolError(f"process {memory.pid} does not hold the memory it told of")
        self._size = size
        self._pin: Pin | None = None
        self._pinned = _DATA_AT
        view = memoryview(self._map)
        self.board = LoadBoard(view[_BOARD_AT : _BOARD_AT + BOARD_BYTES])
        self._ledger = view[_LEDGER_AT:_GENERATIONS_AT].cast("Q")
        self._generations = view[_GENERATIONS_AT:_RETURNS_AT].cast("Q")
        self._returns = view[_RETURNS_AT:_DATA_AT].cast("Q")

    def close(self) -> None:
        """Unmap it."""
        for view in (self.board, self._ledger, self._generations, self._returns):
            with suppress(BufferError):
                view.release()
        with suppress(BufferError):
            self._map.close()

    def pin(self, pin: Pin) -> None:
        """Pin what is read from now on."""
        self._pin = pin

    def array(self, place: TensorPlace, dtype: str, shape: Sequence[int]) -> Array:
        """A tensor in the peer's memory, read-only.

        Raises:
            ProtocolError: the place is outside of the memory.
        """
        kind = numpy_dtype(dtype)
        count = element_count(shape, kind.itemsize)
        if count is None:
            raise ProtocolError(f"a tensor of the shape {list(shape)} would be outside of any memory")
        size = count * kind.itemsize
        if not (0 <= place.slot < SLOTS and _DATA_AT <= place.offset <= self._size - size):
            raise ProtocolError(f"{size} bytes in slot {place.slot} at {place.offset} are outside of the peer's memory")
        if self._pin is not None and place.offset + size > self._pinned:
            reach = min(self._size, -(-(place.offset + size) // _STEP_BYTES) * _STEP_BYTES)
            address = np.frombuffer(self._map, np.uint8).ctypes.data
            self._pin(address + self._pinned, reach - self._pinned, True)
            self._pinned = reach
        return np.ndarray(tuple(shape), kind, self._map, place.offset)

    def holds(self, place: TensorPlace) -> bool:
        """True while the slot is still lent for this use; what was read before that is what was written."""
        return self._generations[place.slot] == place.generation

    def returns(self, owner: int) -> memoryview:
        """The row in which the peer returns the slots of the process with the number ``owner``."""
        return self._returns[owner * SLOTS : (owner + 1) * SLOTS]

    def step(self, request: int, attempt: int) -> Step:
        """How far the peer is, or was when it died, with an attempt at a request."""
        entry = self._ledger[request % _LEDGER]
        same = entry >> 2 == request * _ATTEMPTS + attempt % _ATTEMPTS
        return Step(entry & 3) if same and entry & 3 < len(Step) else Step.UNKNOWN


@functools.cache
def host_token() -> str:
    """Equal in processes that can open each other's memory: same boot, same process ids, same user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"  # noqa: PTH115  no path
