"""The sequences of a model: turns in order, states that fail back, limits and idle times; against a simple model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from onnxsplit.errors import InputError
from runtime.errors import Busy
from runtime.gateway.protocol.inference import SequencePlace
from runtime.gateway.sequence_states import Room, SequenceStates

IDLE_NS = 1000


def lines(room: Room | None = None, *, most_waiting: int = 8) -> SequenceStates:
    return SequenceStates(room or Room(), idle_ns=IDLE_NS, most_waiting=most_waiting)


def place(name: int | str = 1, *, start: bool = False, end: bool = False) -> SequencePlace:
    return SequencePlace(name, start, end)


def state(size: int) -> dict[str, np.ndarray]:
    return {"h": np.zeros(size, np.uint8)}


def started(states: SequenceStates, name: int | str = 1, size: int = 4, now: int = 0) -> None:
    turn = states.join(place(name, start=True), now)
    states.reserve(turn, size)
    states.keep(turn, state(size), size)
    states.leave(turn, now)


def continues(states: SequenceStates, name: int | str = 1, now: int = 0) -> bool:
    """Whether a request without a start finds its sequence."""
    turn = states.join(place(name), now)
    try:
        return states.begin(turn) is not None
    except InputError:
        return False
    finally:
        states.leave(turn, now)


def test_requests_of_a_sequence_take_turns_and_others_do_not_wait():
    states = lines()
    first, second, other = (states.join(place(name, start=True), 0) for name in (1, 1, 2))
    assert [states.is_first(turn) for turn in (first, second, other)] == [True, False, True]
    assert states.leave(other, 0) is None
    assert states.leave(first, 0) is second
    assert states.leave(second, 0) is None
    assert states.turns == 0


def test_one_that_leaves_while_it_waits_wakes_nobody():
    states = lines()
    first, second, third = (states.join(place(start=True), 0) for _ in range(3))
    assert states.leave(second, 0) is None
    assert states.is_first(first)
    assert states.leave(first, 0) is third


def test_a_number_and_the_same_digits_as_text_are_two_sequences():
    states = lines()
    started(states, 7)
    assert continues(states, 7)
    assert not continues(states, "7")


def test_a_request_that_is_not_answered_changes_nothing():
    states = lines()
    started(states)
    before = states.begin(kept := states.join(place(), 0))
    states.leave(kept, 0)
    for failed in (place(), place(start=True), place(end=True)):
        turn = states.join(failed, 0)
        if failed.start:
            states.reserve(turn, 100)
        states.leave(turn, 0)
    assert states.begin(states.join(place(), 0)) is before
    assert (states.running, states.size_bytes) == (1, 4)


def test_a_sequence_that_does_not_run_is_refused_with_all_reasons():
    states = lines()
    with pytest.raises(InputError, match=r"sequence 'a' is not running: it was never started, has ended, was idle for"):
        states.begin(states.join(place("a"), 0))


def test_an_end_frees_the_states_and_a_start_with_an_end_takes_no_place():
    room = Room(most=1)
    states = lines(room)
    started(states)
    both = states.join(place(2, start=True, end=True), 0)
    states.reserve(both, 50)
    assert room.taken_bytes == 54
    states.keep(both, state(50), 50)
    states.leave(both, 0)
    ending = states.join(place(1, end=True), 0)
    states.keep(ending, state(4), 4)
    states.leave(ending, 0)
    assert (room.taken, room.taken_bytes, states.running) == (0, 0, 0)
    assert not continues(states, 1)
    assert not continues(states, 2)


def test_the_limits_are_shared_by_models_and_named():
    room = Room(most=2, most_bytes=100)
    one, other = lines(room), lines(room)
    started(one, size=60)
    with pytest.raises(Busy, match=r"this request needs 50 more, and --sequence-bytes allows 100"):
        started(other, size=50)
    started(other, 2, size=40)
    with pytest.raises(Busy, match=r"2 sequences run, and --max-sequences allows 2"):
        started(other, 3, size=0)
    started(one, size=60)  # a restart needs no more room
    assert (room.taken, room.taken_bytes) == (2, 100)


def test_states_that_grow_beyond_the_limit_leave_those_before():
    room = Room(most_bytes=10)
    states = lines(room)
    started(states, size=8)
    turn = states.join(place(), 0)
    before = states.begin(turn)
    with pytest.raises(Busy, match="--sequence-bytes"):
        states.keep(turn, state(12), 12)
    states.leave(turn, 0)
    assert states.begin(states.join(place(), 0)) is before
    assert room.taken_bytes == 8


def test_too_many_that_wait_are_refused():
    states = lines(most_waiting=1)
    turns = [states.join(place(start=True), 0) for _ in range(2)]
    with pytest.raises(Busy, match="--max-queue allows 1"):
        states.join(place(), 0)
    states.leave(turns[0], 0)
    states.join(place(), 0)


def test_a_sequence_is_idle_from_its_last_answer_and_not_while_a_request_runs():
    states = lines()
    started(states, 1, now=0)
    started(states, 2, now=5)
    assert states.due_ns() == IDLE_NS
    running = states.join(place(1), 10)
    assert states.due_ns() == 5 + IDLE_NS
    states.expire(10 * IDLE_NS)
    assert states.running == 1
    states.leave(running, 10 * IDLE_NS)
    assert continues(states, 1, 11 * IDLE_NS - 1)
    assert not continues(states, 1, 13 * IDLE_NS)
    assert states.due_ns() is None


def test_a_closed_model_ends_its_sequences_and_keeps_none():
    room = Room()
    states = lines(room)
    started(states, 1)
    turn, waiting = states.join(place(2, start=True), 0), states.join(place(1), 0)
    states.reserve(turn, 7)
    states.close()
    states.keep(turn, state(7), 7)
    states.leave(turn, 0)
    states.leave(waiting, 0)
    assert (room.taken, room.taken_bytes, states.running, states.turns) == (0, 0, 0, 0)


class Orders(RuleBasedStateMachine):
    """Requests that join, begin, are answered or fail, and leave, in any order; against a dictionary of states."""

    turns = Bundle("turns")
    names = st.sampled_from([1, 2, "a"])

    def __init__(self) -> None:
        super().__init__()
        self.room = Room(most=2, most_bytes=20)
        self.states = lines(self.room, most_waiting=3)
        self.now = 0
        self.kept: dict[object, tuple[int, int]] = {}  # size, and time of the last leave
        self.lines: dict[object, list] = {}
        self.begun: dict[object, tuple[int, int]] = {}  # sequences and bytes for which turns have taken room

    def drop_idle(self) -> None:
        for name, (_, left) in list(self.kept.items()):
            if not self.lines.get(name) and left + IDLE_NS <= self.now:
                del self.kept[name]

    def taken(self) -> tuple[int, int]:
        """Sequences and bytes that the room has to count."""
        sizes = [(1, size) for size, _ in self.kept.values()]
        one, other = zip((0, 0), *sizes, *self.begun.values(), strict=True)
        return sum(one), sum(other)

    @rule(target=turns, name=names, start=st.booleans(), end=st.booleans())
    def join(self, name, start, end):
        self.drop_idle()
        waiting = sum(len(line) - 1 for line in self.lines.values() if line)
        if self.lines.get(name) and waiting >= 3:
            with pytest.raises(Busy):
                self.states.join(place(name, start=start, end=end), self.now)
            return multiple()
        turn = self.states.join(place(name, start=start, end=end), self.now)
        self.lines.setdefault(name, []).append(turn)
        return turn

    @rule(turn=turns, size=st.integers(0, 15))
    def begin(self, turn, size):
        name, end = turn.place.id, turn.place.end
        assert self.states.is_first(turn) == (self.lines[name][0] is turn)
        if self.lines[name][0] is not turn or turn in self.begun:
            return
        if turn.place.start:
            assert self.states.begin(turn) is None
            sequences = int(name not in self.kept and not end)
            more = max(0, size - self.kept.get(name, (0, 0))[0])
            taken, taken_bytes = self.taken()
            if (sequences and taken >= 2) or (more and taken_bytes + more > 20):
                with pytest.raises(Busy):
                    self.states.reserve(turn, size)
                return
            self.states.reserve(turn, size)
            self.begun[turn] = (sequences, more)
        elif name in self.kept:
            assert self.states.begin(turn)["h"].size == self.kept[name][0]
            self.begun[turn] = (0, 0)
        else:
            with pytest.raises(InputError):
                self.states.begin(turn)

    @rule(turn=consumes(turns), size=st.integers(0, 15), fails=st.booleans())
    def end(self, turn, size, fails):
        name, line = turn.place.id, self.lines[turn.place.id]
        if turn in self.begun and not fails:
            self.keep(turn, size)
        self.begun.pop(turn, None)
        following = line[1] if line[0] is turn and len(line) > 1 else None
        assert self.states.leave(turn, self.now) is following
        line.remove(turn)
        if name in self.kept:
            self.kept[name] = (self.kept[name][0], self.now)

    def keep(self, turn, size):
        name, own = turn.place.id, self.begun[turn][1]
        grown = size - self.kept.get(name, (0, 0))[0] - own
        if not turn.place.end and grown > 0 and self.taken()[1] + grown > 20:
            with pytest.raises(Busy):
                self.states.keep(turn, state(size), size)
            return
        self.states.keep(turn, state(size), size)
        self.kept.pop(name, None)
        if not turn.place.end:
            self.kept[name] = (size, self.now)

    @rule(ns=st.integers(1, IDLE_NS))
    def wait(self, ns):
        self.now += ns
        self.states.expire(self.now)
        self.drop_idle()

    @invariant()
    def counts_are_those_of_the_model(self):
        assert self.states.running == len(self.kept)
        assert self.states.size_bytes == sum(size for size, _ in self.kept.values())
        assert (self.room.taken, self.room.taken_bytes) == self.taken()
        assert self.states.turns == sum(map(len, self.lines.values()))
        idle = [left + IDLE_NS for name, (_, left) in self.kept.items() if not self.lines.get(name)]
        assert self.states.due_ns() == min(idle, default=None)


TestOrders = Orders.TestCase
