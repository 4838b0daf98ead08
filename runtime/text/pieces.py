"""The text of a sequence as it comes. Pure.

tokens ----> Detokenizer ----> StopStrings ----> TextPiece
             holds back        holds back what may
             broken UTF-8      become a stop string

"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from runtime.requests.generation import TokenLogprob


class TextPiece(Struct, frozen=True):
    """New text of a sequence. The pieces of a sequence together are its whole text; the last one has a reason.

    Attributes:
        text: the new text; empty where all of it is held back. It never changes afterwards.
        tokens: the tokens that were read since the last piece. The end token that ended the text is among them,
            although the text does not contain it.
        logprobs: the probabilities of these tokens; None if they were not asked for.
        reason: why the text has ended; None if it continues. ``stop`` for an end token or a stop string, ``length`` for
            the largest number of tokens.
        stop: the stop string, or the number of the end token, that ended the text; None otherwise.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    reason: Literal["stop", "length"] | None = None
    stop: str | int | None = None
