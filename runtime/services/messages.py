"""The messages between the gateway and a worker, and how they travel over their socket.

    gateway -> worker    Begin, CallEndpoint, More, CancelCall, AskOutputs, AskFailed; the end of the stream to stop
    worker -> gateway    Described, Unusable, Up, ResponseHead, ResponsePart, CallEnded, Ask, Drop

    | length of the header, number of frames | sizes of the frames | header | frame | frame | ...

A call that is not cancelled goes ``CallEndpoint, ResponseHead, ResponsePart, (More, ResponsePart)*, CallEnded``, or
``CallEndpoint, CallEnded`` with an error.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from onnxsplit.errors import InputError, MissingDependency, OnnxsplitError
from runtime.errors import (
    Busy,
    Cancelled,
    DeadlineExceeded,
    NodeFailed,
    NotSeparable,
    PipelineClosed,
    PipelineError,
    ProtocolError,
    StageFailed,
    StageUnavailable,
)
from runtime.wire.codec import MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, Buffer
from runtime.wire.messages.data import TensorHead

PART_BYTES = 1 << 20
"""The largest part of a response. The next part waits until the client has taken it."""

Headers = list[tuple[bytes, bytes]]
_SIZES = struct.Struct("!II")


class EndpointDescription(msgspec.Struct):
    """An endpoint as the gateway sees it.

    Attributes:
        name: the last part of its path; empty for the path of the service itself.
        summary: the first line of the method's documentation; may be empty.
        request: JSON schema of the fields of a request.
        response: the media type of the response, and the JSON schema of one that is JSON.
    """

    name: str
    summary: str
    request: dict[str, Any]
    response: tuple[str, dict[str, Any]]


class ServiceDescription(msgspec.Struct):
    """A service as the gateway sees it.

    Attributes:
        name: the name of the class.
        path: the path of the endpoints.
        models: the plans by the names that the service uses.
        workers: number of worker processes.
        calls: the most calls that a worker executes at once.
        attempts: the most workers that die of a call.
        timeout: seconds for the beginning of an answer; None for no limit.
        endpoints: its endpoints.
        schemas: JSON schemas that those of the endpoints refer to, by name.
    """

    name: str
    path: str
    models: dict[str, str]
    workers: int
    calls: int
    attempts: int
    timeout: float | None
    endpoints: list[EndpointDescription]
    schemas: dict[str, Any]

    def path_of(self, endpoint: EndpointDescription) -> str:
        """The path of an endpoint."""
        return f"{self.path}/{endpoint.name}" if endpoint.name else self.path

    @property
    def paths(self) -> list[str]:
        """The paths of all endpoints."""
        return [self.path_of(endpoint) for endpoint in self.endpoints]


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class Begin(_Message, frozen=True):
    """Make the service. ``models`` holds the folders of the plans by the service's names for them."""

    models: dict[str, str]


class CallEndpoint(_Message, frozen=True):
    """Execute an endpoint. A frame with the body follows."""

    call: int
    endpoint: str
    path: str
    query: bytes
    headers: Headers


class More(_Message, frozen=True):
    """The client has taken the last part of the response."""

    call: int


class CancelCall(_Message, frozen=True):
    """Nobody waits for a call any more."""

    call: int


class AskOutputs(_Message, frozen=True):
    """The outputs that a service has asked a model for. Their frames follow."""

    ask: int
    heads: tuple[TensorHead, ...]


class AskFailed(_Message, frozen=True):
    """A model could not answer: the kind of the error, as :func:`kind_of` has it, and its message."""

    ask: int
    kind: str
    message: str


class Described(_Message, frozen=True):
    """The user's file was read, and holds this service."""

    service: ServiceDescription


class Unusable(_Message, frozen=True):
    """The user's file cannot be read, or the service cannot be made. The worker ends."""

    message: str


class Up(_Message, frozen=True):
    """The service was made, and takes calls."""


class ResponseHead(_Message, frozen=True):
    """The beginning of a response."""

    call: int
    status: int
    headers: Headers


