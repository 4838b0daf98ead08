"""The tokens of prompts and conversations. Long work is done in threads, beside the event loop."""

from __future__ import annotations

from typing import NamedTuple

from onnxsplit.errors import InputError
from runtime.gateway.openai.errors import FieldError
from runtime.gateway.openai.options import template_messages, template_variables
from runtime.gateway.openai.protocol import ChatRequest, CompletionRequest
from runtime.gateway.threads import Workers
from runtime.text.text import Text

QUICK_CHARACTERS = 4096
"""A prompt up to this length is encoded at once."""


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        tokens: its tokens.
        text: its text, where the answer is to repeat it; otherwise empty.
    """

    tokens: tuple[int, ...]
    text: str = ""


async def completion_prompts(text: Text, request: CompletionRequest, workers: Workers) -> list[Prompt]:
    """The prompts of a completion.

    Raises:
        InputError: one cannot be used.
    """
    given = request.prompts()
    special = request.add_special_tokens is not False

    def encode() -> list[Prompt]:
        prompts = []
        for one in given:
            if isinstance(one, str):
                prompts.append(Prompt(text.encode(one, special=special), one if request.echo else ""))
            else:
                prompts.append(Prompt(tuple(one), text.tokenizer.decode(one) if request.echo else ""))
        return prompts

    return await workers.run(sum(map(len, given)) > QUICK_CHARACTERS, encode)


async def chat_prompt(text: Text, request: ChatRequest, workers: Workers) -> Prompt:
    """The prompt that a conversation is. The template runs in a thread: it may take long.

    Raises:
        InputError: the plan has no chat template, or it refuses the conversation.
    """
    template = text.template
    if template is None:
        raise FieldError("messages", "the model has no chat template, so it takes prompts only: use /v1/completions")
    messages, variables = template_messages(request.messages), template_variables(request)
    final = ""
    if request.continue_final_message:
        final = str(messages[-1]["content"]).strip()
        if messages[-1]["role"] != "assistant" or not final:
            raise FieldError(
                "continue_final_message", "continue_final_message needs a last message of the assistant with a content"
            )

    def encode() -> Prompt:
        rendered = template.render(messages, **variables)
        if final:
            place = rendered.rfind(final)
            if place < 0:
                raise InputError("the chat template changes the last message, so it cannot be continued")
            rendered = rendered[: place + len(final)]
        return Prompt(text.encode(rendered, special=bool(request.add_special_tokens)))

    return await workers.run(True, encode)
