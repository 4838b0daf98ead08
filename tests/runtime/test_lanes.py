"""What lanes carry: signatures are never mistaken, no entry can do harm, and fragments arrive as messages would."""

from __future__ import annotations

import gc
import time
import weakref
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from onnxsplit.tensors import numpy_dtype
from runtime.errors import ProtocolError
from runtime.memory import lane, lanes, signatures
from runtime.memory.arena import Arena
from runtime.memory.lane import ENTRIES, ENTRY_BYTES, MOST_VISITS, RING_BYTES, Entry, LaneWriter, Sleep
from runtime.memory.lanes import Incoming
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.memory.payloads import Payloads
from runtime.memory.peer_arena import PeerArena
from runtime.memory.regions import DATA_AT
from runtime.wire import codec
from runtime.wire.messages.control import Peer
from runtime.wire.messages.data import SLOTS, Fragment, TensorHead, TensorPlace, Visit

MIB = 1 << 20
WRITER, READER = 3, 7


@pytest.fixture(autouse=True, scope="module")
def supported():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "SUPPORTED", True)
        yield


def message(signature: int, *tensors: TensorHead, route: tuple[int, ...] = ()) -> Fragment:
    """A fragment that came as a message."""
    return Fragment(1, 1, 1, 1, 0, WRITER, 0, route, (), tensors, (), signature=signature)


class SignatureRules(RuleBasedStateMachine):
    """A writer and a reader with room for three signatures, keys of six fragments, and messages in their order."""

    in_order, room = True, 3

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for module in (lane, signatures):
            self.patch.setattr(module, "SIGNATURES", self.room)
        ring, row = memoryview(bytearray(RING_BYTES)), memoryview(bytearray(8 * (8 + self.room))).cast("Q")
        arena, peer = SimpleNamespace(row=lambda _: row), SimpleNamespace(ring=lambda _: ring)
        self.incoming = Incoming(WRITER, arena, peer, READER)
        self.writer = LaneWriter(ring, row, Sleep(memoryview(bytearray(8)).cast("Q")), lambda: None)
        self.keys: dict[int, int] = {}  # by signature
        self.messages: list[tuple[int, int]] = []  # on their way: signature and key
        self.unread: list[int] = []  # the keys of the entries in the ring
        self.learned: set[int] = set()

    @rule(key=st.integers(0, 5))
    def send(self, key):
        number = self.writer.signature(key)
        if not number:
            assert self.unread, "an old signature can be replaced"
        elif self.writer.knows(number):
            assert number in self.learned
            if self.writer.write(Entry(1, 1, 1, 1, 0, number, 0, 1, DATA_AT, b"")):
                self.unread.append(key)
        else:
            self.messages.append((number, key))
        if number:
            assert self.keys.setdefault(number, key) == key

    @precondition(lambda self: self.messages)
    @rule(data=st.data())
    def receive_a_message(self, data):
        place = 0 if self.in_order else data.draw(st.integers(0, len(self.messages) - 1))
        number, key = self.messages.pop(place)
        self.incoming.learn(message(number, TensorHead("x", "int8", (1,), TensorPlace(0, 1, DATA_AT)), route=(key,)))
        self.learned.add(number)

    @rule()
    def take(self):
        taken = self.incoming.take()
        assert (taken is not None) == bool(self.unread)
        if taken is not None:
            assert taken.known.signature.route == (self.unread.pop(0),)

    @invariant()
    def only_signatures_that_were_learned_and_not_replaced_are_known(self):
        for number in self.keys:
            if self.writer.knows(number):
                assert number in self.learned
                assert number > max(self.keys) - self.room

    def teardown(self):
        self.patch.undo()


class UnorderedSignatureRules(SignatureRules):
    """The same with room for one, where messages overtake each other: those that no datagram takes use ZeroMQ."""

    in_order, room = False, 1


SignatureRules.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
UnorderedSignatureRules.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestSignatures = SignatureRules.TestCase
TestSignaturesOfUnorderedMessages = UnorderedSignatureRules.TestCase


