"""Which sequence is in which slot: each rule, and all of them under arbitrary orders of steps, copies and cancels."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.node.slots import Move, Placed, Slots, Unfit, Unplaced
from runtime.wire.messages.sequences import Opening, Reuse, Sampling, StepRow

SLOTS = 4


def row(sequence: int, start: int, slot: int = 0, *, epoch: int = 1, new: int = 1) -> StepRow:
    opening = Opening(1, Sampling()) if start == 0 else None
    return StepRow(sequence, epoch, slot, start, tuple(range(new)), True, opening)


def run(slots: Slots, step: int, *rows: StepRow) -> Placed:
    placed = slots.place(step, rows)
    assert isinstance(placed, Placed)
    slots.ran(step, rows, placed)
    return placed


@pytest.fixture
def slots() -> Slots:
    return Slots(SLOTS, rollback=True)


def test_a_sequence_goes_on_where_it_stopped(slots):
    assert run(slots, 1, row(7, 0, new=5)) == Placed((True,))
    assert run(slots, 2, row(7, 5)) == Placed((True,))
    assert (slots.sequences, slots.positions) == (1, 6)


def test_a_step_that_overtook_an_earlier_one_waits_for_it(slots):
    assert slots.place(2, [row(7, 5)]) is Unplaced.WAIT
    run(slots, 1, row(7, 0, new=5))
    assert slots.place(3, [row(7, 6)]) is Unplaced.WAIT
    run(slots, 2, row(7, 5))
    run(slots, 3, row(7, 6))


def test_a_step_waits_as_a_whole(slots):
    run(slots, 1, row(7, 0, new=5))
    assert slots.place(2, [row(7, 5), row(8, 3, 1)]) is Unplaced.WAIT
    assert slots.positions == 5


def test_a_claim_clears_the_slot_of_whoever_was_there(slots):
    run(slots, 1, row(7, 0, new=5))
    assert run(slots, 2, row(8, 0, new=2)) == Placed((True,), (), (0,))
    assert (slots.sequences, slots.positions) == (1, 2)


def test_an_older_claim_does_not_take_the_slot_from_a_later_one(slots):
    run(slots, 4, row(8, 0, new=2))
    assert slots.place(2, [row(7, 0, new=5)]) is Unplaced.DEAD
    run(slots, 5, row(8, 2))


def test_a_newer_epoch_begins_anew_in_any_slot(slots):
    run(slots, 1, row(7, 0, new=5))
    assert slots.place(3, [row(7, 5, 2, epoch=2)]) is Unplaced.WAIT
    assert run(slots, 2, row(7, 0, 2, epoch=2, new=5)) == Placed((True,), (), (0,))
    run(slots, 3, row(7, 5, 2, epoch=2))
    assert slots.place(4, [row(7, 5)]) is Unplaced.DEAD


def test_a_step_that_comes_twice_is_dead(slots):
    run(slots, 1, row(7, 0, new=5))
    run(slots, 2, row(7, 5))
    assert slots.place(1, [row(7, 0, new=5)]) is Unplaced.DEAD
    assert slots.place(2, [row(7, 5)]) is Unplaced.DEAD
    run(slots, 3, row(7, 6))


def test_a_sequence_moves_with_its_states(slots):
    run(slots, 1, row(7, 0, new=5))
    run(slots, 2, row(8, 0, 1, new=3))
    assert slots.free(7, 1) == (0,)
    assert run(slots, 3, row(8, 3, 0)) == Placed((True,), (Move(1, 0, 3),), (1,))
    run(slots, 4, row(8, 4, 0), row(9, 0, 1))


def test_two_sequences_change_places_at_once(slots):
    run(slots, 1, row(7, 0, 0, new=5))
    run(slots, 2, row(8, 0, 1, new=3))
    assert run(slots, 3, row(8, 3, 0), row(7, 5, 1)) == Placed((True, True), (Move(1, 0, 3), Move(0, 1, 5)))


def test_a_dead_row_computes_beside_the_live_ones(slots):
    run(slots, 1, row(7, 0, 0, new=5))
    run(slots, 2, row(8, 0, 1, new=3))
    slots.free(7, 1)
    rows = [row(7, 5, 0), row(8, 3, 1)]
    placed = slots.place(3, rows)
    assert placed == Placed((False, True))
    assert slots.ran(3, rows, placed) == (0,), "what the dead row has written is cleared"
    assert slots.place(4, [row(7, 6, 0)]) is Unplaced.DEAD


def test_a_dead_row_does_not_compute_on_the_states_of_another(slots):
    run(slots, 1, row(7, 0, 0))
    run(slots, 2, row(8, 0, 1))
    slots.free(7, 1)
    run(slots, 3, row(9, 0, 0))
    verdict = slots.place(4, [row(7, 1, 0), row(8, 1, 1)])
    assert isinstance(verdict, Unfit)
    assert "sequence 7" in verdict.reason
    assert "sequence 9" in verdict.reason


def test_cancelled_and_passed_sequences_leave_their_slots(slots):
    run(slots, 1, row(3, 0, 0))
    run(slots, 2, row(4, 0, 1))
    assert slots.free(4, 1) == (1,)
    assert slots.place(5, [row(4, 1, 1)]) is Unplaced.DEAD
    assert slots.passed(4) == (0,)
    assert slots.place(6, [row(3, 1, 0)]) is Unplaced.DEAD
    assert (slots.sequences, slots.positions) == (0, 0)


def test_what_ends_while_it_runs_is_cleared_afterwards(slots):
    rows = [row(7, 0, 0), row(8, 0, 1)]
    placed = slots.place(1, rows)
    assert slots.free(7, 1) == ()
    assert slots.ran(1, rows, placed) == (0,)
    assert slots.sequences == 1


def test_a_step_that_failed_may_be_tried_again(slots):
    run(slots, 1, row(7, 0, new=5))
    rows = [row(7, 5)]
    assert slots.failed(rows, slots.place(2, rows)) == ()
    run(slots, 3, *rows)


def test_states_that_can_be_cut_back_roll_back_to_any_length(slots):
    run(slots, 1, row(7, 0, new=5))
    run(slots, 2, row(7, 2))
    assert slots.positions == 3


def test_other_states_roll_back_by_one_step_only():
    slots = Slots(SLOTS, rollback=False)
    run(slots, 1, row(7, 0, new=5))
    run(slots, 2, row(7, 5))
    run(slots, 3, row(7, 5))
    assert slots.positions == 6
    refused = slots.place(4, [row(7, 2)])
    assert isinstance(refused, Unfit)
    assert "position 6" in refused.reason
    assert "back to 2" in refused.reason
    run(slots, 5, row(7, 0, new=3))


def reusing(sequence, slot, other, length, *, epoch=1):
    """A row that begins with so many positions of another sequence."""
    opening = Opening(length + 1, Sampling(), (0,) * length, Reuse(other, epoch, length))
    return StepRow(sequence, 1, slot, length, (0,), draw=False, opening=opening)


def test_a_row_copies_the_beginning_of_another_sequence_which_keeps_it():
    slots = Slots(SLOTS, rollback=True)
    run(slots, 1, row(7, 0, 0, new=5))
    placed = run(slots, 2, reusing(8, 1, 7, 4))
    assert placed.moves == (Move(0, 1, 4, keep=True),)
    assert placed.clear == ()
    assert slots.positions == 5 + 5
    run(slots, 3, row(7, 5, 0))


def test_a_row_in_the_slot_of_the_other_sequence_takes_it_over():
    slots = Slots(SLOTS, rollback=True)
    run(slots, 1, row(7, 0, 0, new=5))
    placed = run(slots, 2, reusing(8, 0, 7, 3))
    assert (placed.moves, placed.clear) == ((Move(0, 0, 3, keep=True),), ()), "the other two positions are given back"
    assert (slots.sequences, slots.positions) == (1, 4)
    assert slots.place(3, [row(7, 5, 0)]) is Unplaced.DEAD


def test_a_row_waits_for_the_other_sequence_until_that_is_gone():
    slots = Slots(SLOTS, rollback=True)
    reuses = reusing(8, 1, 7, 4)
    assert slots.place(3, [reuses]) is Unplaced.WAIT, "nothing has come of the other"
    run(slots, 1, row(7, 0, 0, new=2))
    assert slots.place(3, [reuses]) is Unplaced.WAIT, "two positions are missing"
    slots.free(7, 1)
    gone = slots.place(3, [reuses])
    assert isinstance(gone, Unfit)
    assert "no longer here" in gone.reason


def test_a_row_does_not_wait_for_a_later_epoch_of_the_other_sequence():
    slots = Slots(SLOTS, rollback=True)
    run(slots, 1, row(7, 0, 0, new=5, epoch=2))
    assert isinstance(slots.place(2, [reusing(8, 1, 7, 4)]), Unfit)


def test_a_kept_sequence_stays_while_others_pass():
    slots = Slots(SLOTS, rollback=True)
    run(slots, 1, row(7, 0, 0, new=5))
    run(slots, 2, row(8, 0, 1, new=5))
    assert slots.passed(100, {7}) == (1,)
    run(slots, 101, reusing(100, 2, 7, 4))
    assert slots.passed(100) == (0,)
    assert slots.sequences == 1


def test_a_sequence_that_is_kept_does_not_stop_the_step_that_it_was_part_of():
    slots = Slots(SLOTS, rollback=True)
    run(slots, 1, row(7, 0, 0, new=5))
    run(slots, 2, row(8, 0, 2, new=3))
    assert slots.passed(8, {7}) == ()
    assert run(slots, 3, row(7, 5, 0), row(8, 3, 1)) == Placed((True, True), (Move(2, 1, 3),), (2,))


class SlotsMachine(RuleBasedStateMachine):
    """A coordinator that keeps its rules, a network that reorders and doubles steps, and a node with few slots.

    ``contents`` is what the slots of the node hold: for each position, the sequence and epoch that computed it. A step
    that ran must have found exactly what its rows continue. ``texts`` is what each epoch of a sequence holds, as far as
    its steps were sent: positions that it has taken from another one belong to that one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots(SLOTS, rollback=True)
        self.contents: list[tuple[tuple[int, int], ...]] = [()] * SLOTS
        self.texts: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        self.number = 0
        self.live: dict[int, tuple[int, int, int]] = {}  # epoch, slot and sent length of each sequence
        self.kept: dict[int, tuple[int, int, int]] = {}  # epoch, slot and computed length of each one that has ended
        self.taken: dict[int, tuple[int, int]] = {}  # the kept one whose slot a live one takes over, until that begins
        self.astray: set[int] = set()  # kept ones that a step in flight was to move: the node may lose them
        self.network: list[tuple[int, tuple[StepRow, ...]]] = []
        self.parked: deque[tuple[int, tuple[StepRow, ...]]] = deque()
        self.done: dict[tuple[int, int], int] = {}  # the length that each epoch of a sequence has computed
        self.leaving: dict[int, set[int]] = {}  # slots that a step in flight leaves or holds
        self.forgets: list[tuple[int, int]] = []  # what the node was told to forget, and has not heard yet

    def next(self) -> int:
        self.number += 1
        return self.number

    def held(self) -> set[int]:
        return {slot for _, slot, _ in self.live.values()} | {s for slots in self.leaving.values() for s in slots}

    def free(self) -> list[int]:
        """The slots that no live sequence has and no step in flight holds; those that are kept are the last."""
        kept = {slot for _, slot, _ in self.kept.values()}
        return sorted(set(range(SLOTS)) - self.held(), key=lambda slot: (slot in kept, slot))

    def take(self, slot: int) -> None:
        """Keep nobody in a slot that another sequence gets."""
        for sequence in [sequence for sequence, (_, at, _) in self.kept.items() if at == slot]:
            self.forgets.append((sequence, self.kept.pop(sequence)[0]))

    def send(self, rows: tuple[StepRow, ...], also: set[int] = frozenset()) -> None:
        step = self.next()
        self.leaving[step] = {row.slot for row in rows} | also
        self.network.append((step, rows))
        for one in rows:
            who = (one.sequence, one.epoch)
            self.texts[who] = self.texts.get(who, ())[: one.start] + (who,) * len(one.tokens)

    def abandon(self) -> None:
        """Steps whose rows have all ended hold their slots no longer."""
        for step, rows in [*self.network, *self.parked]:
            if self.is_abandoned(rows):
                self.leaving.pop(step, None)

    def is_abandoned(self, rows: tuple[StepRow, ...]) -> bool:
        """Whether nobody waits for a step with these rows."""
        return all(self.live.get(one.sequence, (0,))[0] != one.epoch for one in rows)

    @precondition(lambda self: self.free())
    @rule(new=st.integers(1, 3))
    def open(self, new) -> None:
        slot, sequence = self.free()[0], self.next()
        self.take(slot)
        self.live[sequence] = (1, slot, new)
        self.send((row(sequence, 0, slot, new=new),))

    @precondition(lambda self: self.free() and any(length for *_, length in [*self.live.values(), *self.kept.values()]))
    @rule(data=st.data(), new=st.integers(1, 2))
    def open_alike(self, data, new) -> None:
        donors = self.live | {sequence: one for sequence, one in self.kept.items() if one[2]}
        donor = data.draw(st.sampled_from(sorted(donors)))
        epoch, place, most = donors[donor]
        length = data.draw(st.integers(1, most))
        slot = data.draw(st.sampled_from(self.free()))
        sequence = self.next()
        if donor in self.kept and place == slot:
            self.taken[sequence] = donor, epoch
            del self.kept[donor]
        self.take(slot)
        self.texts[sequence, 1] = self.texts[donor, epoch][:length]
        self.live[sequence] = (1, slot, length + new)
        opening = Opening(length + 1, Sampling(), (0,) * length, Reuse(donor, epoch, length))
        self.send((StepRow(sequence, 1, slot, length, tuple(range(new)), True, opening),), {place})

    @precondition(lambda self: self.live)
    @rule(data=st.data(), new=st.integers(1, 2))
    def go_on(self, data, new) -> None:
        by_slot = sorted((slot, sequence) for sequence, (_, slot, _) in self.live.items())
        first = data.draw(st.integers(0, len(by_slot) - 1))
        rows, slot = [], by_slot[first][0]
        for at, sequence in by_slot[first:]:
            if at != slot:
                break
            epoch, _, length = self.live[sequence]
            rows.append(row(sequence, length, at, epoch=epoch, new=new))
            self.live[sequence] = (epoch, at, length + new)
            slot += 1
        self.send(tuple(rows))

    @precondition(lambda self: self.live and self.free())
    @rule(data=st.data(), beside=st.booleans())
    def move(self, data, beside) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.live)))
        slot = data.draw(st.sampled_from(self.free()))
        epoch, source, length = self.live[sequence]
        self.take(slot)
        self.live[sequence] = (epoch, slot, length + 1)
        rows = [row(sequence, length, slot, epoch=epoch)]
        for other, (its, at, so_far) in list(self.live.items()):
            if beside and at == slot + 1:  # the same step has a row that does not move
                self.live[other] = (its, at, so_far + 1)
                rows.append(row(other, so_far, at, epoch=its))
        self.send(tuple(rows), {source})

    @precondition(lambda self: self.live and self.free())
    @rule(data=st.data())
    def replay(self, data) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.live)))
        slot = data.draw(st.sampled_from(self.free()))
        self.begin_again(sequence, slot)

    def begin_again(self, sequence: int, slot: int) -> None:
        epoch, _, length = self.live[sequence]
        self.take(slot)
        self.leave(sequence, epoch)
        self.live[sequence] = (epoch + 1, slot, length)
        self.abandon()
        self.send((row(sequence, 0, slot, epoch=epoch + 1, new=length),))

    def leave(self, sequence: int, epoch: int) -> None:
        """A sequence, and the one whose slot it was to take over, are to be forgotten."""
        self.forgets.append((sequence, epoch))
        if (taken := self.taken.pop(sequence, None)) is not None:
            self.forgets.append(taken)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data, keep) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.live)))
        epoch, slot, _ = self.live.pop(sequence)
        on_way = {step for step, rows in [*self.network, *self.parked] if sequence in {one.sequence for one in rows}}
        length = self.done.get((sequence, epoch), 0)
        if keep and length and len(on_way) <= 1:  # as many as a sequence has that decodes
            self.kept[sequence] = (epoch, slot, length)
            if self.contents[slot][:length] != self.texts[sequence, epoch][:length]:
                self.astray.add(sequence)
        else:
            self.leave(sequence, epoch)
        self.abandon()

    @precondition(lambda self: self.forgets)
    @rule()
    def forget(self) -> None:
        self.clear(self.slots.free(*self.forgets.pop(0)))
        self.try_parked()

    @rule()
    def pass_(self) -> None:
        while self.forgets:  # which were sent before on the same link
            self.forget()
        kept = {*self.kept, *(sequence for sequence, _ in self.taken.values())}
        self.clear(self.slots.passed(min([*self.live, self.number + 1]), kept))
        self.try_parked()

    @precondition(lambda self: self.network)
    @rule(data=st.data(), twice=st.booleans())
    def arrive(self, data, twice) -> None:
        at = data.draw(st.integers(0, len(self.network) - 1))
        step = self.network[at] if twice else self.network.pop(at)
        if step[0] not in {number for number, _ in self.parked}:  # the node joins by number
            self.parked.append(step)
        self.try_parked()

    def try_parked(self) -> None:
        tried = True
        while tried:
            tried = bool(sum(self.try_one(step, rows) for step, rows in list(self.parked)))

    def try_one(self, step: int, rows: tuple[StepRow, ...]) -> bool:
        placed = self.slots.place(step, rows)
        if placed is Unplaced.WAIT:
            return False
        self.parked.remove((step, rows))
        if isinstance(placed, Placed):
            self.compute(step, rows, placed)
        elif isinstance(placed, Unfit):
            self.refused(step, rows)
        else:
            assert placed is Unplaced.DEAD
        if all(number != step for number, _ in self.network):
            self.leaving.pop(step, None)
        return isinstance(placed, Placed)

    def compute(self, step: int, rows: tuple[StepRow, ...], placed: Placed) -> None:
        before = list(self.contents)
        for move in placed.moves:
            self.contents[move.target] = before[move.source][: move.length]
        for slot in placed.clear:
            self.contents[slot] = ()
        for one, live in zip(rows, placed.live, strict=True):
            if live:
                who = (one.sequence, one.epoch)
                end = one.start + len(one.tokens)
                assert self.contents[one.slot] == self.texts[who][: one.start]
                self.contents[one.slot] = self.texts[who][:end]
                self.done[who] = end
                if one.opening is not None and one.epoch == self.live.get(one.sequence, (0,))[0]:
                    self.taken.pop(one.sequence, None)
            else:
                self.contents[one.slot] = ((0, 0),)
        self.clear(self.slots.ran(step, rows, placed))

    def refused(self, step: int, rows: tuple[StepRow, ...]) -> None:
        """Only a sequence whose donor the coordinator has given up is refused; it begins again."""
        self.network = [sent for sent in self.network if sent[0] != step]
        self.leaving.pop(step, None)
        if self.is_abandoned(rows):
            return
        assert len(rows) == 1, self.slots.place(step, rows)
        (one,) = rows
        reuse = one.opening.reuse
        if reuse.sequence not in self.astray:
            assert self.live.get(reuse.sequence, (0,))[0] != reuse.epoch
            assert reuse.sequence not in self.kept
            assert self.taken.get(one.sequence, (0,))[0] != reuse.sequence
        epoch, slot, length = self.live.pop(one.sequence)
        if free := self.free():
            self.live[one.sequence] = epoch, slot, length
            self.begin_again(one.sequence, free[0])
        else:
            self.leave(one.sequence, epoch)
            self.abandon()

    def clear(self, slots: tuple[int, ...]) -> None:
        for slot in slots:
            self.contents[slot] = ()

    @invariant()
    def the_table_and_the_contents_agree(self) -> None:
        assert self.slots.positions == sum(len(content) for content in self.contents)
        assert self.slots.sequences == sum(bool(content) for content in self.contents)

    def teardown(self) -> None:
        """When all has arrived, no step of a live sequence waits; what is kept is there; at last nothing is left."""
        for _ in range(100):
            self.parked.extend(step for step in self.network if step not in self.parked)
            self.network = []
            self.try_parked()
            while self.forgets:
                self.forget()
            if not (self.network or self.forgets or self.parked):
                break
        assert not self.parked
        self.clear(self.slots.passed(min([*self.live, self.number + 1]), set(self.kept)))
        lengths = [length for _, _, length in self.live.values()]
        for sequence in self.kept.keys() - self.astray:
            epoch, slot, length = self.kept[sequence]
            assert self.contents[slot][:length] == self.texts[sequence, epoch][:length]
        assert self.slots.positions >= sum(lengths)
        assert self.slots.sequences <= len(self.live) + len(self.kept)
        self.clear(self.slots.passed(self.number + 1))
        assert self.contents == [()] * SLOTS


SlotsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_slots_under_any_order = SlotsMachine.TestCase
