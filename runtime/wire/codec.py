"""Encodes messages into frames and decodes them. The frames are drawn in :mod:`runtime.wire.messages`.

The bytes of a numeric tensor are its elements in C order, little-endian. Those of a string tensor are the length in
bytes of each string, as uint32, then the UTF-8 bytes of all strings.

A decoder checks every size before it allocates memory, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import TRAVELLING_TYPES, Array, dtype_name, element_count, numpy_dtype
from runtime.errors import ProtocolError, StageFailed
from runtime.wire.compression import compressed, decompressed
from runtime.wire.messages.control import CoordinatorControl, NodeControl
from runtime.wire.messages.data import Data, TensorHead, TensorPlace
from runtime.wire.messages.files import Fetch, FileAnswer
from runtime.wire.messages.measure import AgentAnswer, AgentRequest

MAX_HEADER_BYTES = 1 << 20
"""The largest header."""

MAX_TENSORS = 4096
"""The largest number of tensors in a fragment."""

MAX_FRAME_BYTES = 512 << 20
"""The largest tensor that is sent as a frame. A receiver closes a connection that announces a larger frame."""

INLINE_BYTES = 16 << 10
"""The largest tensor that is sent inside the header; below this size, copying is cheaper than a frame."""

_INLINE_TOTAL_BYTES = MAX_HEADER_BYTES // 2

Buffer = bytes | memoryview
"""The bytes of one frame."""

_encoder = msgspec.msgpack.Encoder()


def encode(message: NodeControl | CoordinatorControl | Data | Fetch | FileAnswer | AgentRequest | AgentAnswer) -> bytes:
    """The header frame of a message."""
    return _encoder.encode(message)


def header_decoder(messages: Any) -> Callable[[Buffer], Any]:
    """The function that decodes the headers received from one side of a link.

    The function raises :class:`~runtime.errors.ProtocolError` for a frame that is too large, or that holds none of the
    allowed messages.

    Args:
        messages: the union of the message types allowed there.
    """
    decode = msgspec.msgpack.Decoder(messages).decode

    def decode_header(frame: Buffer) -> Any:
        if len(frame) > MAX_HEADER_BYTES:
            raise ProtocolError(f"a header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are allowed")
        try:
            return decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a header that violates the protocol: {error}") from error

    return decode_header


decode_node_control: Callable[[Buffer], NodeControl] = header_decoder(NodeControl)
decode_coordinator_control: Callable[[Buffer], CoordinatorControl] = header_decoder(CoordinatorControl)
decode_data: Callable[[Buffer], Data] = header_decoder(Data)
decode_fetch: Callable[[Buffer], Fetch] = header_decoder(Fetch)
decode_file_answer: Callable[[Buffer], FileAnswer] = header_decoder(FileAnswer)
decode_agent_request: Callable[[Buffer], AgentRequest] = header_decoder(AgentRequest)
decode_agent_answer: Callable[[Buffer], AgentAnswer] = header_decoder(AgentAnswer)


def encode_tensors(
    tensors: Mapping[str, Array],
    places: Mapping[str, TensorPlace] | None = None,
    compress: Collection[str] = (),
) -> tuple[tuple[TensorHead, ...], list[Buffer]]:
    """Encode tensors as the heads and frames of a fragment.

    Args:
        tensors: the tensors by name.
        places: the places of those that lie in shared memory. Of the others, tensors of up to :data:`INLINE_BYTES` go
            into their heads and larger ones into frames; the frame of a contiguous numeric tensor is its own memory.
        compress: the names of those whose frames are compressed if that makes them smaller; only ``int8``.

    Raises:
        InputError: a tensor has a type that cannot be sent.
    """
    heads, frames = [], []
    room, expandable = _INLINE_TOTAL_BYTES, MAX_FRAME_BYTES
    for name, tensor in tensors.items():
        dtype = dtype_name(tensor.dtype)
        if dtype is None:
            raise InputError(f"tensor {name!r} has the type {tensor.dtype}, which cannot be sent")
        payload: bytes | TensorPlace | None = places.get(name) if places else None
        zstd = False
        if payload is None:
            raw = _encode_strings(tensor) if dtype == "string" else None
            size = tensor.nbytes if raw is None else len(raw)
            if size <= INLINE_BYTES and size <= room:
                payload = tensor.tobytes() if raw is None else raw
                room -= size
            else:
                frame = _bytes_of(tensor) if raw is None else raw
                if name in compress and dtype == "int8" and size <= expandable:
                    smaller = compressed(frame)
                    if len(smaller) < size:
                        frame, zstd = smaller, True
                        expandable -= size
                frames.append(frame)
        heads.append(TensorHead(name, dtype, tensor.shape, payload, zstd))
    return tuple(heads), frames


def _bytes_of(tensor: Array) -> Buffer:
    flat = np.ascontiguousarray(tensor).reshape(-1)
    return flat.view(np.uint8).data if flat.size else b""


def _encode_strings(tensor: Array) -> bytes:
    texts = [str(text).encode() for text in tensor.reshape(-1)]
    return np.array([len(text) for text in texts], dtype="<u4").tobytes() + b"".join(texts)


def check_sizes(names: Collection[str], header: bytes, frames: Sequence[Buffer]) -> None:
    """Check that a receiver would accept a fragment; one that it drops would be retried without end.

    Args:
        names: the names of the tensors, for the message.
        header: the encoded header.
        frames: the frames that follow it.

    Raises:
        StageFailed: the header or a frame is too large.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise StageFailed(
            f"the names and shapes of the {len(names)} tensors {shown(list(names))} take {len(header)} bytes; at most "
            f"{MAX_HEADER_BYTES} can be sent at once"
        )
    for frame in frames:
        if len(frame) > MAX_FRAME_BYTES:
            raise StageFailed(
                f"one of the tensors {shown(list(names))} has {len(frame)} bytes; at most {MAX_FRAME_BYTES} can be "
                "sent outside shared memory. Allow more shared memory (--inflight-bytes), or send smaller batches"
            )


