"""Starts the texts of a request, for all protocols that ask for texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from runtime.errors import Busy
from runtime.gateway.openai.catalogue import ServedText
from runtime.gateway.openai.errors import FieldError
from runtime.gateway.openai.guidance import grammar_for, is_guided
from runtime.gateway.openai.options import numbered, text_options
from runtime.gateway.openai.prompts import Prompt
from runtime.gateway.openai.protocol import ChatRequest, SampledRequest
from runtime.gateway.openai.texts import RunningText
from runtime.gateway.threads import Workers
from runtime.text.tools import ToolFormat


class TextStarter:
    """Starts texts.

    Args:
        workers: threads for work that takes long.
        most_waiting: the most texts of a model that wait for their first token; more are refused.
        tools: how the models write calls of tools; None where that is not known.

    Attributes:
        tools: as given.
    """

    def __init__(self, workers: Workers, *, most_waiting: int, tools: ToolFormat | None = None) -> None:
        self.tools = tools
        self._workers = workers
        self._most_waiting = most_waiting

    async def start(self, served: ServedText, request: SampledRequest, prompts: Sequence[Prompt]) -> list[RunningText]:
        """Start the texts of a request.

        Raises:
            Busy: too many wait.
            InputError: the prompt or an option does not fit the model.
        """
        guided = is_guided(request)
        grammar = await self._workers.run(guided, grammar_for, request, self.tools)
        figures, wanted = served.version.text_figures, len(prompts) * request.choices
        if figures.requests_waiting and figures.requests_waiting + wanted > self._most_waiting:
            raise Busy(
                f"{figures.requests_waiting} texts wait for their first token, and {wanted} more would exceed the "
                f"{self._most_waiting} allowed (--max-queue); try again later"
            )
        texts: list[RunningText] = []
        try:
            for prompt in prompts:
                options = text_options(request, served.text.defaults, served.ends, _room(served, request, prompt))
                options |= {"grammar": grammar} if grammar else {}
                for number in range(request.choices):
                    start = partial(
                        served.text.complete, prompt.tokens, timeout=request.timeout, **numbered(options, number)
                    )
                    generation = await self._workers.run(guided, start)
                    texts.append(RunningText(len(texts), generation, figures))
        except BaseException as error:
            for text in texts:
                text.close("error" if isinstance(error, Exception) else "abort")
            raise
        return texts


def _room(served: ServedText, request: SampledRequest, prompt: Prompt) -> int:
    """The number of tokens for which there is room behind a prompt."""
    room = served.length - len(prompt.tokens)
    if room >= 1:
        return room
    raise FieldError(
        "messages" if isinstance(request, ChatRequest) else "prompt",
        f"the prompt has {len(prompt.tokens)} tokens, but sequences have at most {served.length}, at least one of them "
        "new; shorten it",
        "context_length_exceeded",
    )
