"""Lanes: every entry is taken once, as it was written, and no doorbell is lost, in every order of memory operations."""

from __future__ import annotations

import struct
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_model import Choose, Head, Killed, Words, World, by_bytes, every_order, one_after_another

from runtime.memory import lane, lanes
from runtime.memory.lane import ENTRIES, MOST_VISITS, RING_BYTES, ROW_WORDS, Entry, LaneReader, LaneWriter, Sleep

START = 1 << 44
BOTH = ("reader", "writer 0", "writer 1")


def entry(number: int, visits: int = 0, signature: int = 1) -> Entry:
    """An entry whose fields all differ from each other, and from those of other entries."""
    words = range(1000 * number + 100, 1000 * number + 100 + 8 * visits)
    first = 1000 * number + 10
    return Entry(
        *range(first, first + 5), signature, *range(first + 5, first + 8), struct.pack(f"={len(words)}Q", *words)
    )


class Exchange:
    """One reader, and writers that each write some entries, in a world where rings have two entries.

    Args:
        choose: chooses the order of events.
        sent: for each writer what it writes.
        fenced: the processes whose fences do something.
        seed, nudges: as in a World.
    """

    def __init__(self, choose: Choose, sent: list[list[Entry]], fenced=BOTH, seed=None, nudges=0) -> None:
        self.world = World(choose, seed, nudges)
        self.reader = self.world.process("reader", fenced="reader" in fenced)
        self.sleep = Sleep(Words(self.reader, "sleep"))
        self.sent = sent
        self.taken: list[list[Entry]] = [[] for _ in sent]
        self.lanes = lanes.Lanes(self)  # in place of an arena, of which it needs no more than ``sleep``
        self.writers = [self.world.process(f"writer {n}", fenced=f"writer {n}" in fenced) for n in range(len(sent))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lane, "ENTRIES", 2)
            patch.setattr(lane, "_HEAD", Head)
            patch.setattr(lane, "fence", self.world.fence)
            self._begin()
            self.world.run()

    def _begin(self) -> None:
        self.lanes.incoming = tuple(
            LaneReader(Words(self.reader, f"ring {n}", 8), Words(self.reader, f"row {n}"), START + n)
            for n in range(len(self.sent))
        )
        works = [self._writer(n) for n in range(len(self.sent))]
        for process, work in zip([self.reader, *self.writers], [self._read, *works], strict=True):
            process.begin(work)

    def _writer(self, number: int):
        process = self.writers[number]

        def ring_bell() -> None:
            process.step()
            self.world.memory["bells", 0] = self.world.memory.get(("bells", 0), 0) + 1

        def write() -> None:
            for one in self.sent[number]:
                while not writer.write(one):
                    process.wait_for_change()

        ring, row = Words(process, f"ring {number}", 8), Words(process, f"row {number}")
        writer = LaneWriter(ring, row, Sleep(Words(process, "sleep")), ring_bell)
        return write

    def _read(self) -> None:
        while sum(map(len, self.taken)) < sum(map(len, self.sent)):
            if self.lanes.fall_asleep():
                self.reader.wait(lambda: self.world.memory.get(("bells", 0), 0) > 0)
            self.lanes.wake_up()
            self.world.memory["bells", 0] = 0
            for incoming, taken in zip(self.lanes.incoming, self.taken, strict=True):
                while (one := incoming.take()) is not None:
                    taken.append(one)


@pytest.fixture(autouse=True)
def supported(monkeypatch):
    monkeypatch.setattr(lanes, "SUPPORTED", True)


SCHEDULES = st.builds(by_bytes, st.binary(min_size=600, max_size=600), st.sampled_from([0, 128, 200, 240, 252]))
COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=2)


@settings(max_examples=150)
@given(SCHEDULES, COUNTS, st.integers(0, 99), st.integers(0, 2))
def test_entries_are_taken_once_in_order_and_whole_and_no_doorbell_is_lost(choose, counts, seed, nudges):
    sent = [[entry(10 * n + i, int(i % 4 < 3)) for i in range(count)] for n, count in enumerate(counts)]
    assert Exchange(choose, sent, seed=seed, nudges=nudges).taken == sent


def exchanged(sent: list[list[Entry]], fenced: tuple[str, ...], choose: Choose) -> None:
    assert Exchange(choose, sent, fenced).taken == sent


def test_one_entry_is_taken_in_every_order_that_there_is():
    assert every_order(partial(exchanged, [[entry(1)]], BOTH)) > 500


@pytest.mark.parametrize("fenced", [(), ("reader",), ("writer 0",)])
def test_an_order_that_loses_a_doorbell_without_a_fence_is_among_them(fenced):
    with pytest.raises(AssertionError):
        every_order(partial(exchanged, [[entry(1)]], fenced))


@pytest.mark.parametrize(("fenced", "lost"), [((), True), (("reader",), True), (("writer 0",), True), (BOTH, False)])
def test_a_doorbell_is_lost_unless_both_sides_have_a_fence(fenced, lost):
    sent = [[entry(1)]]
    orders = [("reader", "writer 0"), ("writer 0", "reader")]
    assert any(Exchange(one_after_another(*order), sent, fenced).taken != sent for order in orders) is lost


