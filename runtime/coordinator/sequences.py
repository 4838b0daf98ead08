"""The sequences of a pipeline: admission, steps, replay and completion. Pure.

A *sequence* is a request that stays until its last token. Its tokens are computed in *steps*; a step that has come back
is followed by the next one at once. :mod:`runtime.coordinator.sequence_record` has the states of a sequence,
:mod:`runtime.coordinator.chains` decides which rows a step has, and in which slots.

Rules:

- **Exactly once.** A token reaches the caller when it was chosen in the present epoch and its position is the length of
  the sequence. Everything else is dropped.
- **Replay.** When the states of a sequence are lost, it gets a new epoch and waits for room. Then nodes read its prompt
  again, together with the tokens that its caller has got. Such sequences come before new ones. An *exact* replay reads
  only the prompt in parts, as the first time, and repeats the text step by step: some models give other scores when
  tokens are divided into runs otherwise.
- **Blame.** A sequence records each lost node that was executing one of its steps, until it has got one token further.
  The step that was running then has no other row the next time. So a sequence that kills nodes is found at its second
  node, and its neighbours are acquitted. When the number of these nodes reaches the allowed attempts, it is refused.
- **Failed steps.** A sequence whose step fails without other rows is refused. Rows of a larger step are replayed apart.
- **Room.** A sequence is admitted when all bytes that it can reach are free on the nodes of a chain. So no sequence
  ever has to make room for another. New sequences are admitted in the order in which they came.

Invariant: every sequence ends exactly once, with :class:`~runtime.coordinator.sequence_events.Finish` or with
:class:`~runtime.coordinator.events.Reject`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnxsplit.errors import InputError, OnnxsplitError
from onnxsplit.plan import Plan
from runtime.coordinator.chains import Chain
from runtime.coordinator.deadlines import Deadlines
from runtime.coordinator.events import Effects, Forget, Reject, Steps, Tick
from runtime.coordinator.links import DeadLinks
from runtime.coordinator.numbers import Numbers
from runtime.coordinator.reach import LinkKey
from runtime.coordinator.roster import Roster
from runtime.coordinator.scheduler import Scheduler
from runtime.coordinator.sequence_diagnosis import SequenceDiagnosis
from runtime.coordinator.sequence_events import Emit, EndReason, Finish, SequenceSubmitted, StepReturned
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequence_record import TRANSITIONS, SequenceChange, SequencePhase, SequenceRecord
from runtime.coordinator.step_table import STEP_ATTEMPT
from runtime.errors import Busy, Cancelled, DeadlineExceeded, NodeFailed, StageFailed
from runtime.timings import Timings
from runtime.topology import StageGraph, StepGraph
from runtime.transition_table import Machine
from runtime.wire.messages.data import AttemptKey, Failed, Step
from runtime.wire.messages.sequences import Drawn


class SequenceTable:
    """All sequences that have not ended.

    Args:
        plan: the plan, which has a decoder.
        graph: the stages.
        roster: the nodes.
        links: the dead links.
        effects: collects the effects.
        numbers: numbers the steps.
        limits: the limits of sequences.
        timings: when a step counts as lost.
        attempts: a sequence is refused after this many nodes were lost while they executed it; with 1, nothing is
            replayed.

    Attributes:
        tokens: the number of tokens that callers have got.
        replays: the number of replays.
        has_ended: whether a sequence has ended or left its nodes since this was set to False.
        deadlines: the deadlines of the sequences.
    """

    def __init__(
        self,
        plan: Plan,
        graph: StageGraph,
        roster: Roster,
        links: DeadLinks,
        effects: Effects,
        numbers: Numbers,
        limits: SequenceLimits,
        timings: Timings,
        attempts: int,
    ) -> None:
        self.tokens = 0
        self.replays = 0
        self.has_ended = False
        self._roster = roster
        self._links = links
        self._effects = effects
        self._limits = limits
        self._attempts = attempts
        scheduler = Scheduler(plan, roster, links, effects, numbers, limits=limits, timings=timings)
        self._scheduler = scheduler
        self._diagnosis = SequenceDiagnosis(graph, StepGraph(plan).stages, roster, links, limits, scheduler)
        self._sequences: dict[int, SequenceRecord] = {}
        self.deadlines = Deadlines(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    # State

    @property
    def timings(self) -> Timings:
        """When a step counts as lost; may be replaced."""
        return self._scheduler.steps.timings

    @timings.setter
    def timings(self, timings: Timings) -> None:
        self._scheduler.steps.timings = timings

    @property
    def in_flight(self) -> tuple[AttemptKey, ...]:
        """The steps in flight, each with the number of its only attempt."""
        return self._scheduler.steps.in_flight

    @property
    def waiting(self) -> int:
        """The number of sequences that wait for room."""
        return self._scheduler.waiting

    @property
    def oldest(self) -> int | None:
        """The first sequence; None when there is none."""
        return next(iter(self._sequences), None)

    @property
    def kept(self) -> tuple[int, ...]:
        """The sequences that have ended, and whose states nodes keep for others."""
        return self._scheduler.chains.kept

    @property
    def reused_tokens(self) -> int:
        """The number of tokens that sequences did not read, because others had read them."""
        return self._scheduler.reused_tokens

    def uses(self, number: int) -> bool:
        """Whether a node has sequences."""
        return any(number in chain.nodes and chain.sequences for chain in self._scheduler.chains)

    @property
    def scheduler(self) -> Scheduler:
        """The queue, the chains and the steps in flight."""
        return self._scheduler

    def is_overdue(self, now_ns: int) -> bool:
        """Whether a step has been in flight for too long."""
        return bool(self._scheduler.steps.overdue(now_ns))

    def expired(self, now_ns: int) -> tuple[tuple[int, AttemptKey], ...]:
        """The sequences whose deadline has passed, each with a step in flight; (0, 0) where none is."""
        return tuple(
            (number, (min(steps), STEP_ATTEMPT) if (steps := self._sequences[number].steps) else (0, 0))
            for number in self.deadlines.pop_expired(now_ns)
        )

    # Steps

    def submit(self, event: SequenceSubmitted) -> None:
        """Accept a sequence, and begin it if there is room."""
        scheduler, prompt = self._scheduler, len(event.prompt)
        scheduler.now_ns = event.now_ns
        problem = self._limits.problem(prompt, event.max_tokens)
        if problem is not None:
            self._effects.on_requests.append(Reject(event.number, InputError(problem)))
            return
        sequence = SequenceRecord(
            number=event.number,
            history=list(event.prompt),
            prompt=prompt,
            most=prompt + event.max_tokens,
            sampling=event.sampling,
            scores=event.scores,
            needed_bytes=self._limits.needed_bytes(prompt + event.max_tokens),
            machine=Machine(f"sequence {event.number}", TRANSITIONS, SequencePhase.WAITING),
        )
        self._sequences[event.number] = sequence
        if event.deadline_ns is not None:
            self.deadlines.add(event.deadline_ns, event.number)
        scheduler.wait(sequence)
        scheduler.go_on()
        if sequence.phase is SequencePhase.WAITING:
            if (error := self._diagnosis.unavailable()) is not None:
                self._refuse(sequence, error)
            elif not (event.wait or (scheduler.waiting == 1 and scheduler.chains.will_fit(sequence))):
                self._refuse(sequence, Busy(f"{self._diagnosis.crowd()}; try again when some have ended"))

    def returned(self, event: StepReturned) -> None:
        """Handle a step that has come back: pass its tokens on, and send the next steps."""
        step = self._scheduler.take_back(event.step)
        if step is None:
            return
        self._scheduler.measure(step, event.now_ns)
        for visit in event.history:
            self._roster.visited(visit, step.cost)
        drawn = {token.sequence: token for token in event.drawn}
        for sequence in step.waiting:
            sequence.taken = None
            if sequence.number in step.draws:
                self._take(sequence, drawn.get(sequence.number))
            elif sequence.has_read_prompt:
                self._scheduler.step_on(sequence, SequenceChange.READ)
        self._scheduler.go_on()

    def _take(self, sequence: SequenceRecord, drawn: Drawn | None) -> None:
        """Take in the next token of a sequence."""
        if drawn is None or drawn.epoch != sequence.epoch or drawn.position != len(sequence.history):
            sequence.blamed.append(reason := "its last step came back without its token")
            self._replay(sequence, reason)
            return
        if drawn.failure:
            self._refuse(sequence, InputError(drawn.failure))
            return
        if len(sequence.history) == sequence.prompt:
            sequence.cached = sequence.reused
        sequence.history.append(drawn.token)
        sequence.blamed.clear()
        sequence.suspected = False
        sequence.overdue = 0
        self.tokens += 1
        self._effects.on_requests.append(Emit(sequence.number, drawn, sequence.cached))
        self._scheduler.step_on(sequence, SequenceChange.DRAW)
        if drawn.token in sequence.sampling.end_tokens:
            self._finish(sequence, "stop")
        elif len(sequence.history) == sequence.most:
            self._finish(sequence, "length")

    def _finish(self, sequence: SequenceRecord, reason: EndReason) -> None:
        self._end(sequence, keep=True)
        self._effects.on_requests.append(Finish(sequence.number, reason))

    # What ends epochs

    def _replay(self, sequence: SequenceRecord, reason: str) -> None:
        """End an epoch of a sequence. It waits for room, or is refused when no attempts are left."""
        losses = "; ".join(dict.fromkeys(sequence.blamed))
        if self._attempts == 1:
            self._refuse(sequence, NodeFailed(f"{losses or reason}; with one attempt a sequence is not replayed"))
        elif len(sequence.blamed) >= self._attempts:
            nodes = len(sequence.blamed)
            self._refuse(sequence, NodeFailed(f"the sequence was given up after it ran on {nodes} nodes: {losses}"))
        else:
            self.replays += 1
            self._restart(sequence)

    def _restart(self, sequence: SequenceRecord) -> None:
        self.has_ended = True
        self._forget(sequence, self._scheduler.remove(sequence))
        sequence.machine.go(SequenceChange.REPLAY)
        sequence.epoch += 1
        self._scheduler.wait(sequence)

    def _forget(self, sequence: SequenceRecord, identities: tuple[bytes, ...]) -> None:
        if identities:
            self._effects.on_nodes.append(Forget(sequence.number, sequence.epoch, identities))

    def resume(self, now_ns: int) -> None:
        """Use the nodes as they are now. Sequences on nodes that leave go to other nodes, where there are any."""
        scheduler = self._scheduler
        scheduler.now_ns = now_ns
        scheduler.chains.refresh()
        if self._attempts > 1:
            for chain in scheduler.chains:
                if chain.leaves and scheduler.chains.has_other(chain):
                    self._replay_all(chain.sequences, "a node leaves")
        scheduler.go_on()

    def _replay_all(self, sequences: Iterable[SequenceRecord], reason: str) -> int:
        """Replay these sequences; returns their number."""
        found = list(sequences)
        for sequence in found:
            self._replay(sequence, reason)
        return len(found)

    def node_lost(self, number: int, called: str, reason: str, steps: Steps) -> int:
        """Replay the sequences of a lost node; :meth:`resume` begins the replays.

        Args:
            number: the node's number.
            called: the node's name in messages.
            reason: what happened to it.
            steps: how far all nodes are with all steps in flight.

        Returns:
            the number of these sequences.
        """
        for step in self._scheduler.steps:
            if steps.get((step.number, STEP_ATTEMPT), {}).get(number) is Step.RUNNING and number in step.chain.nodes:
                for sequence in step.waiting:
                    sequence.blamed.append(f"{called} {reason}")
        chains = [chain for chain in self._scheduler.chains if number in chain.nodes]
        return sum(self._break(chain, f"{called} was lost") for chain in chains)

    def _break(self, chain: Chain, reason: str) -> int:
        """Give up a chain; returns the number of its sequences."""
        self._scheduler.chains.drop(chain)
        return self._replay_all(chain.sequences, reason)

    def links_died(self, links: Iterable[LinkKey]) -> None:
        """Replay the sequences of chains with links that were just found dead; :meth:`resume` begins the replays."""
        if self._attempts == 1:
            return
        for chain in self._scheduler.chains:
            for link in chain.links.intersection(links):
                self._break(chain, self._links.stories[link])
                break

    def time_passed(self, event: Tick) -> None:
        """Replay the sequences of steps that are overdue."""
        self._scheduler.now_ns = event.now_ns
        for step in self._scheduler.steps.overdue(event.now_ns):
            since_s = (event.now_ns - step.begun_ns) / 1e9
            where = self._diagnosis.progress(event.steps.get((step.number, STEP_ATTEMPT), {}))
            for sequence in step.waiting:
                sequence.overdue += 1
            self._replay_all(step.waiting, f"nothing was heard of its step for {since_s:.0f} s: {where}")
        self._scheduler.go_on()

    def reported(self, message: Failed) -> None:
        """Handle a step that a node could not execute: refuse its only row, or replay its rows one by one.

        A sequence that began with states of another one may have failed because these were gone. It begins again, and
        computes all of them.
        """
        step = self._scheduler.steps.get(message.request)
        if step is None or message.attempt != STEP_ATTEMPT:
            return
        slot = message.stage, message.replica
        node = next((node for node in step.chain.nodes.values() if node.slot == slot), None)
        if node is None:
            return
        self._scheduler.take_back(message.request)
        node.counters.failures += 1
        told = f"{node.called} could not execute the sequence: {message.reason}"
        for sequence in step.waiting:
            if sequence.reused and sequence.phase is SequencePhase.PREFILL:
                sequence.reuse_failed = True
                self._restart(sequence)
            elif len(step.rows) == 1 or self._attempts == 1:
                self._refuse(sequence, StageFailed(told))
            else:
                sequence.suspected = True
                self._replay(sequence, told)
        self._scheduler.go_on()

    # What ends sequences

    def unsendable(self, number: int, error: OnnxsplitError) -> None:
        """End the sequences of a step that cannot be sent or read; any other number is no step in flight."""
        step = self._scheduler.take_back(number)
        if step is None:
            return
        for sequence in step.waiting:
            self._refuse(sequence, error)
        self._scheduler.go_on()

    def time_ran_out(self, number: int, steps: Mapping[int, Step]) -> None:
        """End a sequence whose deadline has passed; its error says what it was waiting for."""
        sequence = self._sequences.get(number)
        if sequence is None:
            return
        where = self._diagnosis.delay(sequence, steps)
        tokens = len(sequence.history) - sequence.prompt
        tries = f" in {sequence.epoch} attempts" if sequence.epoch > 1 else ""
        self.refuse(number, DeadlineExceeded(f"the sequence's time ran out after {tokens} tokens{tries}: {where}"))

    def refuse_hopeless(self) -> None:
        """Refuse the sequences that wait for a stage whose nodes keep failing."""
        error = self._diagnosis.unavailable()
        if error is not None:
            for sequence in [s for s in self._sequences.values() if s.phase is SequencePhase.WAITING]:
                self._refuse(sequence, error)

    def refuse(self, number: int, error: OnnxsplitError) -> None:
        """End a sequence with an error; nothing happens when it has ended."""
        sequence = self._sequences.get(number)
        if sequence is not None:
            self._refuse(sequence, error)
            self._scheduler.go_on()

    def refuse_all(self, error: OnnxsplitError) -> None:
        """End all sequences with an error."""
        for sequence in list(self._sequences.values()):
            self._refuse(sequence, error)

    def _refuse(self, sequence: SequenceRecord, error: OnnxsplitError) -> None:
        self._end(sequence, keep=isinstance(error, Cancelled))
        self._effects.on_requests.append(Reject(sequence.number, error))

    def _end(self, sequence: SequenceRecord, *, keep: bool) -> None:
        """End a sequence; ``keep`` says whether others may still use its states."""
        self._forget(sequence, self._scheduler.remove(sequence, keep=keep))
        sequence.machine.go(SequenceChange.END)
        del self._sequences[sequence.number]
        self.has_ended = True
