"""A chain of nodes: which sequences it has, in which slots, and what it executes next. Pure.

A *chain* is one node of each stage. Its sequences are pinned to it, because their states lie on its nodes. They are
spread over *groups*, each with a range of slots of its own and at most one decode step in flight. With
as many groups as stages, every node has work except while the tokens of a step are on their way back. A further group
would fill that time, and make every step smaller: a step of fewer rows takes hardly less time.

    slots of a chain    | group 0         | group 1         | group 2         |
                        | a b c . . .     | d e . f . .     | g h . . . .     |
                          decoding          f is in prefill

Invariant: a step in flight holds the slots of its rows, and those that its rows were moved from. No other sequence is
given a slot that a step in flight holds. Nodes can therefore run a step of which some sequences have ended.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from onnxsplit.plan_decoder import RowLayout
from runtime.coordinator.groups import neighbouring, taken_together
from runtime.coordinator.node_record import NodeRecord
from runtime.coordinator.prefixes import Prefixes
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequence_record import SequencePhase, SequenceRecord
from runtime.wire.messages.sequences import Reuse


class Group:
    """The sequences of a chain that step together.

    Attributes:
        slots: its slots.
        decoding: the sequences that decode.
        size: the number of its sequences, those in prefill included.
        step: the number of its decode step in flight; None for none.
    """

    def __init__(self, slots: range) -> None:
        self.slots = slots
        self.decoding: list[SequenceRecord] = []
        self.size = 0
        self.step: int | None = None


@dataclass(eq=False, slots=True)
class StepRecord:
    """A step in flight.

    Attributes:
        number: its number.
        chain: where it runs.
        group: the group whose decode step it is; None for a part of a prompt.
        rows: its sequences, with their epochs.
        draws: the numbers of the sequences whose next token the last stage chooses.
        tokens: the number of new tokens of each row.
        held: the slots that it holds.
        live: the number of rows that wait for it: their epoch has not ended.
        cost: its cost.
        begun_ns: when it was sent.
    """

    number: int
    chain: Chain
    group: Group | None
    rows: list[tuple[SequenceRecord, int]]
    draws: frozenset[int]
    tokens: int
    held: list[int]
    live: int
    cost: int
    begun_ns: int

    @property
    def waiting(self) -> list[SequenceRecord]:
        """The sequences that wait for it."""
        ended = SequencePhase.ENDED
        return [sequence for sequence, epoch in self.rows if sequence.epoch == epoch and sequence.phase is not ended]


class Chain:
    """One node of each stage, with the sequences that are pinned to it.

    Args:
        route: the node of each stage.
        nodes: the nodes, for the stages that run in a step.
        links: the links that a step passes.
        place: which range of slots it has on its nodes.
        limits: the limits of sequences.
        layout: which rows may share a run.

    Attributes:
        route: as given.
        nodes: as given, by number.
        links: as given.
        place: as given.
        groups: the groups.
        sequences: its sequences, in the order in which they came.
        prefixes: the beginnings of texts that new sequences can take over.
        dropped: sequences that were kept, and that nodes have to forget now.
        chunks: the number of its steps in flight that read parts of prompts.
        reading: the number of tokens in these steps.
        is_open: whether new sequences may come.
        leaves: whether one of its nodes takes no more work.
    """

    def __init__(
        self,
        route: tuple[int, ...],
        nodes: dict[int, NodeRecord],
        links: frozenset[LinkKey],
        *,
        place: int,
        limits: SequenceLimits,
        layout: RowLayout,
    ) -> None:
        self.route = route
        self.nodes = nodes
        self.links = links
        self.place = place
        first, each = place * limits.chain_slots, limits.group_slots
        self.groups = [Group(range(first + each * i, first + each * (i + 1))) for i in range(limits.groups)]
        self.sequences: dict[SequenceRecord, None] = {}
        self.prefixes = Prefixes(limits)
        self.dropped: list[SequenceRecord] = []
        self.chunks = 0
        self.reading = 0
        self.is_open = True
        self.leaves = False
        self._limits = limits
        self._layout = layout
        self._stages = len(nodes)
        self._owners: dict[int, SequenceRecord] = {}
        self._held: dict[int, int] = {}  # for each slot, the number of steps in flight that hold it
        self._prompts: list[tuple[bool, int, SequenceRecord]] = []  # parts of them were not sent yet; in order

    @property
    def identities(self) -> tuple[bytes, ...]:
        """The identities of the control links of those of its nodes that were not lost."""
        return tuple(node.identity for number, node in self.nodes.items() if node.number == number and node.identity)

    @property
    def decodes(self) -> bool:
        """Whether any of its sequences decodes."""
        return any(group.decoding for group in self.groups)

    @property
    def has_rows(self) -> bool:
        """Whether it may have another sequence, as soon as no step in flight holds a slot for that."""
        return len(self.sequences) < self._limits.rows

    # Slots

    def _is_free(self, slot: int) -> bool:
        return slot not in self._owners and slot not in self._held

    def vacancy(self) -> tuple[Group, int] | None:
        """The group that the next sequence joins, and its slot there; None when there is no room.

        It is one of the smallest groups. Slots that are kept for others count as free. They are taken when these groups
        have no empty slot, and the one that was not used for the longest time comes first.
        """
        if not self.has_rows:
            return None
        age = {slot: place for place, slot in enumerate(self.prefixes.kept)}
        best: tuple[tuple[int, int], Group, int] | None = None
        for group in self.groups:
            free = [slot for slot in group.slots if self._is_free(slot)]
            if not free:
                continue
            last = max((slot for slot in group.slots if slot in self._owners), default=-1)
            slot = min(free, key=lambda slot: (age.get(slot, -1), slot < last))
            rank = group.size, age.get(slot, -1)
            if best is None or rank < best[0]:
                best = rank, group, slot
        return None if best is None else best[1:]

    def hold(self, slots: list[int]) -> None:
        """A step that holds these slots is sent."""
        for slot in slots:
            self._held[slot] = self._held.get(slot, 0) + 1

    def let_go(self, slots: list[int]) -> None:
        """A step that held these slots has come back, or will never."""
        for slot in slots:
            if self._held[slot] == 1:
                del self._held[slot]
            else:
                self._held[slot] -= 1

    # Sequences

    def add(self, sequence: SequenceRecord) -> None:
        """Take in a sequence; there is a :meth:`vacancy`. It may take over the slot of its donor."""
        vacancy = self.vacancy()
        assert vacancy is not None
        sequence.chain = self
        sequence.group, sequence.slot = vacancy
        sequence.sent = sequence.reused = 0
        self._take_over(sequence)
        self.drop_kept([sequence.slot])
        assert sequence.group is not None
        sequence.group.size += 1
        self._owners[sequence.slot] = sequence
        self.sequences[sequence] = None
        self.prefixes.add(sequence)
        insort(self._prompts, (sequence.epoch == 1, sequence.number, sequence))

    def _take_over(self, sequence: SequenceRecord) -> None:
        """Give a sequence the slot of its donor, if that is kept, and has nothing else that others could use."""
        donor, length = self.prefixes.donor(sequence)
        if donor is None or self.prefixes.kept.get(donor.slot) is not donor:
            return
        self.prefixes.use(donor)
        is_all = len(donor.marks) * self._limits.chunk == length
        if self._is_free(donor.slot) and (is_all or donor.slot == sequence.slot):
            sequence.group = next(group for group in self.groups if donor.slot in group.slots)
            sequence.slot, sequence.taken, sequence.reused = donor.slot, donor, length
            self.prefixes.drop(donor)

    def drop_kept(self, slots: Iterable[int]) -> None:
        """Keep no ended sequences in these slots."""
        for slot in slots:
            if (kept := self.prefixes.kept.get(slot)) is not None:
                self.prefixes.drop(kept)
                self.dropped.append(kept)

    def remove(self, sequence: SequenceRecord) -> None:
        """Remove a sequence, which has ended or goes to other nodes."""
        group = sequence.group
        assert group is not None
        group.size -= 1
        if sequence.phase is SequencePhase.DECODE:
            group.decoding.remove(sequence)
        elif (entry := (sequence.epoch == 1, sequence.number, sequence)) in self._prompts:
            self._prompts.remove(entry)
        del self._owners[sequence.slot]
        del self.sequences[sequence]
        self.prefixes.remove(sequence)
        sequence.chain = sequence.group = None
        if sequence.taken is not None:  # nodes may have either of the two in its slot
            self.dropped.append(sequence.taken)
            sequence.taken = None

    def begin_decode(self, sequence: SequenceRecord) -> None:
        """A sequence has its first token, or in a replay its prompt: it joins its group at that group's next step."""
        assert sequence.group is not None
        sequence.group.decoding.append(sequence)

    def balance(self, group: Group) -> None:
        """Let rows of a group that has no step in flight go to a group that has two fewer, or still fewer."""
        while group.decoding:
            smallest = min(self.groups, key=lambda other: other.size)
            if smallest.size + 2 > group.size:
                return
            sequence = max(group.decoding, key=lambda row: row.slot)
            group.decoding.remove(sequence)
            group.size -= 1
            smallest.decoding.append(sequence)
            smallest.size += 1
            sequence.group = smallest

    # Steps

    def next_rows(self, group: Group) -> tuple[list[SequenceRecord], list[int]]:
        """The rows of a group's next step, by slot, and the slots that the step holds. The rows get their slots.

        A sequence whose last step failed, or ran on a node when it was lost, takes that step alone the next time.
        """
        waiting = sorted(group.decoding, key=lambda row: (row.stepped, row.slot))
        waiting = waiting[:1] if waiting[0].steps_alone else [row for row in waiting if not row.steps_alone]
        rows = [waiting[i] for i in taken_together(self._layout, [row.sent for row in waiting])]
        own, free = [row.slot for row in rows], [slot for slot in group.slots if self._is_free(slot)]
        empty = [slot for slot in free if slot not in self.prefixes.kept]
        slots = neighbouring(own, empty, group.slots.start, group.slots.stop)
        if len(slots) < len(rows) and len(empty) < len(free):
            slots = neighbouring(own, free, group.slots.start, group.slots.stop)
            self.drop_kept(slots)
        held = list(slots)
        for row, slot in zip(rows, slots, strict=False):
            if slot != row.slot:
                held.append(row.slot)
                del self._owners[row.slot]
                self._owners[slot] = row
                row.slot = slot
        return sorted(rows[: len(slots)], key=lambda row: row.slot), held

    def next_prompt(self) -> SequenceRecord | None:
        """The sequence whose prompt is to be read on; None when no prompt is left, or enough are being read.

        As many steps are in flight as keep all nodes busy. While any sequence decodes, they have at most the tokens of
        one part of a prompt, so others do not wait for their tokens. That does not hold for replays, because there
        somebody waits for the next token, too.
        """
        if not self._prompts or self.chunks > self._stages:
            return None
        is_new, _, sequence = self._prompts[0]
        if is_new and self.chunks and self.decodes:
            begins = sequence.sent or sequence.reused or self.prefixes.donor(sequence)[1]
            size = min(self._limits.chunk, sequence.to_read - begins)
            if self.reading + size > self._limits.reading:
                return None
        return sequence

    def reuse(self, sequence: SequenceRecord) -> tuple[Reuse | None, list[int]]:
        """What a sequence begins with, when its first step is sent, and the further slots that this step holds."""
        donor, length = sequence.taken, sequence.reused
        if donor is None:
            donor, length = self.prefixes.donor(sequence)
        if donor is None:
            return None, []
        self.prefixes.use(donor)
        sequence.sent = sequence.reused = length
        held = [donor.slot] if donor.slot != sequence.slot else []
        return Reuse(donor.number, donor.epoch, length), held

    def next_chunk(self, sequence: SequenceRecord) -> tuple[int, int]:
        """The positions of the next part of a sequence's prompt, from the first one to before the last."""
        start, stop = sequence.sent, sequence.to_read
        sequence.sent = min(start + self._limits.chunk, stop)
        if sequence.sent == stop:
            self._prompts.remove((sequence.epoch == 1, sequence.number, sequence))
        return start, sequence.sent
