r"""The pieces of texts as chunks of a stream, or as one answer. Pure.

    TextPiece ----> StreamedChat, StreamedCompletion ----> b"data: {chunk}\n\n" ...
              ----> chat_choice, completion_choice ------> a choice of the answer

Pieces without text wait for the next one with text, so that chunks always bring some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from runtime.gateway.openai.logprobs import Characters, TokenBytes, chat_logprobs, completion_logprobs
from runtime.gateway.openai.objects import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    CompletionChoice,
    CompletionObject,
    PromptDetails,
    TokenUsage,
)
from runtime.gateway.openai.tool_calls import ToolCalls, joined_calls
from runtime.text.pieces import TextPiece

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""

_encode = msgspec.json.Encoder().encode


def event(document: object) -> bytes:
    """A document as an event of a stream."""
    return b"data: %b\n\n" % _encode(document)


def usage(prompt: int, completion: int, cached: int | None = None) -> TokenUsage:
    """The numbers of tokens; ``cached`` of the prompt's are those that were not computed, once that is known."""
    details = UNSET if cached is None else PromptDetails(cached)
    return TokenUsage(prompt, completion, prompt + completion, details)


class AnswerForm(Struct, frozen=True, kw_only=True):
    """What all choices and chunks of an answer share.

    Attributes:
        id: the answer's own name.
        created: when it was asked for, in seconds since the epoch.
        model: the model, as the client calls it.
        fingerprint: names what completes the texts; it is another one where the same seed may give another text.
        chat: whether it answers a conversation.
        token_bytes: gives the bytes of a token, for logprobs.
        include_usage: whether the stream ends with the numbers of tokens.
        continuous_usage: whether every chunk has them.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    chat: bool
    token_bytes: TokenBytes
    include_usage: bool = False
    continuous_usage: bool = False

    def usage_of(self, prompt: int, completion: int) -> TokenUsage | UnsetType | None:
        """The numbers of tokens for a chunk with text."""
        if self.continuous_usage:
            return usage(prompt, completion)
        return None if self.include_usage else UNSET

    def document(self, kind: Callable[..., T], choices: Sequence[object], numbers: TokenUsage | UnsetType | None) -> T:
        """An answer or a chunk of it."""
        return kind(self.id, self.created, self.model, self.fingerprint, choices, numbers)

    def usage_event(self, numbers: TokenUsage) -> bytes:
        """The event with the numbers of tokens, and no text."""
        kind = ChatChunk if self.chat else CompletionObject
        return event(self.document(kind, [], numbers))


def _stop_reason(piece: TextPiece, ends: frozenset[int]) -> str | int | UnsetType:
    """What ended the text, unless it is one of the model's own end tokens."""
    return UNSET if piece.stop is None or piece.stop in ends else piece.stop


