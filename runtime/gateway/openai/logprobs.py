"""Logarithms of probabilities, as the two kinds of requests report them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from runtime.gateway.openai.objects import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from runtime.requests.generation import TokenLogprob

_LEAST = -9999.0  # stands for minus infinity, which JSON lacks

TokenBytes = Callable[[int], bytes]
"""The bytes that a token adds to a text."""


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
    logprobs: Iterable[TokenLogprob], token_bytes: TokenBytes, offset: int
) -> tuple[CompletionLogprobs, int]:
    """As completions report them.

    Args:
        logprobs: those of some tokens.
        token_bytes: gives the text of a token.
        offset: the number of characters of the text before them.

    Returns:
        Them, and the number of characters of the text after them.
    """
    found = CompletionLogprobs([], [], [], [])
    for each in logprobs:
        text = _text(token_bytes(each.token))
        found.text_offset.append(offset)
        found.token_logprobs.append(max(each.logprob, _LEAST))
        found.tokens.append(text)
        tops = {_text(token_bytes(token)): max(logprob, _LEAST) for token, logprob in reversed(each.top)}
        found.top_logprobs.append({**dict(reversed(tops.items())), text: max(each.logprob, _LEAST)})
        offset += len(text)
    return found, offset


def _text(data: bytes) -> str:
    """The text of a token. Bytes of a character that it does not complete are written as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
