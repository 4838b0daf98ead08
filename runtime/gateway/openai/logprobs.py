"""Logarithms of probabilities, as the two kinds of requests report them. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

from runtime.gateway.openai.objects import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from runtime.requests.generation import TokenLogprob

_LEAST = -9999.0  # stands for minus infinity, which JSON lacks

TokenBytes = Callable[[int], bytes]
"""The bytes that a token adds to a text."""


class Characters:
    """Counts the characters of a text whose bytes come token by token. A character belongs to the token that ends it.

    Args:
        number: of those before the first token.

    Attributes:
        number: of those so far.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        """Add the bytes of a token."""
        self.number += len(self._decoder.decode(data))


def chat_logprobs(logprobs: Iterable[TokenLogprob], token_bytes: TokenBytes) -> ChatLogprobs:
    """As conversations report them."""

    def one(token: int, logprob: float) -> TopLogprob:
        data = token_bytes(token)
        return TopLogprob(_text(data), max(logprob, _LEAST), list(data))

    content = []
    for each in logprobs:
        own = one(each.token, each.logprob)
        content.append(ChatLogprob(own.token, own.logprob, own.bytes, [one(*top) for top in each.top]))
    return ChatLogprobs(content)


def completion_logprobs(
    logprobs: Iterable[TokenLogprob], token_bytes: TokenBytes, before: Characters
) -> CompletionLogprobs:
    """As completions report them.

    Args:
        logprobs: those of some tokens.
        token_bytes: gives the text of a token.
        before: the characters of the text before them; theirs are added.
    """
    found = CompletionLogprobs([], [], [], [])
    for each in logprobs:
        data = token_bytes(each.token)
        text = _text(data)
        found.text_offset.append(before.number)
        before.add(data)
        found.token_logprobs.append(max(each.logprob, _LEAST))
        found.tokens.append(text)
        tops = {_text(token_bytes(token)): max(logprob, _LEAST) for token, logprob in reversed(each.top)}
        found.top_logprobs.append({**dict(reversed(tops.items())), text: max(each.logprob, _LEAST)})
    return found


def _text(data: bytes) -> str:
    """The text of a token. Bytes of a character that it does not complete are written as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