class Fuzzed:
    """A lane between two arenas whose entries the test writes itself, and signatures that the reader knows."""

    PARTS = (
        [("float32", (10, 10), 0)],
        [("int8", (7,), 0), ("float64", (4, 4), 64), ("bool", (), 1 << 19)],
        [("int64", (), 0), ("uint8", (0, 5), 1 << 20), ("float16", (3,), 1 << 48)],
        [("uint8", (0,), 0)],
        [("uint8", (1 << 20,), 0)],
        [("bfloat16", (1 << 40, 1 << 40), 0)],
    )

    def __init__(self) -> None:
        self.arenas = Arena(MIB), Arena(MIB)
        self.peer = PeerArena(self.arenas[0].address)
        self.size = self.arenas[0].address.size_bytes
        self.incoming = Incoming(WRITER, self.arenas[1], self.peer, READER)
        for number, parts in enumerate(self.PARTS, 1):
            places = [(dtype, shape, TensorPlace(0, 1, DATA_AT + at)) for dtype, shape, at in parts]
            heads = [TensorHead(f"t{i}", dtype, shape, place) for i, (dtype, shape, place) in enumerate(places)]
            self.incoming.learn(message(number, *heads))

    def write(self, words: list[int]) -> None:
        """Write an entry whose words after its turn are these."""
        turn = self.arenas[1].row(WRITER)[0] + 1
        ring, at = self.arenas[0].ring(READER).cast("Q"), turn % ENTRIES * ENTRY_BYTES // 8
        for place, word in enumerate(words, at + 1):
            ring[place] = word
        ring[at] = turn

    def take(self) -> Fragment:
        """Take the entry; return its fragment."""
        taken = self.incoming.take()
        return taken.known.fragment(taken.entry, 0)

    def holds(self, array: np.ndarray) -> bool:
        """Whether an array lies wholly in the data of the peer's memory."""
        at = array.ctypes.data - np.frombuffer(self.peer._map, np.uint8).ctypes.data
        return array.flags.c_contiguous and at >= DATA_AT and at + array.nbytes <= self.size


@pytest.fixture(scope="module")
def fuzzed():
    fuzzed = Fuzzed()
    yield fuzzed
    fuzzed.peer.close()
    for arena in fuzzed.arenas:
        arena.close()


POWERS = [1 << bits for bits in (0, 10, 16, 20, 40, 48, 50, 60, 62, 63)]
WORDS = st.sampled_from([0, *(power + more for power in POWERS for more in (-1, 0, 1)), (1 << 64) - 1])
OFFSETS = st.integers(DATA_AT - 64, DATA_AT + 900) | st.integers(DATA_AT + MIB - 900, DATA_AT + MIB)


@settings(max_examples=400)
@given(
    signature=st.integers(1, len(Fuzzed.PARTS)),
    slot=st.integers(0, SLOTS - 1),
    offset=OFFSETS,
    visits=st.integers(0, 3),
    changes=st.dictionaries(
        st.sampled_from([*range(10), *range(15, 24)]), WORDS | st.integers(0, (1 << 64) - 1), max_size=3
    ),
)
@example(signature=1, slot=0, offset=DATA_AT, visits=MOST_VISITS + 1, changes={})
@example(signature=1, slot=0, offset=DATA_AT, visits=(1 << 64) - 1, changes={})
def test_an_entry_of_any_words_is_refused_or_lies_inside_the_memory(fuzzed, signature, slot, offset, visits, changes):
    """What is not refused could have come as a message, so its reader can pass all of it on."""
    words = [5, 1, 1, 1000, 0, signature, slot, 1, offset, visits, *[0] * 29]
    for place, word in changes.items():
        words[place] = word
    fuzzed.write(words)
    try:
        taken = fuzzed.incoming.take()
        fragment, tensors = taken.known.fragment(taken.entry, time.monotonic_ns()), taken.known.tensors(taken.entry)
    except ProtocolError:
        return
    assert list(tensors) == [part.name for part in taken.known.signature.parts]
    assert all(fuzzed.holds(array) for array in tensors.values())
    assert isinstance(taken.known.holds(taken.entry), bool)
    assert len(fragment.history) <= MOST_VISITS
    assert codec.decode_data(codec.encode(fragment)) == fragment


BOUNDS = {
    "request": (0, 0, 1 << 48), "attempt": (1, 0, 1 << 48), "view": (2, 0, 1 << 48), "cost": (3, 1, 1 << 40),
    "slot": (6, 0, SLOTS - 1), "generation": (7, 0, 1 << 62),
    "stage": (15, 0, 1 << 16), "replica": (16, 0, 1 << 16), "arrived_ns": (17, 0, 1 << 62),
    "started_ns": (18, 0, 1 << 62), "ended_ns": (19, 0, 1 << 62), "sent_ns": (20, 0, 1 << 62),
    "output_bytes": (21, 0, 1 << 50), "shared_bytes": (22, 0, 1 << 50),
}  # fmt: skip


