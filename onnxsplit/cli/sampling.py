"""The options of the commands that continue texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import OptionTable, under
from onnxsplit.cli.running import parameter_names
from onnxsplit.cli.values import NumberParam, TokensParam
from onnxsplit.numbers import MOST_SECONDS, MOST_SIZE

if TYPE_CHECKING:
    from runtime import Pipeline
    from runtime.text.text import Text

TEXT = "The text"
"""The heading of options about the text that is continued."""

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


STOP: OptionTable = under(
    TEXT,
    [
        (
            ("--stop",),
            {"multiple": True, "metavar": "TEXT", "help": "Ends the text, which does not contain it. Repeatable."},
        ),
    ],
)
SAMPLING: OptionTable = under(
    TEXT,
    [
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
            {
                "type": NumberParam(0, _MOST),
                "help": "Divides the scores. 0: the most probable token. Default: the model's own, or 0.",
            },
        ),
        (
            ("--top-k",),
            {
                "type": click.IntRange(0, MOST_SIZE),
                "help": "Number of the most probable tokens to choose from. 0: all.",
            },
        ),
        (
            ("--top-p",),
            {
                "type": NumberParam(0, 1),
                "help": "Choose from the most probable tokens that reach this probability together.",
            },
        ),
        (
            ("--min-p",),
            {
                "type": NumberParam(0, 1),
                "help": "Choose from tokens with at least this share of the largest probability.",
            },
        ),
        (
            ("--repetition-penalty",),
            {"type": NumberParam(1e-9, _MOST), "help": "Divides the scores of tokens in the text."},
        ),
        (
            ("--presence-penalty",),
            {
                "type": NumberParam(-_MOST, _MOST),
                "help": "Is subtracted from the scores of new tokens that have occurred.",
            },
        ),
        (
            ("--frequency-penalty",),
            {"type": NumberParam(-_MOST, _MOST), "help": "Is subtracted from them once for each time."},
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
        (
            ("--seed",),
            {"type": click.IntRange(0, 1 << 62), "help": "Makes the choice repeatable. Default: a random one."},
        ),
        (
            ("--min-tokens",),
            {"type": click.IntRange(0, MOST_SIZE), "help": "Number of tokens before which none is the end."},
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
    ],
)


def sampling(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options of both tables out of a command's values; returns those that were given."""
    names = [name for name in parameter_names(SAMPLING, STOP) if name in values]
    taken = {name: values.pop(name) for name in names}
    return {name: value for name, value in taken.items() if value is not None and (name != "stop" or value)}


def check_text(folder: Path) -> None:
    """Refuse a plan that has no tokenizer, before its nodes start.

    Raises:
        InputError: says what to do.
        PlanError: the plan cannot be read.
    """
    from onnxsplit.errors import InputError
    from onnxsplit.plan_files import load_plan

    decoder = load_plan(folder, check_files=False).decoder
    if decoder is None:
        raise InputError(
            f"the plan {folder} has no decoder, so it reads no text; partition the model again: the line about a "
            "decoder says why it was cut as any other model (docs/decoders.md)"
        )
    if decoder.tokenizer is None:
        raise InputError(
            f"the plan {folder} has no tokenizer.json, so it reads no text; put tokenizer.json beside the model and "
            "partition it again, or give numbers of tokens to onnxsplit generate --tokens"
        )


def text_of(pipeline: Pipeline) -> Text:
    """The text of a plan that :func:`check_text` has accepted."""
    text = pipeline.text
    assert text is not None, "the plan has a tokenizer"
    return text


def speeds(submitted_ns: int, times_ns: tuple[int, ...]) -> tuple[float, float]:
    """Seconds until the first token, and tokens per second after it; of one token alone, with it."""
    first_s = (times_ns[0] - submitted_ns) / 1e9
    rest_s = (times_ns[-1] - times_ns[0]) / 1e9
    return first_s, (len(times_ns) - 1) / rest_s if rest_s > 0 else len(times_ns) / max(first_s, 1e-9)


def shown_text(text: str, *, on_terminal: bool) -> str:
    """Text of a model as it may be printed: on a terminal, without characters that control it."""
    if not on_terminal or text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) >= 0xA0 else "\ufffd" for c in text)
