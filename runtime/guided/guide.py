"""Guides the text of a sequence by a grammar; the only module that imports llguidance.

    caller      check_grammar      a grammar that cannot be used is refused before anything is sent
    last stage  GuidedTokenizer    made once, while the stage is loaded
                  guide(grammar)   one for each sequence: which tokens may follow

With 49,152 tokens, a guide for a usual JSON schema takes 0.6 ms to make, and 0.06 ms a token. The library works within
limits: of the hostile grammars in the tests, the worst took 0.2 s to make and 0.7 s in one step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsplit.errors import InputError, MissingDependency, ModelError, one_line, shown, without_panics
from runtime.guided.bounds import grammar_problem

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

INSTALL = "pip install 'onnxsplit[guided]'"

_LIMITS = {
    "initial_lexer_fuel": 100_000,  # about 10 ms for each of a few definitions
    "step_lexer_fuel": 200_000,  # about 15 ms
    "step_max_items": 20_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 25_000,  # about 50 MB
    "max_grammar_size": 10_000,
    "verbose_errors": False,
}
_MOST_REASON = 300


class GrammarError(ModelError):
    """Raised when a text cannot follow its grammar: the grammar is too large, or cannot be used with the tokenizer."""


Allowed = np.ndarray[Any, np.dtype[np.bool_]]


def is_installed() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


def check_grammar(grammar: str) -> None:
    """Refuse a grammar that cannot be used. A grammar that was checked lately costs nothing.

    Args:
        grammar: the JSON of ``LLMatcher.grammar_from_json_schema`` and the like, or a grammar in llguidance's dialect
            of Lark.

    Raises:
        InputError: it is none, or it is too large.
        MissingDependency: llguidance is not installed.
    """
    if not isinstance(grammar, str):
        raise InputError(f"grammar must be a text, not {shown(grammar)}")
    _require()
    problem = _problem(grammar)
    if problem:
        raise InputError(f"the grammar cannot be used: {problem}")


def regex_grammar(regex: str) -> str:
    """The grammar of texts that a regular expression matches as a whole; it is not checked.

    Raises:
        MissingDependency: llguidance is not installed.
    """
    _require()
    from llguidance import LLMatcher

    inner = regex.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", inner):  # a dollar that is not escaped
        inner = inner[:-1]
    return LLMatcher.grammar_from_regex(inner)


def lark_grammar(text: str) -> str:
    """A grammar in Lark's form, from one in Lark's or in GBNF (``root ::= ...``); it is not checked.

    Raises:
        InputError: it cannot be read.
        MissingDependency: llguidance is not installed.
    """
    _require()
    if problem := grammar_problem(text):
        raise InputError(f"the grammar cannot be used: {problem}")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:  # the parser raises errors of many kinds, RecursionError among them
        raise InputError(f"the grammar cannot be read: {one_line(error, _MOST_REASON)}") from error


def _require() -> None:
    if not is_installed():
        raise MissingDependency(f"a grammar needs one more package: {INSTALL}")


@lru_cache(maxsize=64)
def _problem(grammar: str) -> str:
    """Why a grammar cannot be used; empty if it can, apart from what only a tokenizer shows."""
    if problem := grammar_problem(grammar):
        return problem
    from llguidance import LLMatcher

    try:
        with without_panics(_failure):
            is_error, found = LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    except ModelError as error:
        return str(error)
    return _short(found[0]) if is_error else ""


class GuidedTokenizer:
    """The tokenizer of a model, as grammars need it. It takes up to a second to make, and holds the interpreter.

    Args:
        data: the content of ``tokenizer.json``.
        end_tokens: the tokens that end a text.

    Raises:
        ModelError: it is not a tokenizer.
    """

    def __init__(self, data: bytes, end_tokens: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        try:
            text = data.decode().strip()
        except UnicodeDecodeError as error:
            raise ModelError(f"tokenizer.json is not UTF-8: {error}") from error
        if not text.startswith("{"):  # the library takes any other text for the name of a file
            raise ModelError("tokenizer.json does not hold a JSON object")
        try:
            with without_panics(_failure):
                self._tokenizer = LLTokenizer(text, eos_token=list(end_tokens) or None)
        except ModelError:  # an end token that the tokenizer does not have is not in its texts either
            with without_panics(_failure):
                self._tokenizer = LLTokenizer(text)
        self._ends = np.array(self._tokenizer.eos_tokens, np.int64)

    def guide(self, grammar: str) -> GrammarGuide:
        """What a new text may hold.

        Raises:
            GrammarError: the grammar cannot be used.
        """
        from llguidance import LLMatcher

        if problem := grammar_problem(grammar):
            raise GrammarError(f"the grammar cannot be used: {problem}")
        with without_panics(_failure):
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {_short(matcher.get_error())}")
        return GrammarGuide(matcher, self._ends)


class GrammarGuide:
    """The tokens that may follow in one text."""

    def __init__(self, matcher: LLMatcher, ends: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._matcher = matcher
        self._ends = ends

    def follow(self, tokens: Sequence[int]) -> None:
        """Note the next tokens of the text.

        Raises:
            GrammarError: the grammar does not allow them.
        """
        with without_panics(_failure):
            followed = self._matcher.consume_tokens(list(tokens))
        if not followed:
            raise GrammarError(f"the text does not match its grammar: {_short(self._matcher.get_error())}")

    def back(self, count: int) -> None:
        """Forget the last tokens of the text."""
        with without_panics(_failure):
            self._matcher.rollback(count)

    def allowed(self, below: int) -> tuple[Allowed, bool]:
        """The tokens that may follow, for each token below a bound, and whether the text may end here.

        Tokens that end a text are not among the tokens.

        Raises:
            GrammarError: the grammar is too large to say.
        """
        with without_panics(_failure):
            bits = self._matcher.compute_bitmask()
            may_end = self._matcher.is_accepting()
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed further: {_short(self._matcher.get_error())}")
        known = np.unpackbits(np.frombuffer(bits, np.uint8), count=min(below, 8 * len(bits)), bitorder="little")
        allowed = np.zeros(below, np.bool_)
        allowed[: len(known)] = known
        allowed[self._ends[self._ends < below]] = False
        return allowed, may_end


@cache
def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(**_LIMITS)  # type: ignore[arg-type]


def _short(reason: str) -> str:
    return " ".join(reason.replace("<non-verbose/>", "").split())[:_MOST_REASON]


def _failure(error: BaseException) -> GrammarError:
    return GrammarError(f"llguidance failed: {one_line(error, _MOST_REASON)}")
