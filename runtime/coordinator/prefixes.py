"""Finds sequences of a chain whose states a new sequence can begin with. Pure.

Two texts that begin alike have the same states there, if nodes computed them in the same runs. Prompts are read in
*parts* of one length. So a sequence takes whole parts from another one, its *donor*: a sequence of the chain, or one
that has ended and whose slot is *kept*. Nodes copy them (:class:`~runtime.wire.messages.sequences.Reuse`).

Every text has a *mark* for each of its parts: a hash of all tokens up to its end. A table of marks finds the longest
common beginning in as many look-ups as the prompt has parts. Tokens are compared after that, so two texts with equal
hashes do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequence_record import SequenceRecord
from runtime.wire.messages.sequences import MOST_REUSED


def marks_of(tokens: Sequence[int], part: int) -> tuple[int, ...]:
    """For each whole part of a text, the hash of all tokens up to its end."""
    marks, mark = [], 0
    for stop in range(part, min(len(tokens), MOST_REUSED) + 1, part):
        mark = hash((mark, *tokens[stop - part : stop]))
        marks.append(mark)
    return tuple(marks)


class Prefixes:
    """The beginnings of texts that the sequences of one chain have computed, or will.

    Args:
        limits: the limits of sequences.

    Attributes:
        kept: for each slot, the sequence that has ended and is kept in it; the one that was used last is the last.
    """

    def __init__(self, limits: SequenceLimits) -> None:
        self.kept: dict[int, SequenceRecord] = {}
        self._limits = limits
        self._known: dict[int, dict[SequenceRecord, None]] = {}  # the sequences with each mark

    def add(self, sequence: SequenceRecord) -> None:
        """A sequence has come to the chain, and will read its text in parts."""
        for mark in sequence.marks:
            self._known.setdefault(mark, {})[sequence] = None

    def remove(self, sequence: SequenceRecord) -> None:
        """The states of a sequence are going to be lost."""
        for mark in sequence.marks:
            known = self._known[mark]
            del known[sequence]
            if not known:
                del self._known[mark]

    def keep(self, sequence: SequenceRecord) -> None:
        """Keep a sequence that has ended, and that was removed; :attr:`.SequenceRecord.sent` positions are there."""
        parts = sequence.sent // self._limits.chunk
        if self._limits.reuses_text:
            sequence.marks = marks_of(sequence.history[: sequence.sent], self._limits.chunk)
        sequence.marks = sequence.marks[:parts]
        self.add(sequence)
        self.kept[sequence.slot] = sequence

    def drop(self, sequence: SequenceRecord) -> None:
        """Keep a sequence no longer."""
        del self.kept[sequence.slot]
        self.remove(sequence)

    def donor(self, sequence: SequenceRecord, *, sent: bool = True) -> tuple[SequenceRecord | None, int]:
        """The sequence with the longest common beginning, and the number of its positions; None and 0 if there is none.

        At least one token of the text remains to be read.

        Args:
            sequence: the sequence that begins.
            sent: whether the steps that compute these positions must have been sent.
        """
        part = self._limits.chunk
        if sequence.reuse_failed:
            return None, 0
        for parts in range(min(len(sequence.marks), (sequence.to_read - 1) // part), 0, -1):
            length = parts * part
            for other in self._known.get(sequence.marks[parts - 1], ()):
                is_there = other.sent >= length if sent else other is not sequence
                if is_there and other.history[:length] == sequence.history[:length]:
                    return other, length
        return None, 0

    def use(self, sequence: SequenceRecord) -> None:
        """Note that a kept sequence was used."""
        if self.kept.get(sequence.slot) is sequence:
            self.kept[sequence.slot] = self.kept.pop(sequence.slot)
