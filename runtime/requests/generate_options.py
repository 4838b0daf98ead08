"""Normalises the arguments of a generation: its tokens, its length, and how tokens are chosen. Pure.

Arguments that cannot be normalised raise :class:`~onnxsplit.errors.InputError` before anything is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict, TypeGuard

import numpy as np

from onnxsplit.arguments import check_names, option_names
from onnxsplit.errors import InputError, shown
from onnxsplit.numbers import is_real, is_whole, whole_problem
from onnxsplit.plan_decoder import Decoder
from runtime.wire.messages.sequences import MOST_GRAMMAR, MOST_TOP, Sampling

MOST_SEED = 1 << 62
"""The largest seed."""

_MOST_REAL = 1e9
_MOST_LISTED = 4096  # end tokens, and tokens with a bias
_MOST_TOP_K = 2**31 - 1


class GenerateArguments(TypedDict, total=False):
    """The attributes of :class:`GenerateOptions`, for editors and type checkers."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    min_tokens: int
    stop_tokens: Sequence[int] | None
    logprobs: int | None
    scores: bool
    grammar: str


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a sequence is to be continued.

    Attributes:
        max_tokens: the most tokens to add; None for all that the pipeline has room for.
        temperature: what the scores are divided by; 0 always takes the most probable token.
        top_k: only so many of the most probable tokens are candidates; 0 for all.
        top_p: only the most probable tokens that reach this probability together are candidates; 1 for all.
        min_p: only tokens with at least this share of the largest probability are candidates; 0 for all.
        repetition_penalty: scores of tokens that are in the sequence, prompt included, are divided by it where they are
            positive, else multiplied; 1 for no change.
        presence_penalty: is subtracted from the scores of new tokens that have occurred.
        frequency_penalty: is subtracted from them once for each time.
        logit_bias: what is added to the scores of some tokens.
        seed: makes the choice of tokens repeatable. None for a random one, which the result reports.
        min_tokens: the number of tokens before which none ends the text.
        stop_tokens: the tokens that end the sequence; it contains the one that does. None for the model's own.
        logprobs: report the probability of each token, and of so many of the most probable ones. None for neither.
        scores: whether to report the model's scores for each token.
        grammar: what the new text must match, as :mod:`runtime.text.grammars` makes it; empty for anything. Tokens
            that do not fit are never chosen, and the text ends where the grammar does.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    min_tokens: int = 0
    stop_tokens: Sequence[int] | None = None
    logprobs: int | None = None
    scores: bool = False
    grammar: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerateOptions:
        """The options of a caller.

        Raises:
            InputError: there is no option of one of the names.
        """
        check_names(options, [*option_names(cls), "timeout", "block"])
        return cls(**options)


def token_bound(decoder: Decoder) -> int:
    """The number that all tokens which the model reads are below."""
    return decoder.vocabulary if decoder.tokens_below is None else decoder.tokens_below


def normal_prompt(tokens: object, decoder: Decoder, length: int) -> tuple[int, ...]:
    """The tokens of a prompt, from a list, a tuple or an array of whole numbers.

    Args:
        tokens: what the caller gave.
        decoder: the decoder of the plan.
        length: the most positions of a sequence.

    Raises:
        InputError: they are not whole numbers, there is none, one is beyond the vocabulary, or there are too many.
    """
    if isinstance(tokens, Set):
        raise InputError(f"tokens must be a list of token numbers, in their order, but it is {shown(tokens)}")
    prompt = _tokens("tokens", tokens, token_bound(decoder))
    if not prompt:
        raise InputError("tokens is empty; a generation continues a sequence of at least one token", option="tokens")
    if len(prompt) >= length:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, but this pipeline has room for sequences of {length} tokens, at "
            f"least one of them new; shorten the prompt to {length - 1} tokens, or raise max_length or cache_bytes",
            option="tokens",
        )
    return prompt


def normal_max_tokens(max_tokens: int | None, prompt: int, length: int) -> int:
    """The most tokens to add to a prompt of so many tokens; None stands for all that have room.

    Raises:
        InputError: it is not a whole number of at least 1, or the tokens do not fit behind the prompt.
    """
    room = length - prompt
    if max_tokens is None:
        return room
    if _is_whole_within(max_tokens, 1, room):
        return int(max_tokens)
    raise InputError(
        f"max_tokens must be a whole number, at least 1 and at most {room}, not {shown(max_tokens)}: sequences have "
        f"at most {length} tokens, and the prompt has {prompt}",
        option="max_tokens",
    )