def frames_of(heads: Sequence[TensorHead]) -> int:
    """Number of frames that follow a header with these heads."""
    return sum(head.payload is None for head in heads)


def decode_tensors(
    heads: Sequence[TensorHead], frames: Sequence[Buffer], at: Callable[[TensorPlace, str, Sequence[int]], Array]
) -> dict[str, Array]:
    """Decode the tensors of a fragment.

    Numeric arrays are read-only views of the message or of shared memory; nothing is copied.

    Args:
        heads: the heads of all tensors.
        frames: the frames that followed the header.
        at: returns the array at a place in the sender's memory, given its ONNX type and shape.

    Returns:
        The arrays by name.

    Raises:
        ProtocolError: heads and frames do not fit each other, or a type cannot be sent.
    """
    if len(heads) > MAX_TENSORS or frames_of(heads) != len(frames):
        raise ProtocolError(
            f"a fragment of {len(heads)} tensors in {len(frames)} frames; expected {frames_of(heads)} frames, and at "
            f"most {MAX_TENSORS} tensors"
        )
    rest = iter(frames)
    tensors = {}
    expandable = MAX_FRAME_BYTES
    for head in heads:
        if head.dtype not in TRAVELLING_TYPES:
            raise ProtocolError(f"tensor {shown(head.name)} has the type {head.dtype!r}, which cannot be sent")
        if isinstance(head.payload, TensorPlace):
            if head.dtype == "string" or head.zstd:
                raise ProtocolError(f"tensor {head.name!r}: strings and compressed bytes cannot lie in shared memory")
            tensors[head.name] = at(head.payload, head.dtype, head.shape)
        else:
            frame = next(rest) if head.payload is None else head.payload
            if head.zstd:
                frame = _expanded(head, frame, expandable)
                expandable -= len(frame)
            tensors[head.name] = _decode_tensor(head, frame)
    return tensors


def _expanded(head: TensorHead, frame: Buffer, most_bytes: int) -> bytes:
    """The content of a compressed frame; its size is checked before anything is allocated."""
    size = element_count(head.shape, 1) if head.dtype == "int8" and head.payload is None else None
    if not size:
        raise ProtocolError(
            f"tensor {shown(head.name)} of {head.dtype}{shown(head.shape)} is compressed; only frames of int8 that are "
            "not empty may be"
        )
    if size > most_bytes:
        raise ProtocolError(
            f"compressed tensor {shown(head.name)} has {size} bytes; those of a fragment may have {MAX_FRAME_BYTES} "
            "together"
        )
    try:
        return decompressed(frame, size)
    except ProtocolError as error:
        raise ProtocolError(f"tensor {shown(head.name)}: {error}") from error


def _decode_tensor(head: TensorHead, frame: Buffer) -> Array:
    dtype = numpy_dtype(head.dtype)
    count = element_count(head.shape, dtype.itemsize)
    if count is None:
        raise ProtocolError(f"tensor {shown(head.name)} has the shape {shown(head.shape)}, which no array can have")
    if head.dtype == "string":
        return _decode_strings(head, bytes(frame), count)
    size = len(frame)
    if count * dtype.itemsize != size:
        raise ProtocolError(
            f"tensor {shown(head.name)} of {head.dtype}{list(head.shape)} has {count * dtype.itemsize} bytes, and came "
            f"with {size}"
        )
    if count == 0:
        return np.empty(head.shape, dtype)
    array: Array = np.ndarray(head.shape, dtype, frame)
    return array if array.flags.aligned else array.copy()


def _decode_strings(head: TensorHead, frame: bytes, count: int) -> Array:
    if count * 4 > len(frame):
        raise ProtocolError(
            f"tensor {head.name!r} of {count} strings came with {len(frame)} bytes, too few for their lengths"
        )
    lengths = np.frombuffer(frame, dtype="<u4", count=count)
    ends = np.cumsum(lengths, dtype=np.int64) + count * 4
    if len(frame) != (int(ends[-1]) if count else 0):
        raise ProtocolError(f"tensor {head.name!r}: the lengths of its strings do not add up to its {len(frame)} bytes")
    try:
        texts = [frame[end - length : end].decode() for end, length in zip(ends, lengths, strict=True)]
    except UnicodeDecodeError as error:
        raise ProtocolError(f"tensor {head.name!r} holds strings that are not UTF-8") from error
    result = np.empty(count, dtype=object)
    result[:] = texts
    return result.reshape(head.shape)