def _joined(pieces: Sequence[TextPiece]) -> TextPiece:
    """Several pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    last = pieces[-1]
    logprobs = [one for piece in pieces for one in piece.logprobs or ()]
    return TextPiece(
        text="".join([piece.text for piece in pieces]),
        tokens=tuple([token for piece in pieces for token in piece.tokens]),
        logprobs=tuple(logprobs) if any(piece.logprobs is not None for piece in pieces) else None,
        reason=last.reason,
        stop=last.stop,
    )


class _Held:
    """Holds pieces back until one has text or is the last one."""

    def __init__(self) -> None:
        self._pieces: list[TextPiece] = []
        self.tokens = 0

    def add(self, pieces: Sequence[TextPiece]) -> TextPiece | None:
        """Add pieces; returns all that are held, as one, or None where they bring no text yet."""
        self.tokens += sum([len(piece.tokens) for piece in pieces])
        self._pieces += pieces
        if pieces[-1].reason is None and not any(piece.text for piece in pieces):
            return None
        held, self._pieces = self._pieces, []
        return _joined(held)


class StreamedChat:
    """The chunks of one answer of a conversation.

    Args:
        form: what the chunks share.
        index: which of the answers of the request.
        prompt: the number of tokens of the prompt.
        ends: the model's own end tokens.
        calls: finds calls of tools in the text; None where there are none.
    """

    def __init__(
        self, form: AnswerForm, index: int, prompt: int, ends: frozenset[int], calls: ToolCalls | None = None
    ) -> None:
        self._form = form
        self._index = index
        self._prompt = prompt
        self._ends = ends
        self._calls = calls
        self._held = _Held()
        self._begun = False

    def add(self, pieces: Sequence[TextPiece]) -> bytes:
        """Add pieces, at least one; returns the events that they make, maybe none."""
        whole = self._held.add(pieces)
        events = b""
        if not self._begun:
            self._begun = True
            events = self._chunk(ChatChunkChoice(self._index, ChatDelta(role="assistant", content="")))
        if whole is None:
            return events
        logprobs = None if whole.logprobs is None else chat_logprobs(whole.logprobs, self._form.token_bytes)
        reason, stop = whole.reason, _stop_reason(whole, self._ends)
        if self._calls is None:
            delta = ChatDelta(content=whole.text or None)
            return events + self._chunk(ChatChunkChoice(self._index, delta, logprobs, reason, stop))
        deltas = [ChatDelta(content=one) if isinstance(one, str) else ChatDelta(tool_calls=[one])
                  for one in self._calls.add(whole.text, ended=reason is not None)]  # fmt: skip
        if logprobs is not None and not deltas:
            deltas = [ChatDelta()]
        for delta in deltas:
            events += self._chunk(ChatChunkChoice(self._index, delta, logprobs))
            logprobs = None
        if reason is not None:
            why = self._calls.reason(reason)
            events += self._chunk(ChatChunkChoice(self._index, ChatDelta(), None, why, stop))
        return events

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        form = self._form
        numbers = form.usage_of(self._prompt, self._held.tokens)
        return event(form.document(ChatChunk, [choice], numbers))


class StreamedCompletion:
    """The chunks of one text.

    Args:
        form: what the chunks share.
        index: which of the texts of the request.
        prompt: the number of tokens of the prompt.
        ends: the model's own end tokens.
        echo: the text of the prompt, if the text is to begin with it.
    """

    def __init__(self, form: AnswerForm, index: int, prompt: int, ends: frozenset[int], echo: str = "") -> None:
        self._form = form
        self._index = index
        self._prompt = prompt
        self._ends = ends
        self._held = _Held()
        self._echo = echo
        self._before = Characters(len(echo))

    def add(self, pieces: Sequence[TextPiece]) -> bytes:
        """Add pieces, at least one; returns the events that they make, maybe none."""
        form = self._form
        whole = self._held.add(pieces)
        if whole is None:
            return b""
        logprobs = None
        if whole.logprobs is not None:
            logprobs = completion_logprobs(whole.logprobs, form.token_bytes, self._before)
        text, self._echo = self._echo + whole.text, ""
        choice = CompletionChoice(self._index, text, logprobs, whole.reason, _stop_reason(whole, self._ends))
        numbers = form.usage_of(self._prompt, self._held.tokens)
        return event(form.document(CompletionObject, [choice], numbers))


def chat_choice(
    form: AnswerForm,
    index: int,
    pieces: Sequence[TextPiece],
    ends: frozenset[int],
    calls: ToolCalls | None = None,
) -> ChatChoice:
    """One answer of a conversation, whole, from all its pieces. Arguments as for :class:`StreamedChat`."""
    whole = _joined(pieces)
    logprobs = None if whole.logprobs is None else chat_logprobs(whole.logprobs, form.token_bytes)
    message, reason = AnswerMessage(whole.text), str(whole.reason)
    if calls is not None:
        found = joined_calls(calls.add(whole.text, ended=True))
        message, reason = AnswerMessage(found[0], tool_calls=found[1] or UNSET), calls.reason(reason)
    return ChatChoice(index, message, logprobs, reason, _stop_reason(whole, ends))


def completion_choice(
    form: AnswerForm, index: int, pieces: Sequence[TextPiece], ends: frozenset[int], echo: str = ""
) -> CompletionChoice:
    """One text, whole, from all its pieces. Arguments as for :class:`StreamedCompletion`."""
    whole = _joined(pieces)
    logprobs = None
    if whole.logprobs is not None:
        logprobs = completion_logprobs(whole.logprobs, form.token_bytes, Characters(len(echo)))
    return CompletionChoice(index, echo + whole.text, logprobs, whole.reason, _stop_reason(whole, ends))