def normal_sampling(options: GenerateOptions, decoder: Decoder, max_tokens: int, seed: int) -> Sampling:
    """How tokens are chosen, as nodes are told it.

    Args:
        options: as the caller gave them.
        decoder: the decoder of the plan.
        max_tokens: the most tokens to add.
        seed: the seed where the caller gave none.

    Raises:
        InputError: some options are not allowed; the message names all of them.
    """
    problems = _problems(options, max_tokens)
    if problems:
        raise InputError("; ".join(problems.values()), option=next(iter(problems)))
    stop, below = options.stop_tokens, min(decoder.vocabulary, token_bound(decoder))
    ends = tuple(t for t in decoder.end_tokens if t < below) if stop is None else _tokens("stop_tokens", stop, below)
    if len(ends) > _MOST_LISTED:
        raise InputError(
            f"stop_tokens has {len(ends)} tokens; at most {_MOST_LISTED} are allowed", option="stop_tokens"
        )
    if options.min_tokens and len(set(ends)) == below:
        raise InputError(
            f"all {below} tokens are stop_tokens, so none can come before min_tokens = {options.min_tokens}; leave one "
            "of both out",
            option="min_tokens",
        )
    if options.grammar and not ends:
        raise InputError(
            "a grammar needs a token that ends the text, but stop_tokens is empty; leave it out", option="stop_tokens"
        )
    return Sampling(
        temperature=float(options.temperature),
        top_k=int(options.top_k),
        top_p=float(options.top_p),
        min_p=float(options.min_p),
        repetition=float(options.repetition_penalty),
        presence=float(options.presence_penalty),
        frequency=float(options.frequency_penalty),
        bias=_bias(options.logit_bias, below),
        seed=seed if options.seed is None else int(options.seed),
        logprobs=-1 if options.logprobs is None else int(options.logprobs),
        min_tokens=int(options.min_tokens),
        end_tokens=ends,
        grammar=options.grammar,
    )


def _problems(options: GenerateOptions, max_tokens: int) -> dict[str, str]:
    """What is wrong, by the names of the options."""
    scores = None if isinstance(options.scores, bool) else f"scores must be True or False, not {shown(options.scores)}"
    found: dict[str, str | None] = {
        "temperature": _real_problem("temperature", options.temperature, 0.0, _MOST_REAL),
        "top_k": whole_problem("top_k", options.top_k, 0, _MOST_TOP_K),
        "top_p": _real_problem("top_p", options.top_p, 0.0, 1.0),
        "min_p": _real_problem("min_p", options.min_p, 0.0, 1.0),
        "repetition_penalty": _real_problem("repetition_penalty", options.repetition_penalty, 1e-9, _MOST_REAL),
        "presence_penalty": _real_problem("presence_penalty", options.presence_penalty, -_MOST_REAL, _MOST_REAL),
        "frequency_penalty": _real_problem("frequency_penalty", options.frequency_penalty, -_MOST_REAL, _MOST_REAL),
        "min_tokens": whole_problem("min_tokens", options.min_tokens, 0, max_tokens),
        "scores": scores,
    }
    if not isinstance(options.grammar, str) or len(options.grammar) > MOST_GRAMMAR:
        problem = f"grammar must be a text of at most {MOST_GRAMMAR} characters, not {shown(options.grammar)}"
        found["grammar"] = problem
    if options.seed is not None:
        found["seed"] = whole_problem("seed", options.seed, 0, MOST_SEED)
    if options.logprobs is not None:
        found["logprobs"] = whole_problem("logprobs", options.logprobs, 0, MOST_TOP)
    return {name: problem for name, problem in found.items() if problem}


def _real_problem(name: str, value: object, least: float, most: float) -> str | None:
    if is_real(value) and least <= value <= most:
        return None
    return f"{name} must be a number from {least:.12g} to {most:.12g}, not {shown(value)}"


def _is_whole_within(value: object, least: int, most: int) -> TypeGuard[int]:
    return is_whole(value) and least <= value <= most


def _tokens(name: str, tokens: object, below: int) -> tuple[int, ...]:
    """Whole numbers from 0 to below a bound, from a collection or an array of one axis."""
    values = tokens.tolist() if isinstance(tokens, np.ndarray) else tokens
    if not isinstance(values, Collection) or isinstance(values, str | bytes | bytearray | Mapping):
        raise InputError(
            f"{name} must be a list of token numbers, as in [1, 2, 3], but it is {shown(tokens)}", option=name
        )
    values = list(values)
    for position, token in enumerate(values):
        if type(token) is int and 0 <= token < below:
            continue
        if not _is_whole_within(token, 0, below - 1):
            raise InputError(
                f"{name} holds {shown(token)} at place {position}; tokens of this model are whole numbers from 0 to "
                f"{below - 1}",
                option=name,
            )
        values[position] = int(token)
    return tuple(values)


def _bias(bias: object, below: int) -> tuple[tuple[int, float], ...]:
    if bias is None:
        return ()
    if not isinstance(bias, Mapping):
        raise InputError(
            f"logit_bias must map tokens to numbers, as in {{15: -100.0}}, but it is {shown(bias)}", option="logit_bias"
        )
    if len(bias) > _MOST_LISTED:
        raise InputError(f"logit_bias has {len(bias)} tokens; at most {_MOST_LISTED} are allowed", option="logit_bias")
    tokens = _tokens("logit_bias", list(bias), below)
    for token, value in bias.items():
        if (problem := _real_problem(f"logit_bias of token {token}", value, -_MOST_REAL, _MOST_REAL)) is not None:
            raise InputError(problem, option="logit_bias")
    return tuple((token, float(value)) for token, value in zip(tokens, bias.values(), strict=True))
