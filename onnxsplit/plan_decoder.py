"""The decoder block of a plan: what a runtime must know to keep a decoder's caches on the nodes.

A *step* is one run of the model on the next tokens of one or several sequences, the *rows* of the step. A *state* is a
pair of an input and an output of the model: what a step writes to ``present``, the next step reads as ``past``. A
*control* is an input that follows from the rows of a step alone, so every node makes it for itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from onnxsplit.plan_base import Axis, Count, FileEntry, PlanStruct, Rate, StageIndex

MOST_LENGTH = 2**31 - 1
"""The largest number of positions of a sequence."""

TOKENIZER = "tokenizer.json"
"""The name of the file with a tokenizer."""

Token = Annotated[int, msgspec.Meta(ge=0, le=MOST_LENGTH)]
Length = Annotated[int, msgspec.Meta(ge=0, le=MOST_LENGTH)]

StateKind = Literal["in-place", "append", "recurrent", "window"]
"""How a step changes a state.

in-place: past and present are one buffer with room for ``max_length`` positions; a step writes its new positions only
append: present is past followed by the new positions
recurrent: present has the shape of past and replaces it
window: present replaces past and holds at most a fixed number of the latest positions
"""

Role = Literal["tokens", "mask", "positions", "past-length", "total-length", "last-index", "first-scored", "fixed"]
"""The meaning of a control. B is the number of rows, S the number of new tokens of each row.

tokens: the new tokens, [B, S]
mask: 1 for each position that a row may read, 0 for padding, [B, total], where total is the width of past plus S; for
    in-place states, the largest length of a row after the step
positions: the positions of the new tokens, counted from 0, [B, S]; or [S], where all rows have the same ones
past-length: the number of positions in each row before the step, [B] or [B, 1]; a scalar or [1] for all rows
total-length: the number of positions in each row after the step, [B] or [B, 1]; for a scalar or [1], the largest
last-index: total-length - 1
first-scored: the first of the new positions whose scores are computed; a scalar or [1]. The model's default is 0
fixed: always ``value``
"""

RowLayout = Literal["right", "left", "holes", "equal", "one"]
"""How rows of unequal length share a run.

right: every row begins at position 0 of its buffer, and what lies behind its end is not read (in-place)
left: every row ends at the end of past, and a mask hides what lies before its beginning
holes: every row begins at position 0 of a wider past, and a mask hides what lies behind its end; new positions are
    written behind the wider past
equal: only rows of one length share a run
one: a run has one row
"""

ChunkLayout = Literal["rows", "one-row", "none"]
"""Runs with more than one new token on an existing past: for several rows, for one row, or never."""


class State(PlanStruct, frozen=True, kw_only=True):
    """A pair of an input and an output that passes from step to step. Both ends belong to one stage.

    Attributes:
        past: the input.
        present: the output.
        kind: how a step changes it.
        batch_axis: the axis of the rows.
        axis: the axis of the positions; None for recurrent states.
        shape: the shape of ``past`` for one row and, along ``axis``, no position.
        capacity: the size along ``axis`` that the model demands; None for any size. For ``window``, the most positions.
        stage: the stage that reads and writes it.
        token_bytes: bytes of one position of one row; 0 for ``recurrent`` and ``window``.
        fixed_bytes: bytes of one row, whatever its length; 0 for ``in-place`` and ``append``.
    """

    past: str
    present: str
    kind: StateKind
    batch_axis: Axis
    axis: Axis | None
    shape: tuple[Count, ...]
    capacity: Length | None = None
    stage: StageIndex
    token_bytes: Count
    fixed_bytes: Count


class Control(PlanStruct, frozen=True, kw_only=True):
    """An input of the model that follows from the rows of a step; ``value`` is that of a ``fixed`` one."""

    input: str
    role: Role
    value: Annotated[int, msgspec.Meta(ge=-MOST_LENGTH, le=MOST_LENGTH)] | None = None


class Proof(PlanStruct, frozen=True, kw_only=True):
    """What the probe runs have shown.

    Attributes:
        runs: the number of runs of the whole model.
        differences: for each claim that holds, the largest difference of the compared scores, as a share of their
            scale.
        refused: for each claim that was tried and does not hold, why not.
    """

    runs: Count
    differences: dict[str, Rate]
    refused: dict[str, str] = msgspec.field(default_factory=dict)


class Decoder(PlanStruct, frozen=True, kw_only=True):
    """A model that computes the scores of the next token, with all that the nodes need to run it step by step.

    Attributes:
        states: the states.
        controls: the inputs that the nodes make for themselves. States and controls are all inputs of the model.
        scores: the output with the scores, [B, positions, vocabulary] or [B, vocabulary].
        vocabulary: the number of scores; tokens are below it, unless ``tokens_below`` says otherwise.
        tokens_below: the bound of the tokens that the model reads; None for ``vocabulary``.
        rows: how rows of unequal length share a run, as proven.
        chunk: which runs have more than one new token on an existing past, as proven.
        rollback: whether a sequence can be cut back to any shorter length: all states are ``in-place`` or ``append``.
        max_length: the most positions of a sequence.
        last_only: whether a control with the role ``first-scored`` exists.
        end_tokens: the tokens that end a text.
        text: files for the tokenizer and the chat template that were found beside the model.
        proof: the probe runs; None where the claims were given by the user and could not be run.
        cost_rows: the number of rows of the step that costs were taken at.
        cost_context: the number of positions before that step.
        cache_tokens: the positions, over all sequences, for which the stages' memory has room.
    """

    states: tuple[State, ...]
    controls: tuple[Control, ...]
    scores: str
    vocabulary: Annotated[int, msgspec.Meta(ge=1, le=MOST_LENGTH)]
    tokens_below: Length | None = None
    rows: RowLayout
    chunk: ChunkLayout
    rollback: bool
    max_length: Annotated[int, msgspec.Meta(ge=1, le=MOST_LENGTH)]
    last_only: bool = False
    end_tokens: tuple[Token, ...] = ()
    text: tuple[FileEntry, ...] = ()
    proof: Proof | None = None
    cost_rows: Count = 0
    cost_context: Count = 0
    cache_tokens: Count = 0

    def token_bytes(self, stage: int) -> int:
        """Bytes that one position of one sequence takes at a stage."""
        return sum(state.token_bytes for state in self.states if state.stage == stage)

    def fixed_bytes(self, stage: int) -> int:
        """Bytes that one sequence takes at a stage, whatever its length."""
        return sum(state.fixed_bytes for state in self.states if state.stage == stage)

    @property
    def tokenizer(self) -> FileEntry | None:
        """The tokenizer's file; None where none was found beside the model."""
        return next((entry for entry in self.text if entry.name == TOKENIZER), None)

    def pasts(self) -> frozenset[str]:
        """The inputs that are states."""
        return frozenset(state.past for state in self.states)

    def presents(self) -> frozenset[str]:
        """The outputs that are states."""
        return frozenset(state.present for state in self.states)
