"""A tokenizer, from a file ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from onnxsplit.errors import InputError, MissingDependency, one_line, shown, without_panics
from runtime.text.detokenizer import ByteTokens, Detokenizer, Vocabulary, WordTokens

_MOST_CHARACTERS = 16 << 20  # of a text to encode
_QUICK = 4096  # characters or tokens, for which the library may hold the interpreter's lock


class Tokenizer:
    """Turns text into tokens and back. While it turns a long one, other threads go on.

    Args:
        data: the content of ``tokenizer.json``.
        name: what messages call it.
        begin: the token that begins a text, ``<s>`` for example.
        add_begin: whether a prompt starts with it; None leaves this to ``tokenizer.json``.

    Raises:
        InputError: it is not a tokenizer, or it has no token ``begin`` although prompts are to start with it.
        MissingDependency: ``tokenizers`` is not installed.
    """

    def __init__(
        self, data: bytes, name: str = "tokenizer.json", *, begin: str | None = None, add_begin: bool | None = None
    ) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependency("text needs more packages: pip install 'onnxsplit[text]'") from error
        with without_panics(
            lambda error: InputError(f"{name} is not a tokenizer: {one_line(error, 200)}; put the right file there")
        ):
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
            decoder = json.loads(data).get("decoder")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._kinds = _kinds(decoder)
        self._begin = None if begin is None else self._tokenizer.token_to_id(begin)
        self._add_begin = add_begin
        if add_begin and self._begin is None:
            raise InputError(
                f"add_bos_token is set, but {name} has no token bos_token = {shown(begin)}; name one of its tokens"
            )

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

        Raises:
            InputError: it is not a text of Unicode characters, or it is too long.
        """
        if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
            size = f"one of {len(text)} characters" if isinstance(text, str) else shown(text)
            raise InputError(f"a text has at most {_MOST_CHARACTERS} characters, but this is {size}; shorten it")
        try:
            text.encode()  # the library does not say what is wrong
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text holds half of a surrogate pair at place {error.start}; allowed are whole Unicode characters"
            ) from error
        with without_panics(lambda error: InputError(f"the tokenizer cannot encode the text: {one_line(error, 200)}")):
            if len(text) <= _QUICK:
                encoding = self._tokenizer.encode(text, add_special_tokens=special)
            else:  # other threads go on meanwhile
                (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        tokens = tuple(encoding.ids)
        return self._with_begin(tokens) if special and self._add_begin is not None else tokens

    def _with_begin(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """With or without the token that begins a text, whatever ``tokenizer.json`` has added."""
        begins = self._begin is not None and tokens[:1] == (self._begin,)
        if self._add_begin and not begins:
            assert self._begin is not None, "the constructor has checked it"
            return self._begin, *tokens
        return tokens[1:] if begins and not self._add_begin else tokens

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of some tokens.

        Raises:
            InputError: the library cannot decode them.
        """
        if not tokens:  # some decoders panic
            return ""
        with without_panics(
            lambda error: InputError(f"the tokenizer cannot decode the tokens: {one_line(error, 200)}")
        ):
            if len(tokens) <= _QUICK:
                return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special))
            (text,) = self._tokenizer.decode_batch([list(tokens)], skip_special_tokens=skip_special)
        return str(text)

    def token(self, number: int) -> str:
        """One token as the vocabulary writes it; empty for a number without a token."""
        return str(self._tokenizer.id_to_token(number) or "") if 0 <= number < 1 << 32 else ""

    def token_bytes(self, number: int) -> bytes:
        """The bytes that one token adds to a text that it does not begin; of an incomplete character, too."""
        return self._vocabulary.token_bytes(number)

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A detokenizer for the tokens of one sequence."""
        return self._vocabulary.detokenizer(self._special if skip_special else frozenset())

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        if self._kinds - {"Fuse"} == {"ByteLevel"}:
            return ByteTokens(self.token)
        return WordTokens(self.token, self.decode, has_bytes="ByteFallback" in self._kinds)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)


def _kinds(decoder: Any) -> frozenset[str]:
    """The kinds of a decoder of ``tokenizer.json``: its own, or those of a sequence of decoders."""
    if not isinstance(decoder, dict):
        return frozenset()
    if decoder.get("type") == "Sequence":
        return frozenset[str]().union(*map(_kinds, decoder["decoders"]))
    return frozenset((str(decoder.get("type")),))
