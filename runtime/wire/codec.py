"""Headers and tensors to frames and back. Nothing is allocated before its size is checked, and nothing is unpickled.

    frame 0    header, MessagePack; small tensors are in it
    frame 1..  the bytes of a tensor each, C order, little-endian; none for those in the sender's shared memory

A tensor of strings is its number of bytes for each string, as uint32, then the UTF-8 bytes of all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from onnxsplit.errors import InputError, shown
from onnxsplit.tensors import TRAVELLING_TYPES, Array, dtype_name, element_count, numpy_dtype
from runtime.errors import ProtocolError, StageFailed
from runtime.wire.messages.control import CoordinatorControl, NodeControl
from runtime.wire.messages.data import Data, TensorHead, TensorPlace
from runtime.wire.messages.files import Fetch, FileAnswer
from runtime.wire.messages.measure import AgentAnswer, AgentRequest

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
MAX_FRAME_BYTES = 512 << 20
"""The largest tensor that goes as a frame; a reader closes a link on which a larger one is announced."""

INLINE_BYTES = 16 << 10
"""Tensors up to this size ride in the header: copying them costs less than keeping track of them."""

_INLINE_TOTAL_BYTES = MAX_HEADER_BYTES // 2

Buffer = bytes | memoryview
"""The bytes of one frame."""

_encoder = msgspec.msgpack.Encoder()
_node_control: msgspec.msgpack.Decoder[NodeControl] = msgspec.msgpack.Decoder(NodeControl)
_coordinator_control: msgspec.msgpack.Decoder[CoordinatorControl] = msgspec.msgpack.Decoder(CoordinatorControl)
_fetch: msgspec.msgpack.Decoder[Fetch] = msgspec.msgpack.Decoder(Fetch)
_file_answer: msgspec.msgpack.Decoder[FileAnswer] = msgspec.msgpack.Decoder(FileAnswer)
_asked: msgspec.msgpack.Decoder[AgentRequest] = msgspec.msgpack.Decoder(AgentRequest)
_told: msgspec.msgpack.Decoder[AgentAnswer] = msgspec.msgpack.Decoder(AgentAnswer)
_data: msgspec.msgpack.Decoder[Data] = msgspec.msgpack.Decoder(Data)


def encode(message: NodeControl | CoordinatorControl | Data | Fetch | FileAnswer | AgentRequest | AgentAnswer) -> bytes:
    """A header's bytes."""
    return _encoder.encode(message)


def decode_node_control(frame: bytes) -> NodeControl:
    """What a node says on the control link."""
    message: NodeControl = _decoded(_node_control, frame)
    return message


def decode_coordinator_control(frame: bytes) -> CoordinatorControl:
    """What the coordinator says on the control link."""
    message: CoordinatorControl = _decoded(_coordinator_control, frame)
    return message


def decode_data(frame: Buffer) -> Data:
    """A header of the data link."""
    message: Data = _decoded(_data, frame)
    return message


def decode_fetch(frame: Buffer) -> Fetch:
    """What a node says on the link for files."""
    message: Fetch = _decoded(_fetch, frame)
    return message


def decode_asked(frame: Buffer) -> AgentRequest:
    """What an agent is asked."""
    message: AgentRequest = _decoded(_asked, frame)
    return message


def decode_told(frame: Buffer) -> AgentAnswer:
    """What an agent tells."""
    message: AgentAnswer = _decoded(_told, frame)
    return message


def decode_file_answer(frame: Buffer) -> FileAnswer:
    """What the coordinator says there."""
    message: FileAnswer = _decoded(_file_answer, frame)
    return message


def _decoded(decoder: msgspec.msgpack.Decoder[Any], frame: Buffer) -> Any:
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a header that is none of the protocol: {error}") from error


def encode_tensors(
    tensors: Mapping[str, Array], places: Mapping[str, TensorPlace] | None = None
) -> tuple[tuple[TensorHead, ...], list[Buffer]]:
    """Heads and frames of tensors.

    Args:
        tensors: by name.
        places: where those are that lie in shared memory. Of the others, small ones go into their heads, and the
            rest into frames: a numeric tensor's frame is its own memory where it is contiguous.
    """
    heads, frames = [], []
    room = _INLINE_TOTAL_BYTES
    for name, tensor in tensors.items():
        dtype = dtype_name(tensor.dtype)
        if dtype is None:
            raise InputError(f"tensor {name!r} has the type {tensor.dtype}, which cannot travel")
        payload: bytes | TensorPlace | None = places.get(name) if places else None
        if payload is None:
            raw = _encode_strings(tensor) if dtype == "string" else None
            size = tensor.nbytes if raw is None else len(raw)
            if size <= INLINE_BYTES and size <= room:
                payload = tensor.tobytes() if raw is None else raw
                room -= size
            else:
                frames.append(_bytes_of(tensor) if raw is None else raw)
        heads.append(TensorHead(name, dtype, tensor.shape, payload))
    return tuple(heads), frames