class ResponsePart(_Message, frozen=True):
    """A part of a response, in a frame that follows. The next one is sent after :class:`More`."""

    call: int
    more: bool


class CallEnded(_Message, frozen=True):
    """A call is over, with an error unless the kind is empty."""

    call: int
    kind: str = ""
    message: str = ""


class Ask(_Message, frozen=True):
    """Ask a model. The frames of the inputs follow. ``outputs`` of None are all outputs."""

    ask: int
    model: str
    outputs: tuple[str, ...] | None
    timeout_ns: int | None
    heads: tuple[TensorHead, ...]


class Drop(_Message, frozen=True):
    """Nobody waits for the answer of a model any more."""

    ask: int


ToWorker = Begin | CallEndpoint | More | CancelCall | AskOutputs | AskFailed
ToGateway = Described | Unusable | Up | ResponseHead | ResponsePart | CallEnded | Ask | Drop

_MOST_CHARACTERS = 2000

_encode = msgspec.msgpack.Encoder().encode

_KINDS: Mapping[str, type[OnnxsplitError]] = {
    kind.__name__: kind
    for kind in (
        InputError, MissingDependency, Busy, Cancelled, DeadlineExceeded, StageFailed, NotSeparable, NodeFailed,
        StageUnavailable, PipelineClosed, PipelineError,
    )
}  # fmt: skip


def kind_of(error: OnnxsplitError) -> str:
    """The name of the class of an error that both sides know."""
    return next((cls.__name__ for cls in type(error).__mro__ if _KINDS.get(cls.__name__) is cls), "PipelineError")


def short(text: str) -> str:
    """A text for a message: bounded, and without what UTF-8 cannot encode."""
    cut = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ... ({len(text)} characters)"
    return cut.encode(errors="replace").decode()


def error_of(kind: str, message: str) -> OnnxsplitError:
    """The error of a kind."""
    return _KINDS.get(kind, PipelineError)(message)


class Channel:
    """One end of the socket.

    Args:
        reader: reads from it.
        writer: writes to it.
        messages: the union of the messages that arrive here.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, messages: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = msgspec.msgpack.Decoder(messages).decode

    async def receive(self) -> tuple[Any, list[bytes]] | None:
        """The next message and its frames; None when the other end is closed.

        Raises:
            ProtocolError: what arrives is no message, or one that is too large.
        """
        try:
            length, count = _SIZES.unpack(await self._reader.readexactly(_SIZES.size))
            if length > MAX_HEADER_BYTES or count > MAX_TENSORS:
                raise ProtocolError(f"a header of {length} bytes with {count} frames is too large")
            sizes = struct.unpack(f"!{count}Q", await self._reader.readexactly(8 * count))
            if any(size > MAX_FRAME_BYTES for size in sizes):
                raise ProtocolError(f"a frame of {max(sizes)} bytes; at most {MAX_FRAME_BYTES} are allowed")
            message = self._decode(await self._reader.readexactly(length))
            return message, [await self._reader.readexactly(size) for size in sizes]
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a message that violates the protocol: {error}") from error

    def send(self, message: ToWorker | ToGateway, frames: Sequence[Buffer] = ()) -> None:
        """Send a message; it waits in memory until the other end reads it.

        Raises:
            InputError: the message is larger than the other end accepts.
        """
        header = _encode(message)
        sizes = [len(frame) for frame in frames]
        if len(header) > MAX_HEADER_BYTES or len(frames) > MAX_TENSORS or max(sizes, default=0) > MAX_FRAME_BYTES:
            raise InputError(
                f"a message of {max((len(header), *sizes))} bytes in {len(frames)} parts is too large between the "
                f"gateway and a worker; a part may have {MAX_FRAME_BYTES} bytes"
            )
        lead = _SIZES.pack(len(header), len(frames)) + struct.pack(f"!{len(sizes)}Q", *sizes) + header
        self._writer.writelines([lead, *frames])

    def close(self) -> None:
        """Close this end."""
        self._writer.close()
