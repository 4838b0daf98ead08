"""The sequences of one loaded model: which of them run, what states they have, and which request is next. Pure.

    request              a turn in the line of its sequence
    join                 it stands behind those that came earlier
    begin                it is the first: the states that it continues from, or none where it starts the sequence
    keep                 it was answered: its states are those of the sequence, or the sequence has ended
    leave                whatever happened: the next turn is the first

A request that leaves without ``keep`` has failed, and the sequence is as it was before. So a sequence runs from the
first start that was answered to the end that was answered. A start while it runs replaces its states.

    state        event                                to
    not running  keep of a start                      running
    running      keep                                 running, with new states
    running      keep of an end                       not running
    running      idle for too long, or model unloaded not running

All times are given by the caller, in nanoseconds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import Array
from runtime.errors import Busy
from runtime.gateway.protocol.inference import SequencePlace

States = Mapping[str, Array]
"""The states of a sequence, by the names of the inputs that take them."""


@dataclass
class Room:
    """The room for the sequences of all models of a server, and what is taken of it.

    Attributes:
        most: Most sequences that run.
        most_bytes: Most bytes of their states.
        taken: Sequences that run or are being started.
        taken_bytes: Bytes of the states of running sequences, and of the initial states of those being started.
    """

    most: int = 1024
    most_bytes: int = 1 << 30
    taken: int = 0
    taken_bytes: int = 0

    def check_sequences(self) -> None:
        """Check that one more sequence may run.

        Raises:
            Busy: There are too many.
        """
        if self.taken >= self.most:
            raise Busy(f"{self.taken} sequences run, and --max-sequences allows {self.most}; try again later")

    def check_bytes(self, more_bytes: int) -> None:
        """Check that states may take some more bytes, or fewer if the number is negative.

        Raises:
            Busy: They would take too many.
        """
        if more_bytes > 0 and self.taken_bytes + more_bytes > self.most_bytes:
            raise Busy(
                f"the states of all sequences have {self.taken_bytes} bytes, this request needs {more_bytes} more, and "
                f"--sequence-bytes allows {self.most_bytes}; try again later"
            )


class SequenceTurn(Struct, eq=False):
    """The turn of one request in the line of its sequence.

    Attributes:
        place: The sequence, and whether the request starts or ends it.
        item: The caller's own object for this turn.
        sequences: Sequences for which the turn has taken room: 1 while it starts one.
        size_bytes: Bytes for which it has taken room.
    """

    place: SequencePlace
    item: Any = None
    sequences: int = 0
    size_bytes: int = 0


@dataclass(eq=False)
class _Line:
    """One sequence.

    Attributes:
        turns: The requests that have not left, the first of which may run.
        states: Its states; None when it does not run.
        size_bytes: Their bytes.
        left_ns: When the last request left.
    """

    turns: deque[SequenceTurn] = field(default_factory=deque)
    states: States | None = None
    size_bytes: int = 0
    left_ns: int = 0


class SequenceStates:
    """The sequences of one loaded model.

    Args:
        room: The room that they share with the sequences of other models.
        idle_ns: Time after which a sequence without requests is dropped.
        most_waiting: Most requests that wait for those before them in their sequences.

    Attributes:
        running: Number of running sequences.
        size_bytes: Bytes of their states.
        turns: Number of requests that have joined and not left.
    """

    def __init__(self, room: Room, *, idle_ns: int, most_waiting: int) -> None:
        self._room = room
        self._idle_ns = idle_ns
        self._most_waiting = most_waiting
        self._lines: OrderedDict[int | str, _Line] = OrderedDict()  # in the order in which requests last left
        self._closed = False
        self._waiting = 0
        self.running = 0
        self.size_bytes = 0
        self.turns = 0

    def join(self, place: SequencePlace, now_ns: int) -> SequenceTurn:
        """Take the last turn in the line of a sequence.

        Raises:
            Busy: Too many requests wait for those before them.
        """
        self.expire(now_ns)
        line = self._lines.get(place.id)
        if line is not None and line.turns:
            if self._waiting >= self._most_waiting:
                raise Busy(
                    f"{self._waiting} requests wait for those before them in their sequences, and --max-queue allows "
                    f"{self._most_waiting}; try again later"
                )
            self._waiting += 1
        turn = SequenceTurn(place)
        if line is None:
            line = self._lines[place.id] = _Line()
        line.turns.append(turn)
        self.turns += 1
        return turn

    def is_first(self, turn: SequenceTurn) -> bool:
        """Whether a turn is the first of its line, so that it may begin."""
        return self._line(turn).turns[0] is turn

    def begin(self, turn: SequenceTurn) -> States | None:
        """The states that the first turn of a line continues from; None where it starts the sequence.

        Raises:
            InputError: The sequence does not run, and the request does not start it.
        """
        if turn.place.start:
            return None
        states = self._line(turn).states
        if states is None:
            raise InputError(
                f"sequence {shown(turn.place.id)} is not running: it was never started, has ended, was idle for "
                f"{self._idle_ns / 1e9:g} s, or its model was reloaded; a client must specify the START flag on the "
                "first request of the sequence (sequence_start)"
            )
        return states

    def reserve(self, turn: SequenceTurn, size_bytes: int) -> None:
        """Take room for a turn that starts a sequence, before its initial states are made.

        Args:
            turn: The turn.
            size_bytes: Bytes of the initial states.

        Raises:
            Busy: There is not enough room.
        """
        line = self._line(turn)
        if line.states is None and not turn.place.end:
            self._room.check_sequences()
        more_bytes = max(0, size_bytes - line.size_bytes)
        self._room.check_bytes(more_bytes)
        turn.sequences, turn.size_bytes = int(line.states is None and not turn.place.end), more_bytes
        self._room.taken += turn.sequences
        self._room.taken_bytes += more_bytes

    def keep(self, turn: SequenceTurn, states: States, size_bytes: int) -> None:
        """Keep the states after a request that was answered, or end its sequence.

        Args:
            turn: The first turn of its line.
            states: The states.
            size_bytes: Their bytes.

        Raises:
            Busy: They have more bytes than there is room for. The sequence is as it was before.
        """
        if self._closed:
            return
        line = self._line(turn)
        if turn.place.end:
            self._end(line)
            return
        self._room.check_bytes(size_bytes - line.size_bytes - turn.size_bytes)
        self._give_back(turn)
        self._change(sequences=int(line.states is None), size_bytes=size_bytes - line.size_bytes)
        line.states, line.size_bytes = states, size_bytes

    def leave(self, turn: SequenceTurn, now_ns: int) -> SequenceTurn | None:
        """Take a turn out of its line.

        Returns:
            The turn that is the first of the line now, if this one was; otherwise None.
        """
        line = self._line(turn)
        self._give_back(turn)
        first = line.turns[0] is turn
        line.turns.remove(turn)
        self.turns -= 1
        line.left_ns = now_ns
        self._lines.move_to_end(turn.place.id)
        if line.turns:  # the first of them waited until now, or the one that leaves did
            self._waiting -= 1
            return line.turns[0] if first else None
        if line.states is None:
            del self._lines[turn.place.id]
        return None

    def expire(self, now_ns: int) -> None:
        """Drop the sequences that have been idle for too long."""
        while (due := self._oldest()) is not None and self._lines[due].left_ns + self._idle_ns <= now_ns:
            self._end(self._lines.pop(due))

    def due_ns(self) -> int | None:
        """When :meth:`expire` may have something to do; None while no sequence is idle."""
        oldest = self._oldest()
        return None if oldest is None else self._lines[oldest].left_ns + self._idle_ns

    def close(self) -> None:
        """End all sequences. Requests that have joined can leave; what they keep is forgotten."""
        for name, line in list(self._lines.items()):
            self._end(line)
            if not line.turns:
                del self._lines[name]
        self._closed = True

    def _line(self, turn: SequenceTurn) -> _Line:
        return self._lines[turn.place.id]

    def _oldest(self) -> int | str | None:
        """The sequence that has been idle for longest."""
        return next((name for name, line in self._lines.items() if not line.turns), None)

    def _end(self, line: _Line) -> None:
        if line.states is not None:
            self._change(sequences=-1, size_bytes=-line.size_bytes)
            line.states, line.size_bytes = None, 0

    def _give_back(self, turn: SequenceTurn) -> None:
        """Give back the room that a turn has taken."""
        self._room.taken -= turn.sequences
        self._room.taken_bytes -= turn.size_bytes
        turn.sequences = turn.size_bytes = 0

    def _change(self, *, sequences: int, size_bytes: int) -> None:
        """Count running sequences, and the bytes of their states, here and in the room."""
        self.running += sequences
        self.size_bytes += size_bytes
        self._room.taken += sequences
        self._room.taken_bytes += size_bytes
