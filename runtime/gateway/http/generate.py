"""Texts over HTTP as Triton's extension ``generate`` has them: a JSON object in, one out or a stream of them.

POST /v2/models/M/generate           {"text_input": "...", "parameters": {...}}  ->  {"model_name", "text_output", ...}
POST /v2/models/M/generate_stream    the same  ->  data: {"model_name", "text_output", ...}, for each part of the text
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from onnxsplit.errors import InputError, one_line, shown
from runtime.gateway.errors import TooLarge, client_message
from runtime.gateway.http.bodies import Bodies, Body, headers_of
from runtime.gateway.models.version import Version
from runtime.gateway.protocol.text import MOST_BYTES, TextAnswer, TextRequest, of_values
from runtime.gateway.texts import Texts
from runtime.gateway.threads import Workers, takes_long

_MESSAGE_CHARACTERS = 300
_KINDS = {False: b"application/json", True: b"text/event-stream; charset=utf-8"}


class GenerateEndpoint:
    """An ASGI endpoint for one of both paths. A client that goes away ends its text.

    Args:
        texts: completes texts.
        bodies: receives the bodies of requests.
        workers: threads for work that takes long.
        stream: whether the answer is a stream.
    """

    def __init__(self, texts: Texts, bodies: Bodies, workers: Workers, *, stream: bool = False) -> None:
        self._texts = texts
        self._bodies = bodies
        self._workers = workers
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path_params"]

        async def answer(body: Body) -> None:
            version = self._texts.find(path["model"], path.get("version", ""))
            self._bodies.hold_parsed(scope, body)
            request = await self._workers.run(takes_long(parsed_bytes=len(body)), self._parse, body)
            await self._answer(path["model"], version, request, send)

        await self._bodies.answer(headers_of(scope), scope, receive, answer)

    def _parse(self, body: Body) -> TextRequest:
        if len(body) > MOST_BYTES:
            raise TooLarge(f"the body has {len(body)} bytes; at most {MOST_BYTES} are allowed here")
        try:
            values = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InputError(f"the body is not a JSON object: {one_line(error, _MESSAGE_CHARACTERS)}") from error
        parameters = values.pop("parameters", None) or {}
        if not isinstance(parameters, dict):
            raise InputError(f"parameters must be an object, not {shown(parameters)}")
        request_id = values.pop("id", "")
        given = {**parameters, **values}
        if not self._stream and given.get("stream") in (True, "true"):
            raise InputError("stream is true, but this path gives one answer; use generate_stream")
        if self._stream:
            values.setdefault("stream", parameters.get("stream", True))
        return of_values(values, parameters, request_id if isinstance(request_id, str) else "")

    async def _answer(self, name: str, version: Version, request: TextRequest, send: Send) -> None:
        """Send the answer. An error before the first part has a status of its own."""
        begun = False
        try:
            async with aclosing(self._texts.answers(version, request)) as answers:
                async for answer in answers:
                    body = msgspec.json.encode(_document(name, version, request, answer))
                    if not begun:
                        begun = True
                        await send(self._start(len(body)))
                    await send(self._part(body, more=self._stream))
            if self._stream:
                await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            if not begun:
                raise
            body = msgspec.json.encode({"error": client_message(error)})
            await send(self._part(body, more=False))

    def _start(self, size: int) -> dict[str, Any]:
        headers = [(b"content-type", _KINDS[self._stream])]
        headers.append((b"cache-control", b"no-cache") if self._stream else (b"content-length", b"%d" % size))
        return {"type": "http.response.start", "status": 200, "headers": headers}

    def _part(self, body: bytes, *, more: bool) -> dict[str, Any]:
        sent = b"data: " + body + b"\n\n" if self._stream else body
        return {"type": "http.response.body", "body": sent, "more_body": more}


def _document(name: str, version: Version, request: TextRequest, answer: TextAnswer) -> Mapping[str, Any]:
    reports = {
        "finish_reason": str(answer.reason),
        "num_input_tokens": answer.prompt_tokens,
        "num_output_tokens": answer.tokens,
    }
    found = {"model_name": name, "model_version": version.number, "text_output": answer.text}
    return {**found, **{report: value for report, value in reports.items() if report in request.reports}}