def _bytes_of(tensor: Array) -> Buffer:
    flat = np.ascontiguousarray(tensor).reshape(-1)
    return flat.view(np.uint8).data if flat.size else b""


def _encode_strings(tensor: Array) -> bytes:
    texts = [str(text).encode() for text in tensor.reshape(-1)]
    return np.array([len(text) for text in texts], dtype="<u4").tobytes() + b"".join(texts)


def check_sizes(names: Collection[str], header: bytes, frames: Sequence[Buffer]) -> None:
    """Refuse to send what no reader would take, and what would be sent again and again.

    Raises:
        StageFailed: saying what is too large.
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
                "sent where it does not fit into shared memory. Allow more of that (--inflight-bytes), or send smaller "
                "batches"
            )


def frames_of(heads: Sequence[TensorHead]) -> int:
    """Number of frames that follow a header."""
    return sum(head.payload is None for head in heads)


def decode_tensors(
    heads: Sequence[TensorHead], frames: Sequence[Buffer], at: Callable[[TensorPlace, str, Sequence[int]], Array]
) -> dict[str, Array]:
    """The tensors of a fragment. Numeric ones lie where they are: in the message or in shared memory, read-only.

    Args:
        heads: of all tensors.
        frames: that followed the header.
        at: the array at a place of the sender's memory, given type and shape.

    Raises:
        ProtocolError: heads and frames do not fit each other.
    """
    if len(heads) > MAX_TENSORS or frames_of(heads) != len(frames):
        raise ProtocolError(f"{len(heads)} tensors in {len(frames)} frames; at most {MAX_TENSORS} are allowed")
    rest = iter(frames)
    found = {}
    for head in heads:
        if head.dtype not in TRAVELLING_TYPES:
            raise ProtocolError(f"tensor {shown(head.name)} has the type {head.dtype!r}, which cannot travel")
        if isinstance(head.payload, TensorPlace):
            if head.dtype == "string":
                raise ProtocolError(f"tensor {head.name!r}: strings do not go through shared memory")
            found[head.name] = at(head.payload, head.dtype, head.shape)
        else:
            found[head.name] = _decode_tensor(head, next(rest) if head.payload is None else head.payload)
    return found


def _decode_tensor(head: TensorHead, frame: Buffer) -> Array:
    dtype = numpy_dtype(head.dtype)
    count = element_count(head.shape, dtype.itemsize)
    if count is None:
        raise ProtocolError(f"tensor {shown(head.name)} has the shape {shown(head.shape)}, which no tensor has")
    if head.dtype == "string":
        return _decode_strings(head, bytes(frame), count)
    size = len(frame)
    if count * dtype.itemsize != size:
        raise ProtocolError(f"tensor {shown(head.name)} of {head.dtype}{list(head.shape)} in {size} bytes")
    if count == 0:
        return np.empty(head.shape, dtype)
    array: Array = np.ndarray(head.shape, dtype, frame)
    return array if array.flags.aligned else array.copy()


def _decode_strings(head: TensorHead, frame: bytes, count: int) -> Array:
    if count * 4 > len(frame):
        raise ProtocolError(f"tensor {head.name!r} of {count} strings in {len(frame)} bytes")
    lengths = np.frombuffer(frame, dtype="<u4", count=count)
    ends = np.cumsum(lengths, dtype=np.int64) + count * 4
    if len(frame) != (int(ends[-1]) if count else 0):
        raise ProtocolError(f"tensor {head.name!r}: its strings do not fill its {len(frame)} bytes")
    try:
        texts = [frame[end - length : end].decode() for end, length in zip(ends, lengths, strict=True)]
    except UnicodeDecodeError as error:
        raise ProtocolError(f"tensor {head.name!r} holds strings that are not UTF-8") from error
    result = np.empty(count, dtype=object)
    result[:] = texts
    return result.reshape(head.shape)
