"""The command ``onnxsplit chat``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from onnxsplit.cli.conversation import Conversation
from onnxsplit.cli.help import OptionTable, add_options, under
from onnxsplit.cli.model_options import PLAN
from onnxsplit.cli.output import Output, make_command
from onnxsplit.cli.running import keywords, running_options
from onnxsplit.cli.sampling import SAMPLING, STOP, TEXT, check_text, sampling, text_of
from onnxsplit.errors import InputError

_SYSTEM: OptionTable = [
    (("--system",), {"metavar": "TEXT", "help": "What the model is told before the conversation."}),
]


@make_command
@PLAN
@add_options(under(TEXT, _SYSTEM))
@add_options(STOP)
@add_options(SAMPLING)
@running_options
def command(output: Output, *, plan: Path, system: str | None, **values: Any) -> None:
    """Start the nodes of the plan in DIR, answer one message after another, and stop the nodes.

    Ctrl-C stops an answer; at the prompt, Ctrl-C and Ctrl-D end the chat, and /help lists its commands. Without a
    terminal, each line of standard input is a message. Options that are not given are the model's own
    (generation_config.json). With --json, each answer is one JSON object on a line of its own.
    """
    from runtime import Pipeline

    given = sampling(values)
    check_text(plan)
    options = keywords(output, values)
    output.say("starting nodes")
    with Pipeline.launch(plan, **options) as pipeline:
        text = text_of(pipeline)
        output.done()
        if text.template is None:
            raise InputError(
                f"the plan {plan} has no chat template; put chat_template.jinja beside the model and partition it "
                "again, or continue a text with onnxsplit generate"
            )
        assert pipeline.max_length is not None, "the plan has a decoder"
        conversation = Conversation(output, text, pipeline.max_length, system, given)
        if sys.stdin.isatty() and sys.stdout.isatty():
            conversation.on_terminal()
        else:
            conversation.from_lines()