@pytest.mark.parametrize(("place", "least", "most"), BOUNDS.values(), ids=BOUNDS)
def test_a_number_is_refused_if_no_message_could_hold_it(fuzzed, place, least, most):
    for word in {max(0, least - 1), least, most, most + 1}:
        words = [5, 1, 1, 1000, 0, 1, 0, 1, DATA_AT, 1, *[0] * 13]
        words[place] = word
        fuzzed.write(words)
        if least <= word <= most:
            assert fuzzed.take()
        else:
            with pytest.raises(ProtocolError):
                fuzzed.take()


@pytest.mark.parametrize("turn", [0, 1, -1, ENTRIES, -ENTRIES, 1 << 40])
def test_an_entry_whose_turn_is_not_the_next_is_not_there(fuzzed, turn):
    next_turn = fuzzed.arenas[1].row(WRITER)[0] + 1
    fuzzed.arenas[0].ring(READER).cast("Q")[next_turn % ENTRIES * ENTRY_BYTES // 8] = next_turn + turn
    assert fuzzed.incoming.waiting is (turn == 0)
    if turn:
        assert fuzzed.incoming.take() is None


class Link:
    """A link that keeps what is sent over it."""

    def __init__(self) -> None:
        self.headers: list[bytes] = []
        self.bell = lambda: None

    def send(self, header: bytes, frames=(), *, track: bool = False) -> list:
        assert not frames
        self.headers.append(header)
        return []


class Neighbours:
    """A sender and a receiver with a lane between them."""

    def __init__(self) -> None:
        self.sender, self.receiver, self.link = Payloads(MIB), Payloads(MIB), Link()
        for me, other, payloads, memory in (
            (WRITER, READER, self.sender, self.receiver.memory),
            (READER, WRITER, self.receiver, self.sender.memory),
        ):
            payloads.meet(me, {other: Peer(other, 0, 0, True, "", "", memory, "")})
        self.sender.share([READER], {READER: self.link})

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_) -> None:
        self.sender.close()
        self.receiver.close()

    def outgoing(self, shapes) -> Outgoing:
        """Tensors of these types and shapes in one slot, all different."""
        outgoing = self.sender.reserve(shapes, tuple(shapes))
        for fill, array in enumerate(outgoing.arrays.values()):
            array[...] = fill
        return outgoing

    def send(self, outgoing: Outgoing, attempt: Attempt, source: int = 0, names=None) -> Fragment | None:
        """Send tensors; return the message if they went as one, which the receiver then has learned."""
        self.sender.send(self.link, READER, outgoing, names or tuple(outgoing.arrays), attempt, source)
        if not self.link.headers:
            return None
        fragment = codec.decode_data(self.link.headers.pop())
        self.receiver.receive(fragment, [])
        self.receiver.lanes.learn(fragment)
        return fragment


AMOUNT, NS, INDEX, BYTES = (st.integers(0, 1 << bits) for bits in (48, 62, 16, 50))
VISITS = st.builds(Visit, INDEX, INDEX, NS, NS, NS, NS, BYTES, BYTES)
ATTEMPTS = st.builds(
    Attempt,
    request=AMOUNT,
    attempt=AMOUNT,
    view=AMOUNT,
    cost=st.integers(1, 1 << 40),
    budget_ns=st.just(0) | st.integers(1, 1 << 61),
    route=st.lists(st.integers(-1, 1 << 16), max_size=5).map(tuple),
    wanted=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    history=st.lists(VISITS, max_size=14).map(tuple),
)
TYPES = st.sampled_from(["float32", "int64", "bool", "bfloat16"])
SHAPES = st.dictionaries(
    st.text(max_size=8), st.tuples(TYPES, st.lists(st.integers(0, 4), max_size=3).map(tuple)), min_size=1, max_size=4
)


