"""Parts of a :class:`~runtime.wire.messages.data.Fragment` that belong to a step of sequences.

A *step* is one run of a decoder on the next tokens of one or several sequences. It crosses the pipeline as one fragment
for each stage, and carries a :class:`StepRow` for each sequence beside the tensors. A node keeps the states of a
sequence in a *slot*. The coordinator chooses the slots: the rows of a step lie in neighbouring slots, in the order of
the rows.

A replay of a sequence has a new *epoch*. A row says at which position its tokens begin, so a node can tell whether it
holds what the row continues.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from runtime.wire.messages.base import Amount, Message

MOST_SLOTS = 1 << 16
"""The largest number of slots of a node."""

MOST_ROWS = 1024
"""The largest number of rows of a step."""

MOST_NEW_TOKENS = 1 << 16
"""The largest number of new tokens of a row."""

MOST_REUSED = 1 << 16
"""The largest number of positions that a sequence takes from another one; their tokens fit a header."""

MOST_FAILURE = 500
"""The largest number of characters that say why no token was chosen."""

MOST_GRAMMAR = 1 << 18
"""The largest number of characters of a grammar."""

MOST_TOP = 64
"""The largest number of further candidates whose logarithms of probability are returned with a token."""

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Position = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
SlotNumber = Annotated[int, msgspec.Meta(ge=0, lt=MOST_SLOTS)]
_Real = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Sampling(Message, frozen=True):
    """How the next token of a sequence is chosen from its scores.

    Attributes:
        temperature: what scores are divided by; 0 takes the largest.
        top_k: only so many of the largest scores are candidates; 0 for all.
        top_p: only the most probable tokens whose probabilities reach this sum together are candidates; 1 for all.
        min_p: only tokens with at least this share of the largest probability are candidates; 0 for all.
        repetition: scores of tokens in the prompt or the text are divided by this where positive, else multiplied; 1
            for no change.
        presence: is subtracted from the scores of tokens that are in the text after the prompt.
        frequency: is subtracted from them once for each occurrence.
        bias: pairs of a token and what is added to its score.
        seed: the key of the random numbers; the counter is the position of the token.
        logprobs: the number of further candidates to report; -1 reports no logarithms of probability at all.
        min_tokens: the number of tokens after the prompt before which ``end_tokens`` are not candidates.
        end_tokens: the tokens that end the sequence.
        grammar: what the text after the prompt must match, in the form of :mod:`llguidance` (the JSON of its
            ``LLMatcher.grammar_from_...``); empty for anything. The last stage needs the tokenizer for it.
    """

    temperature: _NotNegative = 0.0
    top_k: Amount = 0
    top_p: _Share = 1.0
    min_p: _Share = 0.0
    repetition: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1.0
    presence: _Real = 0.0
    frequency: _Real = 0.0
    bias: Annotated[tuple[tuple[Token, _Real], ...], msgspec.Meta(max_length=4096)] = ()
    seed: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] = 0
    logprobs: Annotated[int, msgspec.Meta(ge=-1, le=MOST_TOP)] = -1
    min_tokens: Position = 0
    end_tokens: Annotated[tuple[Token, ...], msgspec.Meta(max_length=4096)] = ()
    grammar: Annotated[str, msgspec.Meta(max_length=MOST_GRAMMAR)] = ""


class Reuse(Message, frozen=True):
    """The beginning of a sequence's states, which another sequence has computed on the same chain.

    The node copies these positions before it runs the row. It waits until the other sequence has that many; if the
    other is known to be gone, the row cannot run. A row in the slot of the other sequence takes the slot over, and
    nothing is copied.

    Attributes:
        sequence: the number of the other sequence. It may have ended, if the coordinator keeps its slot.
        epoch: its epoch.
        length: the number of positions.
    """

    sequence: Amount
    epoch: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
    length: Annotated[int, msgspec.Meta(ge=1, le=MOST_REUSED)]


class Opening(Message, frozen=True):
    """What a node must know about a sequence when it begins; sent with its first row.

    The first row starts at position 0, or behind the positions that it reuses.

    Attributes:
        prompt: the number of tokens that the caller gave. In a replay, later tokens of the history are text.
        sampling: how tokens are chosen.
        reused: the tokens before the row, where it reuses states of another sequence; they count for penalties.
        reuse: these states; None where the row starts at position 0.
    """

    prompt: Position
    sampling: Sampling
    reused: Annotated[tuple[Token, ...], msgspec.Meta(max_length=MOST_REUSED)] = ()
    reuse: Reuse | None = None


class StepRow(Message, frozen=True):
    """The part of one sequence in a step.

    Attributes:
        sequence: the sequence's number; sequences and requests are counted together.
        epoch: the number of the attempt at it, from 1.
        slot: where the nodes keep its states. A node that has them in another slot moves them first.
        start: the position of the first of ``tokens``.
        tokens: the new tokens. All rows of a step have the same number of them.
        draw: whether the last stage chooses the token that follows.
        opening: set in the first row of an epoch.
    """

    sequence: Amount
    epoch: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
    slot: SlotNumber
    start: Position
    tokens: Annotated[tuple[Token, ...], msgspec.Meta(min_length=1, max_length=MOST_NEW_TOKENS)]
    draw: bool
    opening: Opening | None = None


class Drawn(Message, frozen=True):
    """A token that the last stage has chosen.

    Attributes:
        sequence: the sequence.
        epoch: as in its :class:`StepRow`.
        position: the position of the token.
        token: the token.
        logprob: the natural logarithm of its probability by the model's own scores; 0 where it was not asked for.
        top: the most probable tokens, with the same of each, most probable first.
        failure: why no token could be chosen, if the text cannot follow its grammar; empty otherwise.
    """

    sequence: Amount
    epoch: Amount
    position: Position
    token: Token
    logprob: float = 0.0
    top: Annotated[tuple[tuple[Token, float], ...], msgspec.Meta(max_length=MOST_TOP)] = ()
    failure: Annotated[str, msgspec.Meta(max_length=MOST_FAILURE)] = ""


Rows = Annotated[tuple[StepRow, ...], msgspec.Meta(max_length=MOST_ROWS)]
DrawnTokens = Annotated[tuple[Drawn, ...], msgspec.Meta(max_length=MOST_ROWS)]
