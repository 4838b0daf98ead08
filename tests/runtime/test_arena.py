"""Shared memory: a lent slot stays unchanged until all readers have returned it, and no memory is leaked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ProtocolError
from runtime.memory.arena import Arena
from runtime.memory.extents import ALIGNMENT, Extents, aligned
from runtime.memory.peer_arena import PeerArena
from runtime.memory.pinned import pin_with
from runtime.memory.regions import DATA_AT
from runtime.wire.messages.control import Memory
from runtime.wire.messages.data import SLOTS, Step, TensorPlace

MIB = 1 << 20
ME, READER = 3, 7


@pytest.fixture
def arena():
    arena = Arena(8 * MIB)
    yield arena
    arena.close()


@pytest.fixture
def reader():
    arena = Arena(MIB)
    yield arena
    arena.close()


def returns(reader: Arena) -> memoryview:
    """Return the row of the reader's returns for process number ``ME``."""
    return PeerArena(reader.address).returns(ME)


def lend(arena: Arena, size: int, readers):
    """Lend a block at once; return None if there is no room."""
    block = arena.reserve(size)
    if block is not None:
        block.lend(readers)
    return block


def test_a_tensor_is_read_in_place_and_read_only(arena, reader):
    block = lend(arena, 4000, [returns(reader)])
    arena.array(block, 64, "float32", (10, 100))[...] = 7
    peer = PeerArena(arena.address)
    array = peer.array(block.place(64), "float32", (10, 100))
    assert array.shape == (10, 100)
    assert (array == 7).all()
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    arena.array(block, 64, "float32", (10, 100))[0, 0] = 8
    assert array[0, 0] == 8, "it is the owner's memory itself"


def test_a_slot_is_free_when_every_reader_has_returned_it(arena, reader):
    with_two = Arena(MIB)
    block = lend(arena, 100, [returns(reader), returns(with_two)])
    reader.give_back(ME, block.number, block.generation)
    assert arena.busy == 1
    with_two.give_back(ME, block.number, block.generation)
    assert arena.busy == 0
    with_two.close()


def test_a_late_return_of_an_old_use_frees_nothing(arena, reader):
    row = [returns(reader)]
    old = lend(arena, 100, row)
    stale = old.place(0)
    reader.give_back(ME, stale.slot, stale.generation)
    new = lend(arena, 100, row)
    assert new.number == old.number
    reader.give_back(ME, stale.slot, stale.generation)
    assert arena.busy == 1


def test_a_reader_notices_that_a_slot_was_taken_away(arena, reader):
    peer = PeerArena(arena.address)
    block = lend(arena, 100, [returns(reader)])
    place = block.place(0)
    assert peer.holds(place.slot, place.generation)
    arena.forget(block.readers[0])  # the owner was told that the reader is gone
    lend(arena, 100, [returns(reader)])
    assert not peer.holds(place.slot, place.generation)


def test_a_slot_that_its_owner_holds_is_not_free_whoever_returned_it(arena, reader):
    block = arena.reserve(100)
    block.readers = [returns(reader)]
    reader.give_back(ME, block.number, block.generation)
    assert arena.busy == 1
    block.held = False
    assert arena.busy == 0


def test_what_does_not_fit_is_refused_and_fits_when_there_is_room_again(arena, reader):
    row = [returns(reader)]
    blocks = [lend(arena, MIB, row) for _ in range(8)]
    assert lend(arena, 1, row) is None
    reader.give_back(ME, blocks[5].number, blocks[5].generation)
    assert lend(arena, MIB, row).offset == blocks[5].offset


def test_the_number_of_slots_is_limited(reader):
    arena = Arena(MIB)
    row = [returns(reader)]
    blocks = [lend(arena, 1, row) for _ in range(SLOTS)]
    assert lend(arena, 1, row) is None
    reader.give_back(ME, blocks[0].number, blocks[0].generation)
    assert lend(arena, 1, row) is not None
    arena.close()


