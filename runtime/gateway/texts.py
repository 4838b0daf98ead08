"""Completes texts for clients of Triton's backends for language models, over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection

from onnxsplit.errors import InputError
from runtime.errors import Busy
from runtime.gateway.errors import NotLoaded
from runtime.gateway.models.version import TEXT, Version
from runtime.gateway.openai.catalogue import ServedText
from runtime.gateway.openai.guidance import grammar_for, is_guided
from runtime.gateway.openai.options import text_options
from runtime.gateway.openai.prompts import completion_prompts
from runtime.gateway.openai.texts import RunningText
from runtime.gateway.protocol.text import TEXT_INPUT, TextAnswer, TextRequest
from runtime.gateway.service import Service


class Texts:
    """Completes texts.

    Args:
        service: the models.
        most_waiting: the most texts of a model that wait for their first token; more are refused.
    """

    def __init__(self, service: Service, *, most_waiting: int) -> None:
        self._service = service
        self._most_waiting = most_waiting

    def asks_for_text(self, name: str, number: str, inputs: Collection[str]) -> bool:
        """Whether a request asks for a text: by the name of the model's text, or by its inputs.

        Raises:
            UnknownModel: there is no such model or version.
        """
        version, part = self._service.find(name, number)
        own = version.has_text and TEXT_INPUT in inputs and TEXT_INPUT not in version.plan.inputs
        return part == TEXT or (part is None and own)

    def find(self, name: str, number: str) -> Version:
        """The version that completes texts under a name.

        Raises:
            UnknownModel: there is no such model or version.
            NotLoaded: it takes no requests.
            InputError: it has no text.
        """
        version, part = self._service.find(name, number)
        if isinstance(part, int) or not version.has_text:
            raise InputError(f"{name!r} takes tensors only: it is not a model with a decoder and a tokenizer")
        return self._service.repository.loaded(version.model, number)

    async def answers(self, version: Version, request: TextRequest) -> AsyncGenerator[TextAnswer, None]:
        """The text of a request, in parts if it is a stream. Closing the iterator ends the text.

        Raises:
            Busy: too many texts wait.
            NotLoaded: the version completes no texts now.
            InputError, PipelineError: as :meth:`runtime.text.text.Text.complete`.
        """
        text = await self._begin(version, request)
        try:
            whole = TextAnswer(str(request.completion.prompt) if request.prepend else "", None, text.prompt, 0)
            while pieces := await text.more():
                new, count = "".join(piece.text for piece in pieces), sum(len(piece.tokens) for piece in pieces)
                whole = TextAnswer(whole.text + new, pieces[-1].reason, text.prompt, whole.tokens + count)
                if whole.reason is not None or (request.stream and whole.text):
                    yield whole
                    whole = TextAnswer("", None, text.prompt, 0)
        except Exception:
            text.close("error")
            raise
        finally:
            text.close("abort")

    async def _begin(self, version: Version, request: TextRequest) -> RunningText:
        if version.text is None or version.pipeline is None:
            raise NotLoaded(f"model {version.model!r} completes no texts now: {version.text_problem or version.reason}")
        served = ServedText(version.model, version, version.pipeline, version.text)
        asked, workers = request.completion, self._service.workers
        (prompt,) = await completion_prompts(served.text, asked, workers)
        grammar = await workers.run(is_guided(asked), grammar_for, asked, None)
        figures = version.text_figures
        if figures.requests_waiting >= self._most_waiting:
            raise Busy(
                f"{figures.requests_waiting} texts wait for their first token, as many as are allowed (--max-queue); "
                "try again later"
            )
        room = served.length - len(prompt.tokens)
        if room < 1:
            raise InputError(
                f"the prompt has {len(prompt.tokens)} tokens, but sequences have at most {served.length}, at least one "
                "of them new; shorten it"
            )
        options = text_options(asked, served.text.defaults, served.ends, room) | {"grammar": grammar}
        generation = served.text.complete(prompt.tokens, timeout=asked.timeout, **options)
        return RunningText(0, generation, figures)
