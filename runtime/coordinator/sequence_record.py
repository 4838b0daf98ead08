"""The coordinator's record of one sequence: its states and its data. Pure.

    WAITING   it waits for room on a chain of nodes, at first or after the nodes of its chain were lost
    PREFILL   it has a slot, and the nodes read its prompt; in a replay, also the tokens that its caller has got
    DECODE    each step adds one token, or in an exact replay repeats one
    ENDED     its caller has got all tokens, or an error

:data:`TRANSITIONS` lists every change that is allowed; docs/states.md is drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from runtime.transition_table import Machine
from runtime.wire.messages.sequences import Sampling

if TYPE_CHECKING:
    from runtime.coordinator.chains import Chain, Group


class SequencePhase(Enum):
    """The state of a sequence."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


class SequenceChange(Enum):
    """What can happen to a sequence."""

    ADMIT = "there is room for it"
    READ = "its prompt was read again, and its text follows step by step"
    DRAW = "a token was chosen"
    REPLAY = "its nodes are lost, leave or do not answer"
    END = "it ends"


TRANSITIONS: Mapping[tuple[SequencePhase, SequenceChange], SequencePhase] = {
    (SequencePhase.WAITING, SequenceChange.ADMIT): SequencePhase.PREFILL,
    (SequencePhase.PREFILL, SequenceChange.DRAW): SequencePhase.DECODE,
    (SequencePhase.PREFILL, SequenceChange.READ): SequencePhase.DECODE,
    (SequencePhase.DECODE, SequenceChange.DRAW): SequencePhase.DECODE,
    (SequencePhase.PREFILL, SequenceChange.REPLAY): SequencePhase.WAITING,
    (SequencePhase.DECODE, SequenceChange.REPLAY): SequencePhase.WAITING,
    (SequencePhase.WAITING, SequenceChange.END): SequencePhase.ENDED,
    (SequencePhase.PREFILL, SequenceChange.END): SequencePhase.ENDED,
    (SequencePhase.DECODE, SequenceChange.END): SequencePhase.ENDED,
}


@dataclass(eq=False, slots=True)
class SequenceRecord:
    """One sequence that has not ended.

    Attributes:
        number: its number.
        history: the tokens of the prompt, and those that were chosen so far.
        prompt: the number of tokens of the prompt.
        most: the largest number of tokens that ``history`` may reach.
        sampling: how tokens are chosen.
        scores: whether the caller gets the scores of each token.
        needed_bytes: for each stage, the bytes that are reserved for it.
        machine: its state, and the changes that led there.
        epoch: the number of the attempt at it, from 1.
        chain: the nodes that have it; None while it waits.
        group: the sequences of the chain with which it steps.
        slot: where the nodes keep its states, or will after the next step.
        sent: the number of positions that steps of this epoch cover.
        steps: the numbers of the steps of this epoch that are in flight with it.
        stepped: the number of its last step.
        blamed: what happened to the nodes that were lost while they executed it, since its last token.
        suspected: whether one of its steps failed beside other rows, since its last token.
        overdue: the number of its steps that were overdue, since its last token.
        to_read: the number of tokens that this epoch reads in parts: all; in an exact replay, only the prompt.
        marks: identify the beginnings of these tokens; see :mod:`runtime.coordinator.prefixes`.
        reused: the number of positions that this epoch took from another sequence.
        taken: the sequence whose slot it took over, until nodes have run its first step.
        reuse_failed: whether it must compute all its states itself, because those of another sequence were gone.
        cached: the number of tokens of its prompt that were not computed for its first token.
    """

    number: int
    history: list[int]
    prompt: int
    most: int
    sampling: Sampling
    scores: bool
    needed_bytes: tuple[int, ...]
    machine: Machine[SequencePhase, SequenceChange]
    epoch: int = 1
    chain: Chain | None = None
    group: Group | None = None
    slot: int = -1
    sent: int = 0
    steps: set[int] = field(default_factory=set)
    stepped: int = 0
    blamed: list[str] = field(default_factory=list)
    suspected: bool = False
    overdue: int = 0
    to_read: int = 0
    marks: tuple[int, ...] = ()
    reused: int = 0
    taken: SequenceRecord | None = None
    reuse_failed: bool = False
    cached: int = 0

    @property
    def steps_alone(self) -> bool:
        """Whether its next step is one that may have failed, or ended a node, before.

        The steps that an exact replay repeats before that went well the first time.
        """
        return (self.suspected or bool(self.blamed)) and self.sent + 1 == len(self.history)

    @property
    def phase(self) -> SequencePhase:
        """The state it is in."""
        return self.machine.state

    @property
    def has_read_prompt(self) -> bool:
        """Whether its prompt was read again for an exact replay, and its text was not begun."""
        return self.phase is SequencePhase.PREFILL and self.sent == self.prompt and not self.steps