def test_memory_is_taken_as_it_is_used_and_goes_back(reader):
    arena = Arena(1 << 30)
    row = [returns(reader)]

    def taken() -> int:
        return os.fstat(arena.address.descriptor).st_blocks * 512

    assert taken() < MIB
    large = lend(arena, 200 * MIB, row)
    assert 200 * MIB <= taken() < 202 * MIB
    reader.give_back(ME, large.number, large.generation)
    for _ in range(2100):
        block = lend(arena, 1000, row)
        reader.give_back(ME, block.number, block.generation)
    assert taken() < 70 * MIB
    block = lend(arena, 300 * MIB, row)
    arena.array(block, 0, "uint8", (300 * MIB,))[::4096] = 1
    arena.close()


def test_memory_that_the_system_does_not_have_is_refused_and_not_written(arena, reader, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert lend(arena, 100, [returns(reader)]) is None
    monkeypatch.undo()
    assert lend(arena, 100, [returns(reader)]) is not None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"host": "another"}, OSError),
        ({"token": bytes(32)}, ProtocolError),
        ({"size_bytes": 5}, ProtocolError),
        ({"descriptor": 0}, (ProtocolError, OSError)),
        ({"pid": 1 << 22}, OSError),
    ],
)
def test_memory_that_differs_from_the_peer_s_address_is_refused(arena, change, error):
    told = msgspec.structs.replace(arena.address, **change)
    with pytest.raises(error):
        PeerArena(told)


@pytest.mark.parametrize(
    "place",
    [
        TensorPlace(0, 1, 0),
        TensorPlace(0, 1, 1 << 40),
        TensorPlace(0, 1, -5),
        TensorPlace(-1, 1, 1 << 22),
        TensorPlace(SLOTS, 1, 1 << 22),
    ],
)
def test_a_place_outside_of_the_memory_is_refused(arena, place):
    with pytest.raises(ProtocolError, match="outside"):
        PeerArena(arena.address).array(place, "float32", (1 << 19,))


def test_a_tensor_that_claims_more_than_there_is_is_refused(arena):
    with pytest.raises(ProtocolError, match="outside"):
        PeerArena(arena.address).array(TensorPlace(0, 1, 3 * MIB), "float32", (1 << 40, 1 << 40))


def test_the_memory_cannot_shrink_under_a_reader(arena):
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(arena.address.descriptor, 0)


def test_the_ledger_tells_how_far_a_request_is(arena):
    peer = PeerArena(arena.address)
    assert peer.step(5, 1) is Step.UNKNOWN
    arena.record(5, 1, Step.RUNNING)
    assert peer.step(5, 1) is Step.RUNNING
    arena.record(5, 1, Step.DONE)
    assert peer.step(5, 1) is Step.DONE
    assert peer.step(5 + 4096, 1) is Step.UNKNOWN


