"""The result of an endpoint as a response."""

from __future__ import annotations

import io
import logging
import re
import typing
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import numpy as np
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import Response, StreamingResponse

from onnxsplit.errors import OnnxsplitError, one_line
from runtime.errors import PipelineError
from runtime.services.threads import in_thread

_log = logging.getLogger("runtime.services")
_LINE_ENDS = re.compile(r"\r\n|\r|\n")

JSON = "application/json"
EVENTS = "text/event-stream"
BYTES = "application/octet-stream"


def media_type(annotation: Any) -> str:
    """The media type of the results of a method, from the type that it returns."""
    origin = typing.get_origin(annotation) or annotation
    if isinstance(origin, type):
        if issubclass(origin, Iterator | AsyncIterator) or origin.__name__ in ("Iterable", "AsyncIterable"):
            return BYTES if typing.get_args(annotation)[:1] == (bytes,) else EVENTS
        if issubclass(origin, bytes | bytearray):
            return BYTES
        if issubclass(origin, str):
            return "text/plain"
        if _is_picture(origin):
            return "image/png"
        if issubclass(origin, Response):
            return origin.media_type or BYTES
    return JSON


async def response_of(result: Any, annotation: Any) -> Response:
    """The response for a result.

    Args:
        result: what the method has returned. Of an iterator, the first part is taken here, so that a failure before it
            has a status of its own.
        annotation: the type that the method returns.

    Raises:
        PipelineError: the result is nothing that a response can carry; the message names its type.
        Exception: what an iterator raises before its first part.
    """
    if not isinstance(result, Iterator | AsyncIterator):
        return await in_thread(_whole_response, result)
    parts = result if isinstance(result, AsyncIterator) else iterate_in_threadpool(result)
    first = [part async for part in _first(parts)]
    if media_type(annotation) == BYTES:
        return StreamingResponse(_joined(first, parts), media_type=BYTES)
    return StreamingResponse(_events(_joined(first, parts)), media_type=EVENTS, headers={"cache-control": "no-cache"})


def _whole_response(result: Any) -> Response:
    if isinstance(result, Response):
        return result
    if isinstance(result, bytes | bytearray | memoryview):
        return Response(bytes(result), media_type=BYTES)
    if isinstance(result, str):
        return Response(result, media_type="text/plain")
    if _is_picture(type(result)):
        picture = io.BytesIO()
        result.save(picture, "PNG")
        return Response(picture.getvalue(), media_type="image/png")
    return Response(_json(result), media_type=JSON)


async def _first(parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for part in parts:
        yield part
        return


async def _joined(first: list[Any], parts: AsyncIterator[Any]) -> AsyncIterator[Any]:
    for part in first:
        yield part
    async for part in parts:
        yield part


async def _events(parts: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The parts of a stream as server-sent events. An error becomes the last event."""
    try:
        async for part in parts:
            yield _event(part)
    except OnnxsplitError as error:
        yield b"event: error\n" + _event({"error": str(error)})
    except Exception as error:
        _log.exception("a stream of events failed")
        yield b"event: error\n" + _event({"error": f"{type(error).__name__}; the server's log says more"})


def _event(part: Any) -> bytes:
    """Texts are sent as they are, line by line; anything else as JSON."""
    text = part if isinstance(part, str) else _json(part).decode()
    lines = _LINE_ENDS.split(text)
    return b"".join(b"data: " + line.encode(errors="replace") + b"\n" for line in lines) + b"\n"


def _is_picture(kind: type) -> bool:
    """Whether a type is one of Pillow's, which is not imported here."""
    return any(base.__module__.split(".")[0] == "PIL" for base in kind.__mro__)


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise PipelineError(f"the endpoint returned what is not JSON: {one_line(error)}") from error


def _plain(value: Any) -> Any:
    """Values that msgspec does not know: arrays and numbers of NumPy, and Pydantic's models."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not data")
