"""The events and effects of sequences, which :mod:`runtime.coordinator.events` lists with all others. Pure.

A *sequence* is a request that stays in the pipeline until its last token. A *step* is one run of the model on the next
tokens of some sequences; steps, sequences and requests are counted together.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from runtime.wire.messages.data import Visit
from runtime.wire.messages.sequences import Drawn, Sampling, StepRow

EndReason = Literal["stop", "length"]
"""Why a sequence has ended: an end token was chosen, or the largest number of tokens is reached."""


class SequenceSubmitted(Struct, frozen=True):
    """A caller asks for the continuation of a text.

    Attributes:
        number: the sequence's number.
        prompt: the tokens that the caller gave; at least one.
        max_tokens: the most tokens to add; at least one. With the prompt, they fit the length of a slot.
        sampling: how tokens are chosen.
        scores: whether the caller gets the scores of each token.
        wait: whether it may wait for room; otherwise it is refused with :class:`~runtime.errors.Busy`.
        deadline_ns: its deadline by the host's monotonic clock; None for none.
        now_ns: the host's monotonic clock.
    """

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    scores: bool
    wait: bool
    deadline_ns: int | None
    now_ns: int


class StepReturned(Struct, frozen=True):
    """The last stage has executed a step, and has chosen these tokens. ``history`` lists the stages it passed."""

    step: int
    drawn: tuple[Drawn, ...]
    history: tuple[Visit, ...]
    now_ns: int


SequenceEvent = SequenceSubmitted | StepReturned


class EnterStep(Struct, frozen=True):
    """Send a step to the stages that begin it.

    Attributes:
        step: its number; its attempt is 1.
        view: the view of the pipeline in which it begins.
        cost: in thousandths of the step that the plan was made for.
        route: the node of each stage.
        rows: the rows.
        scores: whether the last stage returns the scores too.
    """

    step: int
    view: int
    cost: int
    route: tuple[int, ...]
    rows: tuple[StepRow, ...]
    scores: bool


class Emit(Struct, frozen=True):
    """Give the caller of a sequence its next token; so many tokens of its prompt were not computed for it."""

    sequence: int
    drawn: Drawn
    cached: int = 0


class Finish(Struct, frozen=True):
    """End a sequence; its caller has got all tokens."""

    sequence: int
    reason: EndReason


SequenceEffect = EnterStep | Emit | Finish
