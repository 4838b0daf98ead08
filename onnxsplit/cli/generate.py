"""The command ``onnxsplit generate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.output import PLAN, Output, make_command, milliseconds
from onnxsplit.cli.running import (
    OptionTable,
    add_options,
    keywords,
    parameter_names,
    running_options,
    tracing_options,
    write_trace,
)
from onnxsplit.cli.values import NumberParam, TokensParam
from onnxsplit.numbers import MOST_SECONDS, MOST_SIZE

if TYPE_CHECKING:
    from runtime.requests.generation import Generated, Generation

_MOST = 1e9


def _biases(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Mapping[int, float] | None:
    biases = {}
    for text in texts:
        token, _, value = text.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not TOKEN=NUMBER", context, parameter) from None
    return biases or None


_PROMPT: OptionTable = [
    (
        ("--tokens",),
        {"type": TokensParam(), "required": True, "metavar": "N,N,...", "help": "The tokens to continue."},
    ),
]
_SAMPLING: OptionTable = [
    (
        ("--max-tokens",),
        {
            "type": click.IntRange(1, MOST_SIZE),
            "metavar": "N",
            "help": "Most tokens to add. Default: as many as the context has room for.",
        },
    ),
    (
        ("--temperature",),
        {"type": NumberParam(0, _MOST), "default": 0.0, "help": "Divides the scores. 0: the most probable token."},
    ),
    (
        ("--top-k",),
        {
            "type": click.IntRange(0, MOST_SIZE),
            "default": 0,
            "help": "Number of the most probable tokens to choose from. 0: all.",
        },
    ),
    (
        ("--top-p",),
        {
            "type": NumberParam(0, 1),
            "default": 1.0,
            "help": "Choose from the most probable tokens that reach this probability together.",
        },
    ),
    (
        ("--min-p",),
        {
            "type": NumberParam(0, 1),
            "default": 0.0,
            "help": "Choose from tokens with at least this share of the largest probability.",
        },
    ),
    (
        ("--repetition-penalty",),
        {"type": NumberParam(1e-9, _MOST), "default": 1.0, "help": "Divides the scores of tokens in the text."},
    ),
    (
        ("--presence-penalty",),
        {
            "type": NumberParam(-_MOST, _MOST),
            "default": 0.0,
            "help": "Is subtracted from the scores of new tokens that have occurred.",
        },
    ),
    (
        ("--frequency-penalty",),
        {"type": NumberParam(-_MOST, _MOST), "default": 0.0, "help": "Is subtracted from them once for each time."},
    ),
    (
        ("--logit-bias",),
        {
            "multiple": True,
            "callback": _biases,
            "metavar": "TOKEN=NUMBER",
            "help": "Is added to the score of a token. Repeatable.",
        },
    ),
    (("--seed",), {"type": click.IntRange(0, 1 << 62), "help": "Makes the choice repeatable. Default: a random one."}),
    (
        ("--min-tokens",),
        {"type": click.IntRange(0, MOST_SIZE), "default": 0, "help": "Number of tokens before which none is the end."},
    ),
    (
        ("--stop-tokens",),
        {
            "type": TokensParam(none=True),
            "metavar": "N,N,...|none",
            "help": "Tokens that end the text. Default: the model's.",
        },
    ),
    (
        ("--logprobs",),
        {
            "type": click.IntRange(0, 64),
            "metavar": "N",
            "help": "Report the probability of each token, and of the N most probable ones.",
        },
    ),
    (
        ("--timeout",),
        {
            "type": NumberParam(0, MOST_SECONDS, min_open=True),
            "metavar": "SECONDS",
            "help": "Most time until the last token.",
        },
    ),
]


@make_command
@PLAN
@add_options(_PROMPT)
@add_options(_SAMPLING)
@running_options
@tracing_options
def command(output: Output, *, plan: Path, tokens: tuple[int, ...], **values: Any) -> None:
    """Start the nodes of the plan in DIR, continue one sequence, print its new tokens as they come, and stop the nodes.

    Texts are given and printed as the numbers of their tokens. The plan must have a decoder.
    """
    from runtime import Pipeline

    sampling = {name: values.pop(name) for name in parameter_names(_SAMPLING)}
    options = keywords(output, values)
    output.say("starting nodes")
    with Pipeline.launch(plan, **options) as pipeline, pipeline.generate(tokens, **sampling) as generation:
        output.done()
        result = _stream(output, generation)
    write_trace(output, pipeline, values["trace"])
    _show(output, result)


def _stream(output: Output, generation: Generation) -> Generated:
    """Print the tokens as they come."""
    for number, token in enumerate(generation):
        output.piece(f"{' ' if number else ''}{token}")
    output.piece("\n")
    return generation.result()


def _show(output: Output, result: Generated) -> None:
    times, usage = result.times_ns, result.usage
    first_ns = times[0] - result.submitted_ns
    step_ns = (times[-1] - times[0]) / max(1, len(times) - 1)
    if result.logprobs is not None:
        output.line()
        rows = [
            (f"{one.token}", f"{one.logprob:.4f}", ", ".join(f"{token} {value:.4f}" for token, value in one.top) or "-")
            for one in result.logprobs
        ]
        output.table(("token", "logprob", "most probable"), rows)
    why = "an end token" if result.reason == "stop" else "the largest number of tokens"
    output.line(
        f"\n{usage.completion} tokens after {usage.prompt}, ended by {why}. First token after "
        f"{milliseconds(first_ns)}, then {milliseconds(step_ns)} a token. Seed {result.seed}."
    )
    output.result(
        {
            "tokens": result.tokens,
            "reason": result.reason,
            "usage": result.usage,
            "seed": result.seed,
            "logprobs": result.logprobs,
            "first_token_s": first_ns / 1e9,
            "token_s": step_ns / 1e9,
        }
    )
