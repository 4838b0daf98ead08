"""Messages survive encoding and decoding; any other bytes are refused before memory is allocated."""

from __future__ import annotations

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.errors import ProtocolError
from runtime.wire import codec
from runtime.wire.messages.control import (
    Assign,
    Beat,
    Cancel,
    Hello,
    Leaving,
    Memory,
    NodeBeat,
    Peer,
    Share,
    Succeed,
    Succeeded,
    SucceedRefused,
    SuccessorEnded,
    Wire,
)
from runtime.wire.messages.data import Failed, Fragment, Receipt, Started, TensorHead, TensorPlace, Visit

HEAD = TensorHead("x", "float32", (4,), bytes(16))
KINDS = ["f4", "f8", "f2", "i1", "i4", "i8", "u1", "u8", "?"]
ARRAYS = st.sampled_from(KINDS).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


MEMORY = Memory("host", 3, 4, b"token", 5)


def nowhere(place, dtype, shape):
    raise ProtocolError("no memory is mapped here")


def over_the_wire(array):
    heads, frames = codec.encode_tensors({"x": array})
    return codec.decode_tensors(heads, [bytes(frame) for frame in frames], nowhere)["x"]


@given(ARRAYS)
def test_numbers_survive(array):
    back = over_the_wire(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(
    hnp.arrays(
        object,
        hnp.array_shapes(max_dims=2, min_side=0),
        elements=st.text(st.characters(exclude_categories=["Cs"])),
    )
)
def test_strings_survive(array):
    assert over_the_wire(array).tolist() == array.tolist()


def test_bfloat16_survives():
    array = np.array([[1.5], [-3]], dtype=ml_dtypes.bfloat16)
    assert over_the_wire(array).tolist() == array.tolist()
    assert over_the_wire(array).dtype == array.dtype


def test_a_view_of_an_array_is_sent_with_its_own_values():
    array = np.arange(12).reshape(3, 4).T[::2]
    assert np.array_equal(over_the_wire(array), array)


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (codec.decode_node_control, Hello(1, 5, 2, "h", "a", -1, -1, "s", MEMORY, "key")),
        (codec.decode_coordinator_control, Assign("id", "f", "", 0, 1, "cpu", 0, True, False, 1, 2, "task")),
        (
            codec.decode_coordinator_control,
            Wire(3, 1, (Peer(0, -1, 0, False, "a", "", None, ""), Peer(1, 0, 1, True, "b", "s", MEMORY, "key"))),
        ),
        (codec.decode_coordinator_control, Share((0, 3))),
        (codec.decode_coordinator_control, Cancel(7, 1)),
        (
            codec.decode_data,
            Fragment(1, 2, 3, 1000, 0, 0, -1, (0, -1), ("y",), (HEAD,), (Visit(0, 0, 1, 2, 3, 4, 5, 6),)),
        ),
        (codec.decode_data, Failed(1, 1, 2, 3, "why")),
        (codec.decode_data, Started(1, 1, 3)),
        (codec.decode_data, Receipt(3, 1000, 1500, 9, 5, 7)),
        (codec.decode_node_control, NodeBeat(5, 4, 1000, 9, (2,))),
        (codec.decode_node_control, Leaving()),
        (codec.decode_node_control, Succeeded(7)),
        (codec.decode_node_control, SucceedRefused("why")),
        (codec.decode_node_control, SuccessorEnded(7, "how")),
        (codec.decode_coordinator_control, Succeed("a", 1, 0, 1 << 40, "key", 5)),
        (codec.decode_coordinator_control, Beat(7)),
    ],
)
def test_headers_survive(decode, message):
    assert decode(codec.encode(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_refused(frame):
    for decode in (codec.decode_data, codec.decode_node_control, codec.decode_coordinator_control):
        with pytest.raises(ProtocolError):
            decode(frame)


@given(st.data())
def test_a_mutated_header_is_refused_or_read(data):
    header = bytearray(codec.encode(Fragment(1, 1, 0, 1000, 0, 0, -1, (0,), ("y",), (HEAD,), ())))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = codec.decode_data(bytes(header))
        if isinstance(message, Fragment):
            codec.decode_tensors(message.tensors, [bytes(16)], nowhere)
    except ProtocolError:
        pass


def test_an_oversized_header_is_refused():
    with pytest.raises(ProtocolError, match="at most"):
        codec.decode_data(bytes(codec.MAX_HEADER_BYTES + 1))


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("x", "float32", (1 << 40, 1 << 40), None),
        TensorHead("x", "float32", (5,), None),
        TensorHead("x", "float32", (-1, -4), None),
        TensorHead("x", "string", (1 << 40,), None),
        TensorHead("x", "object", (4,), None),
        TensorHead("x", "float32", (1,) * 33, None),
        TensorHead("x", "float32", (4,), bytes(16)),
        TensorHead("x", "string", (1,), TensorPlace(0, 1, 2)),
    ],
)
def test_a_head_that_does_not_fit_its_frame_is_refused(head):
    with pytest.raises(ProtocolError):
        codec.decode_tensors((head,), [bytes(16)], nowhere)


def test_small_tensors_ride_in_the_header_and_large_ones_follow_it():
    small, large = np.arange(8.0), np.zeros(codec.INLINE_BYTES, np.float32)
    heads, frames = codec.encode_tensors({"small": small, "large": large})
    assert [head.payload for head in heads] == [small.tobytes(), None]
    assert [len(frame) for frame in frames] == [large.nbytes]


def test_many_small_tensors_do_not_make_a_header_too_large():
    tensors = {f"t{n}": np.zeros(codec.INLINE_BYTES, np.uint8) for n in range(200)}
    heads, frames = codec.encode_tensors(tensors)
    header = codec.encode(Fragment(1, 1, 0, 1000, 0, 0, -1, (0,), ("y",), heads, ()))
    assert len(header) <= codec.MAX_HEADER_BYTES
    assert len(frames) == codec.frames_of(heads) > 100


def test_a_tensor_in_shared_memory_is_taken_from_its_place():
    place = TensorPlace(3, 4, 5)
    heads, frames = codec.encode_tensors({"x": np.ones(4, np.float32)}, {"x": place})
    assert frames == []
    array = codec.decode_tensors(heads, frames, lambda *where: where)["x"]
    assert array == (place, "float32", (4,))


def test_unknown_fields_are_refused():
    with pytest.raises(ProtocolError):
        codec.decode_data(msgspec.msgpack.encode(["failed", 1, 2, 3, "why", "more"]))