OWNER = """
import sys, numpy as np, msgspec
from runtime.memory.arena import Arena
from runtime.wire.messages.control import Memory
from runtime.wire.messages.data import Step
arena = Arena(1 << 20)
block = arena.reserve(4096)
arena.array(block, 0, "int32", (1024,))[:] = range(1024)
arena.record(9, 2, Step.RUNNING)
sys.stdout.buffer.write(msgspec.json.encode((arena.address, block.place(0))) + b"\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_what_a_killed_owner_wrote_can_still_be_read_and_leaves_no_file(python_environment):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=python_environment
    )
    memory, place = msgspec.json.decode(owner.stdout.readline(), type=tuple[Memory, TensorPlace])
    peer = PeerArena(memory)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert peer.array(place, "int32", (1024,)).tolist() == list(range(1024))
    assert peer.step(9, 2) is Step.RUNNING
    with pytest.raises(OSError, match="No such"):
        PeerArena(memory)
    peer.close()


def test_nothing_stays_open():
    before = psutil.Process().num_fds(), len(psutil.Process().memory_maps(grouped=False))
    for _ in range(20):
        arena, other = Arena(MIB), Arena(MIB)
        peer = PeerArena(other.address)
        lend(arena, 10, [peer.returns(0)]).readers.clear()
        peer.close()
        arena.close()
        other.close()
    assert psutil.Process().num_fds() == before[0]
    assert len(psutil.Process().memory_maps(grouped=False)) <= before[1] + 2


@given(st.lists(st.integers(1, 3000), max_size=60), st.randoms())
def test_extents_never_overlap_and_all_come_back(sizes, random):
    extents = Extents(64 * 1024)
    taken: list[tuple[int, int]] = []
    for size in sizes:
        offset = extents.take(size)
        if offset is not None:
            assert offset % ALIGNMENT == 0
            assert offset + size <= 64 * 1024
            assert all(offset + aligned(size) <= o or o + aligned(s) <= offset for o, s in taken)
            taken.append((offset, size))
        if taken and random.random() < 0.4:
            extents.give(*taken.pop(random.randrange(len(taken))))
    for one in taken:
        extents.give(*one)
    assert extents.used == 0
    assert extents.take(64 * 1024) == 0, "neighbours that became free were joined"


def test_the_lowest_room_is_used_first():
    extents = Extents(1024)
    first, second, _ = (extents.take(100) for _ in range(3))
    extents.give(first, 100)
    assert extents.take(100) == first
    extents.give(second, 100)
    assert extents.take(64) == second


class FakeCuda:
    """A CUDA runtime that records what it is asked to pin, and refuses after some calls."""

    def __init__(self, calls: int) -> None:
        self.pinned: list[tuple[int, int]] = []

        def register(_address: int, size: int, flags: int) -> int:
            if len(self.pinned) == calls:
                return 2
            self.pinned.append((size, flags))
            return 0

        self.cudaHostRegister = register


def test_memory_is_pinned_as_it_is_used(arena, reader):
    own, theirs = FakeCuda(9), FakeCuda(9)
    peer = PeerArena(arena.address)
    arena.pin(pin_with(own))
    peer.pin(pin_with(theirs))
    first = lend(arena, MIB, [returns(reader)])
    second = lend(arena, 3 * MIB, [returns(reader)])
    for block in (first, second, first):
        peer.array(block.place(0), "uint8", (block.size,))
    assert own.pinned == [(MIB, 1), (3 * MIB, 1)]
    assert [flags for _, flags in theirs.pinned] == [1 | 8] * 2
    assert sum(size for size, _ in theirs.pinned) >= 4 * MIB


def test_what_cuda_refuses_to_pin_is_used_all_the_same(arena, reader, caplog):
    cuda = FakeCuda(1)
    arena.pin(pin_with(cuda))
    assert all(lend(arena, MIB, [returns(reader)]) is not None for _ in range(4))
    assert caplog.text.count("refuses to pin") == 1


@pytest.mark.parametrize("half_done", ["numbers", "extents", "lost", "forgotten"])
def test_after_an_interrupt_only_what_is_used_is_taken(arena, reader, half_done):
    """An interrupt may leave a slot both free and spare, in neither list, or held by nobody."""
    row = [returns(reader)]
    used, returned = lend(arena, 1000, row), [lend(arena, 2000, row) for _ in range(3)]
    held = arena.reserve(3000)
    for block in returned:
        reader.give_back(ME, block.number, block.generation)
    assert arena.busy == 2
    number, offset = arena._spares[2048][0]
    if half_done == "numbers":
        arena._numbers.append(number)
    elif half_done == "extents":
        arena._extents.give(offset - DATA_AT, 2048)
    elif half_done == "lost":
        arena._spares[2048].pop()
    else:
        arena.reserve(100)
    arena.mend([held])
    assert arena.busy == 2
    assert arena.used_bytes == used.size + held.size
    blocks = [used, held, *(arena.reserve(2000) for _ in range(100))]
    assert len({block.number for block in blocks}) == len(blocks)
    spans = sorted((block.offset, block.offset + block.size) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