@pytest.mark.parametrize("stores", range(28))
def test_a_writer_killed_at_any_store_leaves_the_entry_whole_or_unseen(stores, monkeypatch):
    """The last of the 27 stores of an entry with two visits is its turn."""
    monkeypatch.setattr(lane, "ENTRIES", 2)
    monkeypatch.setattr(lane, "_HEAD", Head)
    world = World(one_after_another(), seed=stores)
    me, killed, new = world.process("reader"), world.process("killed"), world.process("new")

    def begin(process, start: int) -> tuple[LaneReader, LaneWriter]:
        reader = LaneReader(Words(me, f"ring of {process.name}", 8), Words(me, "row"), start)
        ring, row = Words(process, f"ring of {process.name}", 8), Words(process, "row")
        return reader, LaneWriter(ring, row, Sleep(Words(process, "sleep")), lambda: None)

    reader, writer = begin(killed, START)
    for number in range(3):  # all entries of the ring have old content
        assert writer.write(entry(number, 2))
        assert reader.take() == entry(number, 2)
    killed.stores_left = stores
    if stores < 27:
        with pytest.raises(Killed):
            writer.write(entry(4, 2))
    else:
        writer.write(entry(4, 2))
    assert reader.waiting is (stores == 27)
    assert reader.take() == (entry(4, 2) if stores == 27 else None)
    reader, writer = begin(new, START + 100)
    assert reader.take() is None
    assert writer.write(entry(5, 2))
    assert reader.take() == entry(5, 2)


class Pair:
    """Both ends of a lane in memory of this process."""

    def __init__(self) -> None:
        self.ring = memoryview(bytearray(RING_BYTES))
        self.row = memoryview(bytearray(8 * ROW_WORDS)).cast("Q")
        self.sleep = Sleep(memoryview(bytearray(8)).cast("Q"))
        self.bells = 0
        self.begin(START)

    def begin(self, start: int) -> None:
        """Begin a lane, in the place of the one before."""
        self.reader = LaneReader(self.ring, self.row, start)
        self.writer = LaneWriter(self.ring, self.row, self.sleep, self._ring_bell)

    def _ring_bell(self) -> None:
        self.bells += 1


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_full_ring_refuses_until_an_entry_is_taken(pair):
    for number in range(ENTRIES):
        assert pair.writer.write(entry(number))
    for number in range(3 * ENTRIES):
        assert not pair.writer.write(entry(99))
        assert pair.reader.take() == entry(number)
        assert pair.writer.write(entry(number + ENTRIES))


def test_an_entry_holds_its_most_visits_and_refuses_more(pair):
    assert not pair.writer.write(entry(1, MOST_VISITS + 1))
    assert pair.reader.take() is None
    assert pair.writer.write(entry(2, MOST_VISITS))
    assert pair.reader.take() == entry(2, MOST_VISITS)


@given(st.lists(st.integers(-40, 40), max_size=30))
def test_over_many_turns_of_the_ring_entries_come_out_as_they_went_in(bursts):
    """Positive numbers are writes, and negative ones are takes."""
    pair, written, taken = Pair(), 0, 0
    for burst in bursts:
        for _ in range(burst):
            assert pair.writer.write(entry(written, written % 3)) is (written - taken < ENTRIES)
            written = min(written + 1, taken + ENTRIES)
        for _ in range(-burst):
            assert pair.reader.waiting is (taken < written)
            assert pair.reader.take() == (entry(taken, taken % 3) if taken < written else None)
            taken = min(taken + 1, written)


@given(st.integers(0, ENTRIES), st.integers(0, ENTRIES), st.integers(1, 2 * ENTRIES))
def test_a_new_reader_sees_no_old_entries_and_a_new_writer_begins_there(written, taken, later):
    pair = Pair()
    for number in range(written):
        pair.writer.write(entry(number))
    for _ in range(taken):
        pair.reader.take()
    pair.reader.learn(1)
    old = pair.writer
    pair.begin(START + written + later)
    assert not pair.reader.waiting
    assert pair.reader.take() is None
    assert not old.write(entry(66)), "what it writes could be taken for a new entry"
    assert not pair.writer.knows(1)
    for number in range(ENTRIES):
        assert pair.writer.write(entry(100 + number))
    assert [pair.reader.take() for _ in range(ENTRIES + 1)] == [*(entry(100 + n) for n in range(ENTRIES)), None]


def test_a_writer_rings_once_for_each_sleep(pair):
    pair.writer.write(entry(1))
    assert pair.bells == 0
    for sleeps in range(1, 4):
        pair.sleep.begin()
        pair.sleep.begin()
        for _ in range(3):
            assert pair.writer.write(entry(1))
            assert pair.bells == sleeps
        pair.sleep.end()
        pair.sleep.end()
        pair.writer.write(entry(1))
        assert pair.bells == sleeps
