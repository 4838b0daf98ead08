"""The endpoint for clients of OpenAI's API: completions, conversations, models, and tokens of texts."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from runtime.gateway.errors import TooLarge, client_message
from runtime.gateway.http.bodies import Bodies, Body, headers_of
from runtime.gateway.openai.answer import (
    DONE,
    AnswerForm,
    StreamedChat,
    StreamedCompletion,
    chat_choice,
    completion_choice,
    event,
    usage,
)
from runtime.gateway.openai.catalogue import Catalogue, ServedText
from runtime.gateway.openai.errors import FieldError, decoded, error_answer
from runtime.gateway.openai.guidance import tool_parser
from runtime.gateway.openai.objects import (
    ChatObject,
    CompletionObject,
    DetokenizeAnswer,
    ModelList,
    TokenizeAnswer,
    TokenUsage,
)
from runtime.gateway.openai.prompts import QUICK_CHARACTERS, chat_prompt, completion_prompts
from runtime.gateway.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SampledRequest,
    TokenizeRequest,
)
from runtime.gateway.openai.starting import TextStarter
from runtime.gateway.openai.texts import RunningText, arriving
from runtime.gateway.openai.tool_calls import ToolCalls
from runtime.gateway.threads import Workers, takes_long
from runtime.logs import log_event
from runtime.text.pieces import TextPiece

_log = logging.getLogger("runtime.gateway")
_QUICK_TOKENS = 4096
_MOST_BYTES = 8 << 20  # of a body
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

T = TypeVar("T", bound=msgspec.Struct)


class OpenAIEndpoint:
    """The endpoint.

    Args:
        catalogue: the models.
        bodies: receives the bodies of requests.
        workers: threads for work that takes long.
        starter: starts texts.
    """

    def __init__(self, catalogue: Catalogue, bodies: Bodies, workers: Workers, starter: TextStarter) -> None:
        self._catalogue = catalogue
        self._bodies = bodies
        self._workers = workers
        self._starter = starter

    def routes(self) -> list[BaseRoute]:
        """The routes."""
        return [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._model, methods=["GET"]),
            self._post("/v1/completions", CompletionRequest, self._complete),
            self._post("/v1/chat/completions", ChatRequest, self._chat),
            self._post("/tokenize", TokenizeRequest, self._tokenize),
            self._post("/detokenize", DetokenizeRequest, self._detokenize),
        ]

    def _post(self, path: str, kind: type[T], answer: Callable[[T, Send], Awaitable[None]]) -> Route:
        """A route for requests of one kind."""
        return Route(path, _Post(self._bodies, self._workers, kind, answer), methods=["POST"])

    async def _models(self, _: Request) -> Response:
        return Response(msgspec.json.encode(ModelList(self._catalogue.models())), media_type="application/json")

    async def _model(self, request: Request) -> Response:
        model = self._catalogue.model(request.path_params["model"])
        return Response(msgspec.json.encode(model), media_type="application/json")

    async def _complete(self, request: CompletionRequest, send: Send) -> None:
        served = self._begin(request)
        prompts = await completion_prompts(served.text, request, self._workers)
        form, ends = _form("cmpl", served, request), frozenset(served.ends)
        texts = await self._starter.start(served, request, prompts)
        echo = [prompt.text for prompt in prompts for _ in range(request.choices)]
        async with _Closing(texts):
            if request.stream:
                chunks = [StreamedCompletion(form, text.index, text.prompt, ends, echo[text.index]) for text in texts]
                await _stream(send, form, texts, chunks, request.choices)
                return
            pieces = await _all_pieces(texts)
            choices = [completion_choice(form, i, each, ends, echo[i]) for i, each in enumerate(pieces)]
            whole = form.document(CompletionObject, choices, _usage(texts, request.choices))
            await _send_json(send, msgspec.json.encode(whole), form.id)

    async def _chat(self, request: ChatRequest, send: Send) -> None:
        served = self._begin(request)
        prompt = await chat_prompt(served.text, request, self._workers)
        form, ends = _form("chatcmpl", served, request), frozenset(served.ends)
        texts = await self._starter.start(served, request, [prompt])
        calls = [self._calls(request) for _ in texts]
        async with _Closing(texts):
            if request.stream:
                chunks = [StreamedChat(form, text.index, text.prompt, ends, calls[text.index]) for text in texts]
                await _stream(send, form, texts, chunks, request.choices)
                return
            pieces = await _all_pieces(texts)
            choices = [chat_choice(form, i, each, ends, calls[i]) for i, each in enumerate(pieces)]
            whole = form.document(ChatObject, choices, _usage(texts, request.choices))
            await _send_json(send, msgspec.json.encode(whole), form.id)

    def _begin(self, request: SampledRequest) -> ServedText:
        """The model for a request, which is refused here if a field is not served."""
        request.check()
        return self._catalogue.find(request.model)

    def _calls(self, request: ChatRequest) -> ToolCalls | None:
        parser = tool_parser(request, self._starter.tools)
        return None if parser is None else ToolCalls(parser, only_one=request.parallel_tool_calls is False)

    async def _tokenize(self, request: TokenizeRequest, send: Send) -> None:
        served, chat = self._catalogue.find(request.model), request.chat()
        if chat is not None:
            tokens = (await chat_prompt(served.text, chat, self._workers)).tokens
        else:
            prompt, special = request.prompt or "", request.add_special_tokens is not False
            long = len(prompt) > QUICK_CHARACTERS
            tokens = await self._workers.run(long, served.text.encode, prompt, special=special)

        def answer() -> bytes:
            texts = [served.text.tokenizer.token(token) for token in tokens] if request.return_token_strs else None
            return msgspec.json.encode(TokenizeAnswer(len(tokens), served.length, list(tokens), texts))

        await _send_json(send, await self._workers.run(len(tokens) > _QUICK_TOKENS, answer))

    async def _detokenize(self, request: DetokenizeRequest, send: Send) -> None:
        tokenizer, tokens = self._catalogue.find(request.model).text.tokenizer, request.tokens

        def answer() -> bytes:
            if tokens and max(tokens) >= tokenizer.size:
                raise FieldError("tokens", f"tokens holds {max(tokens)}; allowed are numbers below {tokenizer.size}")
            return msgspec.json.encode(DetokenizeAnswer(tokenizer.decode(tokens, skip_special=False)))

        await _send_json(send, await self._workers.run(len(tokens) > _QUICK_TOKENS, answer))


class _Post(Generic[T]):
    """An ASGI endpoint that reads a request of one kind and answers it. A client that goes away cancels the answer."""

    def __init__(
        self, bodies: Bodies, workers: Workers, kind: type[T], answer: Callable[[T, Send], Awaitable[None]]
    ) -> None:
        self._bodies = bodies
        self._workers = workers
        self._decoder = msgspec.json.Decoder(kind)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(body: Body) -> None:
            if len(body) > _MOST_BYTES:
                raise TooLarge(f"the body has {len(body)} bytes; at most {_MOST_BYTES} are allowed here")
            self._bodies.hold_parsed(scope, body)
            long = takes_long(parsed_bytes=len(body))
            await self._answer(await self._workers.run(long, decoded, self._decoder, body), send)

        await self._bodies.answer(headers_of(scope), scope, receive, answer)


class _Closing:
    """Ends texts when their answer is over, whatever the reason."""

    def __init__(self, texts: Sequence[RunningText]) -> None:
        self._texts = texts

    async def __aenter__(self) -> None:
        """Nothing."""

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        gone = kind is not None and not issubclass(kind, Exception)
        for text in self._texts:
            text.close("abort" if gone else "error")


async def _stream(
    send: Send,
    form: AnswerForm,
    texts: Sequence[RunningText],
    chunks: Sequence[StreamedChat] | Sequence[StreamedCompletion],
    choices: int,
) -> None:
    """Send a stream. Nothing is sent before the first token, so that an error until then has a status of its own."""
    begun = False
    try:
        async for text, pieces in arriving(texts):
            events = chunks[text.index].add(pieces)
            if events:
                if not begun:
                    begun = True
                    headers = [*_EVENTS, (b"x-request-id", form.id.encode())]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": events, "more_body": True})
    except Exception as error:
        if not begun:
            raise
        reason = client_message(error)
        log_event(_log, logging.WARNING, "stream failed", request=form.id, reason=reason)
        await send({"type": "http.response.body", "body": event(error_answer(error))})
        return
    end = DONE
    if form.include_usage:
        end = form.usage_event(_usage(texts, choices)) + DONE
    await send({"type": "http.response.body", "body": end})


async def _all_pieces(texts: Sequence[RunningText]) -> list[list[TextPiece]]:
    """All pieces of each text."""
    found: list[list[TextPiece]] = [[] for _ in texts]
    async for text, pieces in arriving(texts):
        found[text.index] += pieces
    return found


async def _send_json(send: Send, body: bytes, request_id: str | None = None) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if request_id is not None:
        headers.append((b"x-request-id", request_id.encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _form(kind: str, served: ServedText, request: SampledRequest) -> AnswerForm:
    wanted = request.stream_options
    return AnswerForm(
        id=f"{kind}-{request.request_id or secrets.token_hex(12)}",
        created=int(time.time()),
        model=served.name,
        fingerprint=served.version.fingerprint,
        chat=isinstance(request, ChatRequest),
        token_bytes=served.text.tokenizer.token_bytes,
        include_usage=bool(wanted and wanted.include_usage),
        continuous_usage=bool(wanted and wanted.include_usage and wanted.continuous_usage_stats),
    )


def _usage(texts: Sequence[RunningText], choices: int) -> TokenUsage:
    """The numbers of tokens of a request with so many texts for each prompt."""
    firsts = texts[::choices]
    prompt, cached = sum(text.prompt for text in firsts), sum(text.cached for text in firsts)
    return usage(prompt, sum(text.completion for text in texts), cached)
