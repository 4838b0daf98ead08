"""The command ``onnxsplit generate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxsplit.cli.help import OptionTable, add_options, under
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, make_command, milliseconds
from onnxsplit.cli.running import keywords, running_options, tracing_options, write_trace
from onnxsplit.cli.sampling import SAMPLING, STOP, TEXT, check_text, sampling, shown_text, speeds, text_of
from onnxsplit.cli.values import TokensParam
from onnxsplit.errors import InputError

if TYPE_CHECKING:
    from runtime.requests.generation import Generated, Generation
    from runtime.text.generation import GeneratedText, TextGeneration

_MOST_BYTES = 64 << 20  # of a prompt on standard input
_PROMPT: OptionTable = [
    (
        ("--tokens",),
        {"type": TokensParam(), "metavar": "N,N,...", "help": "The tokens to continue, instead of TEXT."},
    ),
    (("--chat",), {"is_flag": True, "help": "Answer TEXT as a message, by the model's chat template."}),
]


@make_command
@PLAN
@click.argument("text", required=False)
@add_options(under(TEXT, _PROMPT))
@add_options(STOP)
@add_options(SAMPLING)
@running_options
@tracing_options
def command(
    output: Output, *, plan: Path, text: str | None, tokens: tuple[int, ...] | None, chat: bool, **values: Any
) -> None:
    """Start the nodes of the plan in DIR, continue TEXT, print what comes, and stop the nodes.

    TEXT - is read from standard input. Options that are not given are the model's own (generation_config.json). With
    --tokens, the sequence is given and printed as the numbers of its tokens. The plan must have a decoder.
    """
    from runtime import Pipeline

    if (text is None) == (tokens is None):
        raise click.UsageError(
            "give either TEXT or --tokens: what is to be continued; TEXT - is read from standard input"
        )
    given = sampling(values)
    if tokens is not None and (chat or "stop" in given):
        raise click.UsageError("--chat and --stop are for a TEXT, not for --tokens")
    prompt = _stdin() if text == "-" else text or ""
    if tokens is None:
        check_text(plan)
    options = keywords(output, values)
    output.say("starting nodes")
    result: Generated | GeneratedText
    with Pipeline.launch(plan, **options) as pipeline:
        if tokens is not None:
            with pipeline.generate(tokens, **given) as generation:
                output.done()
                result = _print_tokens(output, generation)
        else:
            texts = text_of(pipeline)
            begun = (
                texts.chat([{"role": "user", "content": prompt}], **given) if chat else texts.complete(prompt, **given)
            )
            with begun:
                output.done()
                result, generation = _print_text(output, begun), begun.generation
        times_ns = generation.times_ns[: len(result.tokens)]
    write_trace(output, pipeline, values["trace"])
    _show(output, result, generation.submitted_ns, times_ns)


def _stdin() -> str:
    data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"standard input has more than {_MOST_BYTES} bytes; give a shorter text")
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _print_tokens(output: Output, generation: Generation) -> Generated:
    """Print the tokens as they come."""
    with _own_line(output):
        for number, token in enumerate(generation):
            output.piece(f"{' ' if number else ''}{token}")
    return generation.result()


def _print_text(output: Output, generation: TextGeneration) -> GeneratedText:
    """Print the text as it comes."""
    on_terminal = sys.stdout.isatty()
    with _own_line(output):
        for piece in generation:
            output.piece(shown_text(piece.text, on_terminal=on_terminal))
    return generation.result()


@contextmanager
def _own_line(output: Output) -> Iterator[None]:
    """End the line that is printed in the ``with`` block, so that a message about an error has a line of its own."""
    try:
        yield
    finally:
        output.piece("\n")


def _show(output: Output, result: Generated | GeneratedText, submitted_ns: int, times_ns: tuple[int, ...]) -> None:
    usage, first_s, per_s = result.usage, *speeds(submitted_ns, times_ns)
    if result.logprobs is not None:
        output.line()
        rows = [
            (f"{one.token}", f"{one.logprob:.4f}", ", ".join(f"{token} {value:.4f}" for token, value in one.top) or "-")
            for one in result.logprobs
        ]
        output.table(("token", "logprob", "most probable"), rows, may_go=("most probable", "logprob"))
    text, stop = getattr(result, "text", None), getattr(result, "stop", None)
    why = "a stop string" if isinstance(stop, str) else "an end token"
    why = why if result.reason == "stop" else "the largest number of tokens"
    output.line(
        f"\n{usage.completion} tokens after {usage.prompt}, ended by {why}. First token after "
        f"{milliseconds(first_s * 1e9)}, then {per_s:.1f} tokens/s. Seed {result.seed}."
    )
    output.result(
        {
            **({} if text is None else {"text": text, "stop": stop}),
            "tokens": result.tokens,
            "reason": result.reason,
            "usage": result.usage,
            "seed": result.seed,
            "logprobs": result.logprobs,
            "first_token_s": first_s,
            "tokens_per_s": per_s,
        }
    )
