"""The text of tokens that come one by one. Pure.

A vocabulary has one of two forms:

    bytes   each token is some bytes of UTF-8 (byte-level BPE: GPT, Llama 3, Qwen). The bytes of all tokens are joined.
    words   each token is some characters, whose form may depend on the token before: a space between words, none before
            the first. Some vocabularies have a token ``<0xNN>`` for each byte, too (Llama 2, Gemma): several together
            are a character.

Both hold back a character that is not complete. A byte that belongs to no character becomes U+FFFD.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

_BROKEN = "\ufffd"
_MOST_HELD = 4  # tokens of a character
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Detokenizer(Protocol):
    """The text of the tokens of one sequence. All that it returns, joined, is the text that they have together."""

    def add(self, token: int) -> str:
        """Add a token; returns the new text that is complete."""

    def finish(self) -> str:
        """There are no more tokens; returns what was held back."""


class Vocabulary(Protocol):
    """The text of single tokens."""

    def token_bytes(self, number: int) -> bytes:
        """The bytes that one token adds to a text that it does not begin."""

    def detokenizer(self, skipped: Collection[int]) -> Detokenizer:
        """A detokenizer, which leaves out some tokens."""


class ByteTokens:
    """A vocabulary whose tokens are bytes.

    Args:
        token: a token as the vocabulary writes it, with a printable character for each byte; empty for none.
    """

    def __init__(self, token: Callable[[int], str]) -> None:
        self._token = token
        self._known: dict[int, bytes] = {}

    def token_bytes(self, number: int) -> bytes:
        """The bytes of a token. One with other characters than those for bytes, a special token, stands for itself."""
        known = self._known.get(number)
        if known is None:
            text = self._token(number)
            known = bytes(map(_BYTE_OF.__getitem__, text)) if _BYTE_OF.keys() >= set(text) else text.encode()
            self._known[number] = known
        return known

    def detokenizer(self, skipped: Collection[int]) -> Detokenizer:
        """A detokenizer, which leaves out some tokens."""
        return _OfBytes(self, skipped)


class _OfBytes:
    def __init__(self, vocabulary: ByteTokens, skipped: Collection[int]) -> None:
        self._token_bytes = vocabulary.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Add a token; returns the new text that is complete."""
        return "" if token in self._skipped else self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """There are no more tokens; returns what was held back."""
        return self._decoder.decode(b"", final=True)


class WordTokens:
    """A vocabulary whose tokens are characters, some of them perhaps bytes.

    Args:
        token: a token as the vocabulary writes it; empty for a number without a token.
        decode: the text of some tokens, special ones included.
        has_bytes: whether tokens such as ``<0xE4>`` are bytes.
    """

    def __init__(self, token: Callable[[int], str], decode: Callable[..., str], *, has_bytes: bool) -> None:
        self._token = token
        self._decode = decode
        self._has_bytes = has_bytes

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        return self._decode(tokens, skip_special=False)

    def text_after(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that some tokens add to that of tokens before them."""
        return self.text([*before, *tokens])[len(self.text(before)) :]

    def byte(self, number: int) -> int | None:
        """The byte that a token stands for; None for other tokens."""
        found = _BYTE.match(self._token(number)) if self._has_bytes else None
        return None if found is None else int(found[1], 16)

    def has(self, number: int) -> bool:
        """Whether there is a token of this number."""
        return self._token(number) != ""

    def token_bytes(self, number: int) -> bytes:
        """The bytes that one token adds to a text that it does not begin."""
        if not self.has(number):
            return b""
        byte = self.byte(number)
        return self.text_after([number], [number]).encode() if byte is None else bytes((byte,))

    def detokenizer(self, skipped: Collection[int]) -> Detokenizer:
        """A detokenizer, which leaves out some tokens."""
        return _OfWords(self, skipped)


class _OfWords:
    """Decodes each token behind the last one with text, so that it gets the form that it has in the whole text.

    The library decodes adjoining bytes together: if they are not UTF-8, each becomes U+FFFD. So does this class, except
    for characters that it has given out before the byte that breaks them came.
    """

    def __init__(self, vocabulary: WordTokens, skipped: Collection[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._before: list[int] = []  # the last tokens with text
        self._held: list[int] = []  # those of a character that is not complete
        self._bytes = b""  # of these
        self._is_broken = False  # whether the adjoining bytes so far are not UTF-8

    def add(self, token: int) -> str:
        """Add a token; returns the new text that is complete."""
        if token in self._skipped or not self._vocabulary.has(token):
            return ""
        byte = self._vocabulary.byte(token)
        if byte is not None:
            return self._add_byte(token, byte)
        broken = self._end_of_bytes()
        self._held.append(token)
        text = self._vocabulary.text_after(self._before, self._held)
        if text.endswith(_BROKEN) and len(self._held) < _MOST_HELD:
            return broken
        return broken + self._given(text)

    def finish(self) -> str:
        """There are no more tokens; returns what was held back."""
        broken = self._end_of_bytes()
        return broken + self._given(self._vocabulary.text_after(self._before, self._held))

    def _add_byte(self, token: int, byte: int) -> str:
        if self._held and not self._bytes:  # of other tokens
            return self.finish() + self._add_byte(token, byte)
        if self._is_broken:
            return _BROKEN
        self._held.append(token)
        self._bytes += bytes((byte,))
        try:
            text = codecs.utf_8_decode(self._bytes, "strict", False)[0]
        except UnicodeDecodeError:
            self._is_broken = True
            return self._drop_bytes()
        if not text:
            return ""
        self._bytes = b""
        return self._given(self._vocabulary.text_after(self._before, self._held))

    def _given(self, text: str) -> str:
        """The tokens that were held back have this text."""
        if text or not self._before:
            self._before = self._held
        self._held = []
        return text

    def _end_of_bytes(self) -> str:
        """No byte follows; returns what an incomplete character becomes."""
        self._is_broken = False
        return self._drop_bytes() if self._bytes else ""

    def _drop_bytes(self) -> str:
        broken, self._bytes = _BROKEN * len(self._bytes), b""
        self._before = self._before or self._held
        self._held = []
        return broken


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: GPT-2's table.

    Printable characters of Latin-1 stand for themselves. The others are numbered from U+0100.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
