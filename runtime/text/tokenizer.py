"""A tokenizer, from a file ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from onnxsplit.errors import InputError, MissingDependency, one_line

_BROKEN = "\ufffd"
_BYTES_OF_A_CHARACTER = 4


class Tokenizer:
    """Turns text into tokens and back.

    Args:
        data: the content of ``tokenizer.json``.
        name: what messages call it.

    Raises:
        InputError: it is not a tokenizer.
        MissingDependency: ``tokenizers`` is not installed.
    """

    def __init__(self, data: bytes, name: str = "tokenizer.json") -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependency("text needs more packages: pip install 'onnxsplit[text]'") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
        except BaseException as error:  # the library panics on some files
            raise InputError(f"{name} is not a tokenizer: {one_line(error, 200)}") from error

    @cached_property
    def size(self) -> int:
        """The number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The tokens of a text.

        Args:
            text: the text.
            special: whether to add the tokens that the tokenizer puts around a text, such as the one that begins it.
                The text of a chat template has them already.
        """
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special))

    def token(self, number: int) -> str:
        """One token as the vocabulary writes it; empty for a number without a token."""
        return str(self._tokenizer.id_to_token(number) or "")

    def token_bytes(self, number: int) -> bytes:
        """The bytes that one token adds to a text; of an incomplete character, too."""
        return self.decode((number,), skip_special=False).encode()

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A detokenizer for the tokens of one sequence."""
        return Detokenizer(self, skip_special=skip_special)


class Detokenizer:
    """The text of tokens that come one by one. A character that is not complete is held back.

    Args:
        tokenizer: the tokenizer.
        skip_special: whether the text leaves special tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._tokens: list[int] = []
        self._first = 0  # the tokens from here give the text before the new one its right form
        self._read = 0

    def add(self, token: int) -> str:
        """Add a token; returns the new text that is complete."""
        self._tokens.append(token)
        before, now = self._texts()
        if now.endswith(_BROKEN) and len(self._tokens) - self._read < _BYTES_OF_A_CHARACTER:
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """There are no more tokens; returns what was held back."""
        before, now = self._texts()
        self._first = self._read = len(self._tokens)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        before = decode(self._tokens[self._first : self._read], skip_special=self._skip)
        return before, decode(self._tokens[self._first :], skip_special=self._skip)
