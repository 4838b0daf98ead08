"""Decides which sequences run on which chain of nodes, and sends their steps. Pure.

Sequences wait in one queue. Those that ran before and lost their nodes come first; the others follow in the order in
which they came. Nobody overtakes: as long as there is no room for the first, the others wait. A sequence is admitted
when all bytes that it can reach are free on the nodes of a chain, so no sequence ever has to make room for another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection

from onnxsplit.plan import Plan
from runtime.balance.policies import UNIT_COST
from runtime.coordinator.chain_table import ChainTable
from runtime.coordinator.chains import Chain, Group, StepRecord
from runtime.coordinator.events import Effects
from runtime.coordinator.links import DeadLinks
from runtime.coordinator.numbers import Numbers
from runtime.coordinator.prefixes import marks_of
from runtime.coordinator.roster import Roster
from runtime.coordinator.sequence_events import EnterStep
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequence_record import SequenceChange, SequencePhase, SequenceRecord
from runtime.coordinator.step_table import StepTable
from runtime.timings import Timings
from runtime.topology import StepGraph
from runtime.wire.messages.sequences import Opening, StepRow


class Scheduler:
    """The queue of sequences, the chains, and the steps in flight.

    Args:
        plan: the plan, which has a decoder.
        roster: the nodes.
        links: the dead links.
        effects: collects the steps to send.
        numbers: numbers the steps.
        limits: the limits of sequences.
        timings: when a step counts as lost.

    Attributes:
        chains: the chains.
        steps: the steps in flight.
        now_ns: the time of the last event, by the host's monotonic clock.
        reused_tokens: the number of tokens that sequences did not read, because others had read them.
    """

    def __init__(
        self,
        plan: Plan,
        roster: Roster,
        links: DeadLinks,
        effects: Effects,
        numbers: Numbers,
        *,
        limits: SequenceLimits,
        timings: Timings,
    ) -> None:
        assert plan.decoder is not None
        self.chains = ChainTable(StepGraph(plan), len(plan.stages), roster, links, limits, plan.decoder.rows, effects)
        self.steps = StepTable(timings)
        self.now_ns = 0
        self._roster = roster
        self._effects = effects
        self._numbers = numbers
        self._limits = limits
        self.reused_tokens = 0
        self._cost_rows = max(1, plan.decoder.cost_rows)
        self._queue: list[tuple[bool, int, SequenceRecord]] = []
        self._changed: dict[Chain, None] = {}  # the chains that may have something to send

    @property
    def waiting(self) -> int:
        """The number of sequences that wait for room."""
        return len(self._queue)

    def taken(self, stage: int, numbers: Collection[int]) -> float:
        """The share of the bytes for states that is reserved on some nodes of a stage, from 0 to 1.

        It is 1 where the first sequence that waits has no room on any of them.
        """
        most, used = self._limits.cache_bytes, [self.chains.used_bytes(number) for number in numbers]
        if self._queue and all(each + self._queue[0][2].needed_bytes[stage] > most for each in used):
            return 1.0
        return min(1.0, sum(used) / (most * max(1, len(used))))

    # Sequences

    def wait(self, sequence: SequenceRecord) -> None:
        """Put a sequence into the queue."""
        sequence.to_read = sequence.prompt if self._limits.exact else len(sequence.history)
        if self._limits.reuses:
            sequence.marks = marks_of(sequence.history[: sequence.to_read], self._limits.chunk)
        insort(self._queue, (sequence.epoch == 1, sequence.number, sequence))

    def remove(self, sequence: SequenceRecord, *, keep: bool = False) -> tuple[bytes, ...]:
        """Take a sequence away from the queue or from its chain, before its state changes.

        Args:
            sequence: the sequence.
            keep: whether to keep its states for others, if it decodes and they are worth it.

        Returns:
            the identities of the nodes that have to forget it.
        """
        if sequence.phase is SequencePhase.WAITING:
            entry = (sequence.epoch == 1, sequence.number, sequence)
            del self._queue[bisect_left(self._queue, entry)]
            return ()
        chain = sequence.chain
        assert chain is not None
        identities = self.chains.remove(sequence, keep=keep and sequence.phase is SequencePhase.DECODE)
        self.steps.abandon(sequence)
        self._changed[chain] = None
        return identities

    def _admit(self) -> None:
        """Admit sequences in order, until there is no room for the first."""
        while self._queue:
            sequence = self._queue[0][2]
            chain = self.chains.room_for(sequence)
            if chain is None:
                return
            del self._queue[0]
            sequence.machine.go(SequenceChange.ADMIT)
            self.chains.add(chain, sequence)
            self._changed[chain] = None

    # Steps

    def take_back(self, number: int) -> StepRecord | None:
        """Remove a step that is no longer in flight, so that its chain can go on; None when it was removed before."""
        step = self.steps.end(number)
        if step is not None:
            self._changed[step.chain] = None
        return step

    def step_on(self, sequence: SequenceRecord, change: SequenceChange) -> None:
        """Let a sequence step with its group, if it does not yet, because a token was chosen or its prompt was read."""
        if sequence.phase is SequencePhase.PREFILL:
            assert sequence.chain is not None
            sequence.chain.begin_decode(sequence)
        sequence.machine.go(change)

    def measure(self, step: StepRecord, now_ns: int) -> None:
        """Note when a step came back."""
        self.now_ns = now_ns
        self.steps.returned(step, now_ns)

    def go_on(self) -> None:
        """Admit sequences, and send all steps that can be sent."""
        self._admit()
        for chain in self._changed:
            if chain not in self.chains:
                continue
            for group in chain.groups:
                if group.step is None:
                    chain.balance(group)
            for group in chain.groups:
                if group.step is None and group.decoding:
                    self._decode(chain, group)
            while (sequence := chain.next_prompt()) is not None:
                self._read(chain, sequence)
        self._changed.clear()

    def _decode(self, chain: Chain, group: Group) -> None:
        """Send the next decode step of a group."""
        sequences, held = chain.next_rows(group)
        rows = []
        for sequence in sequences:
            start, history = sequence.sent, sequence.history
            draw = start + 1 == len(history)
            rows.append(StepRow(sequence.number, sequence.epoch, sequence.slot, start, (history[start],), draw))
            sequence.sent += 1
        self._send(chain, group, sequences, tuple(rows), held)

    def _read(self, chain: Chain, sequence: SequenceRecord) -> None:
        """Send the next part of a prompt."""
        begins = sequence.sent == 0
        reuse, held = chain.reuse(sequence) if begins else (None, [])
        start, stop = chain.next_chunk(sequence)
        self.reused_tokens += start if begins else 0
        reused = tuple(sequence.history[:start])
        row = StepRow(
            sequence=sequence.number,
            epoch=sequence.epoch,
            slot=sequence.slot,
            start=start,
            tokens=tuple(sequence.history[start:stop]),
            draw=stop == len(sequence.history),
            opening=Opening(sequence.prompt, sequence.sampling, reused, reuse) if begins else None,
        )
        self._send(chain, None, [sequence], (row,), [sequence.slot, *held])

    def _send(
        self,
        chain: Chain,
        group: Group | None,
        sequences: list[SequenceRecord],
        rows: tuple[StepRow, ...],
        held: list[int],
    ) -> None:
        number, new = self._numbers.next(), len(rows[0].tokens)
        draws = frozenset([row.sequence for row in rows if row.draw])
        cost = max(1, UNIT_COST * len(rows) * new // self._cost_rows)
        pairs = [(sequence, sequence.epoch) for sequence in sequences]
        self.steps.begin(StepRecord(number, chain, group, pairs, draws, new, held, len(rows), cost, self.now_ns))
        scores = any(sequence.scores and sequence.number in draws for sequence in sequences)
        self._effects.on_requests.append(EnterStep(number, self._roster.view, cost, chain.route, rows, scores))
