"""Completes texts for clients of Triton's backends for language models, over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection

from onnxsplit.errors import InputError
from runtime.gateway.errors import NotLoaded
from runtime.gateway.models.version import TEXT, Version
from runtime.gateway.openai.catalogue import ServedText
from runtime.gateway.openai.prompts import completion_prompts
from runtime.gateway.openai.starting import TextStarter
from runtime.gateway.openai.texts import RunningText
from runtime.gateway.protocol.text import TEXT_INPUT, TextAnswer, TextRequest
from runtime.gateway.service import Service


class Texts:
    """Completes texts.

    Args:
        service: the models.
        starter: starts them.
    """

    def __init__(self, service: Service, starter: TextStarter) -> None:
        self._service = service
        self._starter = starter

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
        prompts = await completion_prompts(served.text, request.completion, self._service.workers)
        (text,) = await self._starter.start(served, request.completion, prompts)
        return text
