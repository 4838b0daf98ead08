"""Which sequence has its states in which slot of a node. Pure.

The coordinator chooses the slots; see :mod:`runtime.wire.messages.sequences`. This table says whether a step can run
now, and what has to be moved and cleared before.

    row                                        verdict
    sequence cancelled, passed, older epoch    dead; of those that have passed, kept ones are not
    slot claimed by a later step               dead
    start 0                                    live: claims the slot, and whoever was there is gone
    reuses another one, which is here          live: claims the slot, and copies the beginning of the other, or cuts it
    reuses another one, which is gone          unfit
    reuses another one, which is on its way    wait
    sequence or epoch not known here yet       wait
    start above the length                     wait: an earlier step is still on its way
    step not later than the last one           dead: the step has come twice
    start equal to the length                  live
    start below the length                     live: rolls back, where the kinds of the states allow it

A step runs whole or not at all. It waits if a row waits, and is dropped if all rows are dead. If only some rows are
dead, it runs with all rows, and the dead ones compute on whatever lies in their slots.

Rules:
    1. No two sequences share a slot.
    2. A slot keeps its states until its sequence is freed, moved or replaced by a claim. Slots without a sequence are
       cleared.
    3. A step changes nothing unless it runs.
    4. A sequence that others reuse is not changed by it, unless they take over its slot.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from msgspec import Struct

from runtime.wire.messages.sequences import Reuse, StepRow

_REMEMBERED = 1 << 16  # number of ended sequences remembered, because rows of them may still arrive


class Move(Struct, frozen=True):
    """The first ``length`` positions of a sequence go from one slot to another; with ``keep`` they stay there, too.

    Where both are the same slot, the positions behind them are cleared.
    """

    source: int
    target: int
    length: int
    keep: bool = False


class Placed(Struct, frozen=True):
    """A step can run.

    Attributes:
        live: for each row, whether it is live.
        moves: what to move first; all moves happen at once, so a slot may be left and entered.
        clear: the slots to clear after the moves.
    """

    live: tuple[bool, ...]
    moves: tuple[Move, ...] = ()
    clear: tuple[int, ...] = ()


class Unfit(Struct, frozen=True):
    """A step can never run, for this reason."""

    reason: str


class Unplaced(Enum):
    """Why a step does not run now.

    WAIT: an earlier step of one of its sequences must run first.
    DEAD: all its rows have ended.
    """

    WAIT = auto()
    DEAD = auto()


@dataclass
class _Holding:
    """A sequence that has a slot.

    Attributes:
        epoch: its epoch.
        slot: its slot.
        length: the number of positions that its states hold.
        before: the same before its last step; -1 where it was rolled back since.
        step: the number of the last step that ran.
    """

    epoch: int
    slot: int
    length: int
    before: int
    step: int


class Slots:
    """The slots of one node.

    Args:
        count: the number of slots.
        rollback: whether a sequence can be cut back to any length. Otherwise it can be cut back to the length before
            its last step only.
    """

    def __init__(self, count: int, *, rollback: bool) -> None:
        self._rollback = rollback
        self._held: dict[int, _Holding] = {}
        self._at: dict[int, int] = {}  # the sequence in each slot
        self._claims = [0] * count  # the last step that put a sequence into each slot
        self._ended: OrderedDict[int, int] = OrderedDict()  # the last epoch of each sequence that was given up
        self._oldest = 0
        self._running: frozenset[int] = frozenset()  # the slots of the step that runs
        self._later: list[int] = []  # slots to clear when it has run

    @property
    def sequences(self) -> int:
        """The number of sequences that have a slot. Thread-safe."""
        return len(self._held)

    @property
    def positions(self) -> int:
        """The number of positions that all of them hold together. Thread-safe."""
        return sum([holding.length for holding in list(self._held.values())])

    def place(self, step: int, rows: Sequence[StepRow]) -> Placed | Unplaced | Unfit:
        """Begin a step, if it can run. Call :meth:`ran` or :meth:`failed` when it has ended.

        Args:
            step: its number. A later step of a sequence has a larger number.
            rows: its rows, in neighbouring slots.
        """
        assert not self._running
        if all(self._goes_on(step, row) for row in rows):
            placed = Placed((True,) * len(rows))
        else:
            verdicts = [self._judge(step, row) for row in rows]
            unfit = next((verdict for verdict in verdicts if isinstance(verdict, Unfit)), None)
            if unfit is not None:
                return unfit
            if all(verdict is Unplaced.DEAD for verdict in verdicts):
                return Unplaced.DEAD
            if Unplaced.WAIT in verdicts:
                return Unplaced.WAIT
            live = tuple(verdict is None for verdict in verdicts)
            taken = self._taken(rows, live)
            if taken is not None:
                return taken
            placed = self._settle(step, rows, live)
        self._running = frozenset([row.slot for row in rows])
        return placed

    def ran(self, step: int, rows: Sequence[StepRow], placed: Placed) -> tuple[int, ...]:
        """Note that a step has run; returns the slots to clear."""
        for row, live in zip(rows, placed.live, strict=True):
            holding = self._held.get(row.sequence)
            if live and holding is not None and holding.epoch == row.epoch:
                holding.before = row.start
                holding.length = row.start + len(row.tokens)
                holding.step = step
        return self._end(rows, placed)

    def failed(self, rows: Sequence[StepRow], placed: Placed) -> tuple[int, ...]:
        """Note that a step could not be run: its sequences have the lengths at which it began."""
        return self._end(rows, placed)

    def _end(self, rows: Sequence[StepRow], placed: Placed) -> tuple[int, ...]:
        self._running = frozenset()
        later, self._later = self._later, []
        if all(placed.live) and not later:
            return ()
        dead = [row.slot for row, live in zip(rows, placed.live, strict=True) if not live]
        return tuple(sorted({slot for slot in (*later, *dead) if slot not in self._at}))

    def free(self, sequence: int, epoch: int) -> tuple[int, ...]:
        """Free the slot of a sequence that was given up in this epoch and all before; returns the slots to clear."""
        self._note_end(sequence, epoch)
        holding = self._held.get(sequence)
        if holding is None or holding.epoch > epoch:
            return ()
        return self._vacate([sequence])

    def _note_end(self, sequence: int, epoch: int) -> None:
        if sequence >= self._oldest:
            self._ended[sequence] = max(epoch, self._ended.get(sequence, 0))
            if len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)

    def passed(self, oldest: int, kept: Collection[int] = ()) -> tuple[int, ...]:
        """Free the slots of all sequences with a number below ``oldest``, except those that are kept for others.

        Returns:
            the slots to clear.
        """
        if oldest > self._oldest:
            self._oldest = oldest
            for sequence in [known for known in self._ended if known < oldest]:
                del self._ended[sequence]
        return self._vacate([sequence for sequence in self._held if sequence < oldest and sequence not in kept])

    def _vacate(self, sequences: Sequence[int]) -> tuple[int, ...]:
        slots = [self._held.pop(sequence).slot for sequence in sequences]
        for slot in slots:
            del self._at[slot]
        self._later += [slot for slot in slots if slot in self._running]
        return tuple([slot for slot in slots if slot not in self._running])

    def _goes_on(self, step: int, row: StepRow) -> bool:
        """Whether a row continues what lies in its slot, as nearly every row does."""
        held = self._held.get(row.sequence)
        return (
            held is not None
            and held.epoch == row.epoch
            and held.slot == row.slot
            and held.length == row.start
            and held.step < step
        )

    def _judge(self, step: int, row: StepRow) -> Unplaced | Unfit | None:
        """The verdict on a row; None for a live one."""
        held = self._held.get(row.sequence)
        if (
            (held is None and row.sequence < self._oldest)
            or row.epoch <= self._ended.get(row.sequence, 0)
            or (held is not None and row.epoch < held.epoch)
            or (held is not None and row.epoch == held.epoch and step <= held.step)
            or self._claims[row.slot] > step
        ):
            return Unplaced.DEAD
        if row.start == 0:
            return None
        if row.opening is not None and row.opening.reuse is not None:
            return self._judge_reuse(row, row.opening.reuse)
        if held is None or held.epoch < row.epoch or row.start > held.length:
            return Unplaced.WAIT
        if row.start == held.length or self._rollback or row.start == held.before:
            return None
        return Unfit(
            f"sequence {row.sequence} is at position {held.length} and cannot go back to {row.start}, because a state "
            f"of the model cannot be cut back"
        )

    def _judge_reuse(self, row: StepRow, reuse: Reuse) -> Unplaced | Unfit | None:
        """The verdict on a row that begins with states of another sequence."""
        other = self._held.get(reuse.sequence)
        if other is not None and other.epoch == reuse.epoch:
            return None if other.length >= reuse.length else Unplaced.WAIT
        is_gone = reuse.epoch <= self._ended.get(reuse.sequence, 0) or reuse.sequence < self._oldest
        if is_gone or (other is not None and other.epoch > reuse.epoch):
            return Unfit(
                f"sequence {row.sequence} begins with {reuse.length} positions of sequence {reuse.sequence}, epoch "
                f"{reuse.epoch}, which is no longer here"
            )
        return Unplaced.WAIT

    def _taken(self, rows: Sequence[StepRow], live: Sequence[bool]) -> Unfit | None:
        """A dead row must not compute on the states of another sequence."""
        for row, alive in zip(rows, live, strict=True):
            if not alive and row.slot in self._at:
                return Unfit(
                    f"the row of sequence {row.sequence}, epoch {row.epoch}, has ended, and its slot {row.slot} "
                    f"belongs to sequence {self._at[row.slot]}"
                )
        return None

    def _settle(self, step: int, rows: Sequence[StepRow], live: Sequence[bool]) -> Placed:
        """Give the live rows their slots."""
        alive = [row for row, is_live in zip(rows, live, strict=True) if is_live]
        known = {row.sequence: self._held[row.sequence] for row in alive if row.sequence in self._held}
        moves = []
        for row in alive:
            if row.opening is not None and row.opening.reuse is not None:
                donor = self._held[row.opening.reuse.sequence]
                if donor.slot != row.slot or donor.length > row.start:
                    moves.append(Move(donor.slot, row.slot, row.start, keep=True))
        left = {holding.slot for holding in known.values()}
        for slot in left:
            del self._at[slot]
        for row in alive:
            other = self._at.pop(row.slot, None)
            if other is not None:
                self._note_end(other, self._held.pop(other).epoch)
                left.add(row.slot)
        for row in alive:
            self._at[row.slot] = row.sequence
            if row.opening is not None:
                self._held[row.sequence] = _Holding(row.epoch, row.slot, row.start, -1, 0)
                self._claims[row.slot] = step
                continue
            holding = known[row.sequence]
            if holding.slot != row.slot:
                moves.append(Move(holding.slot, row.slot, row.start))
                self._claims[row.slot] = step
            if holding.length != row.start:
                holding.before = -1
            holding.slot, holding.length = row.slot, row.start
        filled = {row.slot for row in alive if row.start > 0}
        return Placed(tuple(live), tuple(moves), tuple(sorted(left - filled)))
