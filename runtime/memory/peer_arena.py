"""The shared memory of a peer, mapped for reading."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from onnxsplit.tensors import Array, element_count, numpy_dtype
from runtime.balance.board import BOARD_BYTES, LoadBoard
from runtime.errors import ProtocolError
from runtime.memory.lane import Sleep
from runtime.memory.pinned import Pin
from runtime.memory.regions import (
    ATTEMPTS,
    BOARD_AT,
    DATA_AT,
    GENERATIONS_AT,
    LEDGER_AT,
    LEDGER_ENTRIES,
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
            if size != memory.size_bytes or size < DATA_AT or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) != SEALS:
                raise ProtocolError(f"process {memory.pid} does not hold the memory that it has announced")
            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        if not secrets.compare_digest(self._map[:TOKEN_BYTES], memory.token):
            self._map.close()
            raise ProtocolError(f"process {memory.pid} does not hold the memory that it has announced")
        self._closed = False
        self._size = size
        self._pin: Pin | None = None
        self._pinned = DATA_AT
        view = memoryview(self._map)
        self.board = LoadBoard(view[BOARD_AT : BOARD_AT + BOARD_BYTES])
        self._ledger = view[LEDGER_AT:GENERATIONS_AT].cast("Q")
        self._generations = view[GENERATIONS_AT:RETURNS_AT].cast("Q")
        self._returns = view[RETURNS_AT:SLEEP_AT].cast("Q")

    def close(self) -> None:
        """Unmap the memory, as soon as no array in it is in use; no slot is lent from now on."""
        self._closed = True
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
        if not (0 <= place.slot < SLOTS and DATA_AT <= place.offset <= self._size - size):
            raise ProtocolError(f"{size} bytes in slot {place.slot} at {place.offset} lie outside the peer's memory")
        if self._pin is not None and place.offset + size > self._pinned:
            reach = min(self._size, -(-(place.offset + size) // STEP_BYTES) * STEP_BYTES)
            address = np.frombuffer(self._map, np.uint8).ctypes.data
            self._pin(address + self._pinned, reach - self._pinned, True)
            self._pinned = reach
        return np.ndarray(tuple(shape), kind, self._map, place.offset)

    def holds(self, slot: int, generation: int) -> bool:
        """Whether a slot is still lent for this use. If so, what was read from it before this call is valid."""
        return not self._closed and self._generations[slot] == generation

    @property
    def sleep(self) -> Sleep:
        """Says whether the peer waits for entries of lanes; it keeps the memory mapped."""
        return Sleep(memoryview(self._map)[SLEEP_AT : SLEEP_AT + 8].cast("Q"))

    def ring(self, reader: int) -> memoryview:
        """The ring of the peer's lane to process number ``reader``; it keeps the memory mapped."""
        return ring_of(self._map, reader)

    def row(self, writer: int) -> memoryview:
        """The peer's row for the lane from process number ``writer``; it keeps the memory mapped."""
        return row_of(self._map, writer)

    def returns(self, owner: int) -> memoryview:
        """The row of the peer's returns for the slots of process number ``owner``."""
        return self._returns[owner * SLOTS : (owner + 1) * SLOTS]

    def step(self, request: int, attempt: int) -> Step:
        """How far the peer is with an attempt at a request, or was when it died."""
        entry = self._ledger[request % LEDGER_ENTRIES]
        same = entry >> 2 == request * ATTEMPTS + attempt % ATTEMPTS
        return Step(entry & 3) if same and entry & 3 < len(Step) else Step.UNKNOWN