@settings(max_examples=100)
@given(ATTEMPTS, SHAPES, st.integers(-1, 1 << 16), st.data())
def test_a_fragment_comes_out_of_a_lane_as_it_would_have_come_as_a_message(attempt, shapes, source, data):
    with Neighbours() as both:
        outgoing = both.outgoing(shapes)
        chosen = data.draw(st.sets(st.sampled_from(list(shapes)), min_size=1))
        names = tuple(name for name in shapes if name in chosen)
        message = both.send(outgoing, attempt, source, names)
        assert message.signature
        before = time.monotonic_ns()
        assert both.send(outgoing, attempt, source, names) is None
        taken = both.receiver.lanes.incoming[0].take()
        now = time.monotonic_ns()
        fragment = taken.known.fragment(taken.entry, now)
        assert fragment == msgspec.structs.replace(message, signature=0, budget_ns=fragment.budget_ns)
        assert min(attempt.budget_ns, max(1, attempt.budget_ns - (now - before))) <= fragment.budget_ns
        assert fragment.budget_ns <= attempt.budget_ns
        for name, array in taken.known.tensors(taken.entry).items():
            assert array.dtype == numpy_dtype(shapes[name][0])
            assert np.array_equal(array, outgoing.arrays[name])
        assert [part.name for part in taken.known.signature.parts] == list(names)


ORDINARY = Attempt(1, 1, 1, 1, 0, (READER,), ())
SHAPE = {"x": ("float32", (3,)), "y": ("float32", (3,))}


@pytest.fixture
def both():
    with Neighbours() as both:
        yield both


def test_the_longest_time_that_a_message_can_give_a_request_passes_through_a_lane(both):
    attempt = msgspec.structs.replace(ORDINARY, budget_ns=1 << 62)
    outgoing = both.outgoing(SHAPE)
    sent = [both.send(outgoing, attempt) for _ in range(2)]
    arrived = sent[1] or both.receiver.lift(both.receiver.lanes.incoming[0].take())[0]
    assert arrived.budget_ns > 1 << 61


@pytest.mark.parametrize(
    "change",
    [
        {"history": (Visit(0, 0, 0, 0, 0, 0, 0, 0),) * 15},
        {"history": (Visit(-1, 0, 0, 0, 0, 0, 0, 0),)},
        {"history": (Visit(0, -1, 0, 0, 0, 0, 0, 0),)},
    ],
)
def test_a_history_that_no_entry_can_hold_goes_as_a_message(both, change):
    outgoing = both.outgoing(SHAPE)
    both.send(outgoing, ORDINARY)
    message = both.send(outgoing, msgspec.structs.replace(ORDINARY, **change))
    assert message.history == change["history"]
    assert both.send(outgoing, ORDINARY) is None


def test_tensors_of_which_one_was_not_written_in_its_slot_go_as_messages(both):
    for shared in ((), ("y",)):
        outgoing = both.outgoing(SHAPE)
        both.sender.complete(outgoing, {**outgoing.arrays, "y": np.ones(5, np.float32)}, shared)
        for _ in range(3):
            assert both.send(outgoing, ORDINARY).signature == 0


def test_a_message_that_comes_late_does_not_displace_a_newer_signature(both):
    """Messages with a signature are sent until the reader has learned it. The last one may go through ZeroMQ."""
    late = both.send(both.outgoing({"x": ("int8", (1,))}), ORDINARY)
    for size in range(2, lane.SIGNATURES + 2):
        last = both.outgoing({"x": ("int8", (size,))})
        assert both.send(last, ORDINARY).signature == size
    assert both.send(last, ORDINARY) is None
    both.receiver.lanes.learn(late)
    fragment, _ = both.receiver.lift(both.receiver.lanes.incoming[0].take())
    assert fragment.tensors[0].shape == (lane.SIGNATURES + 1,)


def test_closed_memory_is_unmapped_with_the_last_array_in_it(both):
    """Also while the closed objects are kept, as a closed pipeline keeps them. Until then it can be written."""
    outgoing = both.outgoing(SHAPE)
    both.send(outgoing, ORDINARY)
    assert both.send(outgoing, ORDINARY) is None
    taken = both.receiver.lanes.incoming[0].take()
    seen = [outgoing.arrays["x"], taken.known.tensors(taken.entry)["x"]]
    maps = [weakref.ref(array.base) for array in seen]
    both.sender.close()
    both.receiver.close()
    outgoing.arrays["x"][...] = 7
    assert outgoing.arrays["x"].tolist() == [7, 7, 7]
    del outgoing, taken, seen
    gc.collect()
    assert [found() for found in maps] == [None, None]
